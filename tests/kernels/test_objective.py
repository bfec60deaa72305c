"""Claims about PolicyObjective: presets are what their papers changed, every field is checked with an error that names
it, and an objective never runs without an input that one of its terms needs."""

import dataclasses
import math

import pytest
import torch
from policy_oracle import make_batch

from aepo_kernels import PolicyObjective, policy_loss
from aepo_kernels.objective import PRESETS


def test_presets():
    assert list(PRESETS) == ["aepo", "arpo", "grpo", "dapo", "cispo", "gppo", "gspo", "gigpo", "reinforce++"]
    aepo = PolicyObjective.preset("aepo")
    assert (aepo.clip, aepo.eps_low, aepo.eps_high, aepo.dual_clip, aepo.entropy_advantage) == (
        "aepo",
        0.2,
        0.2,
        3.0,
        0.2,
    )
    assert (aepo.kl_coef, aepo.entropy_bonus, aepo.aggregation) == (0.0, 0.0, "token-mean")
    terms = aepo.terms()
    assert (terms.low, terms.high, terms.grad_low, terms.grad_high) == pytest.approx((0.8, 1.2, 0.0, 1.2))
    terms = PolicyObjective.preset("gppo").terms()
    assert (terms.grad_low, terms.grad_high, terms.dual_clip) == pytest.approx((0.8, 1.2, math.inf))
    terms = PolicyObjective.preset("dapo").terms()
    assert (terms.high, terms.grad_low, terms.grad_high) == pytest.approx((1.28, 0.0, 0.0))
    assert PolicyObjective.preset("cispo").terms().detached_ratio
    assert PolicyObjective.preset("gspo").ratio_level == "sequence"
    assert PolicyObjective.preset("arpo") == PolicyObjective(dual_clip=3.0)


def test_every_field_can_be_overridden():
    for field in dataclasses.fields(PolicyObjective):
        value = {"clip": "gppo", "ratio_level": "sequence", "kl_estimator": "k1", "aggregation": "constant"}.get(
            field.name, 0.5
        )
        if field.name in ("dual_clip", "importance_cap"):
            value = 2.5
        if field.name == "clamp_entropy_factor":
            value = True
        assert getattr(PolicyObjective.preset("aepo", **{field.name: value}), field.name) == value


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("clip", "sapo", ValueError, "clip must be one of ppo, aepo, gppo, cispo; got 'sapo'"),
        ("ratio_level", "word", ValueError, "ratio_level must be one of token, sequence"),
        ("kl_estimator", 3, ValueError, "kl_estimator must be one of k1, k2, k3; got 3"),
        ("aggregation", "mean", ValueError, "aggregation must be one of token-mean"),
        ("eps_low", 1.5, ValueError, r"eps_low must be in \[0, 1\]; got 1.5"),
        ("eps_low", "0.2", TypeError, "eps_low must be a number"),
        ("eps_high", -0.1, ValueError, "eps_high must be >= 0 and finite; got -0.1"),
        ("eps_high", math.nan, ValueError, "eps_high must be >= 0 and finite; got nan"),
        ("dual_clip", 1.0, ValueError, "dual_clip must be > 1, or None; got 1.0"),
        ("entropy_advantage", math.inf, ValueError, "entropy_advantage must be finite"),
        ("entropy_bonus", True, TypeError, "entropy_bonus must be a number"),
        ("kl_coef", None, TypeError, "kl_coef must be a number"),
        ("importance_cap", 0, ValueError, "importance_cap must be > 0"),
        ("clamp_entropy_factor", 1, TypeError, "clamp_entropy_factor must be a bool; got 1"),
        ("clamp_entropy_factor", True, ValueError, "clamp_entropy_factor=True needs entropy_advantage"),
    ],
)
def test_a_bad_field_is_named(field, value, error, message):
    with pytest.raises(error, match=message):
        PolicyObjective(**{field: value})


def test_contradictions_and_unknown_names():
    with pytest.raises(ValueError, match="dual_clip has no meaning with clip='cispo'"):
        PolicyObjective.preset("cispo", dual_clip=3.0)
    with pytest.raises(ValueError, match=r"objective must be one of aepo, .*; got 'ppo2'"):
        PolicyObjective.preset("ppo2")
    with pytest.raises(TypeError, match="no field 'eps'; it has clip, eps_low"):
        PolicyObjective.preset("aepo", eps=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolicyObjective().eps_low = 0.3


# The published AEPO code computes entropies only for an entropy bonus that is 0: its entropy-aware advantage never ran.
@pytest.mark.parametrize(
    ("objective", "given", "message"),
    [
        ({"entropy_advantage": 0.2}, {}, "entropy_advantage != 0 needs entropy"),
        ({"entropy_bonus": 0.01}, {}, "entropy_bonus != 0 needs entropy"),
        ({"kl_coef": 0.1}, {}, "kl_coef != 0 needs ref_logprobs"),
        ({"importance_cap": 2.0}, {}, "importance_cap needs rollout_logprobs"),
        ({"ratio_level": "sequence"}, {}, r"need cu_seqlens or \[B, L\] inputs"),
        ({"aggregation": "seq-mean-token-sum"}, {}, r"need cu_seqlens or \[B, L\] inputs"),
        ({"aggregation": "constant"}, {}, "aggregation='constant' needs denominator"),
        ({}, {"entropy_stats": (0.0, 1.0)}, "entropy_stats is given, but entropy_advantage is 0"),
        ({}, {"rollout_logprobs": torch.zeros(51)}, "rollout_logprobs is given, but importance_cap is None"),
    ],
)
def test_no_term_runs_without_its_input_and_no_input_without_its_term(objective, given, message):
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        policy_loss(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            objective=PolicyObjective(**objective),
            **given,
        )
