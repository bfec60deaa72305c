"""Claims about PolicyObjective: presets are what their papers changed, every field is checked with an error that names
it, and an objective never runs without an input that one of its terms needs."""

import dataclasses
import math
import pydoc
import re
import typing

import pytest
import torch
from policy_oracle import make_batch

from aepo_kernels import PolicyObjective, advantages, policy_loss
from aepo_kernels.objective import CLIPS, NO_PRESETS, PRESETS, PolicyFields, PresetName

# What each method's paper sets, written down apart from the code. Where a paper leaves a number to the user, its own
# experiments' one: CISPO's upper bound.
PLAIN = {
    "clip": "ppo",
    "eps_low": 0.2,
    "eps_high": 0.2,
    "dual_clip": None,
    "ratio_level": "token",
    "entropy_advantage": 0.0,
    "clamp_entropy_factor": False,
    "entropy_bonus": 0.0,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "aggregation": "token-mean",
    "importance_cap": None,
}
PAPERS = {
    "aepo": PLAIN | {"clip": "aepo", "dual_clip": 3.0, "entropy_advantage": 0.2},
    "arpo": PLAIN | {"dual_clip": 3.0},
    "grpo": PLAIN | {"aggregation": "seq-mean-token-mean"},
    "dapo": PLAIN | {"eps_high": 0.28},
    "cispo": PLAIN | {"clip": "cispo", "eps_low": 1.0, "eps_high": 4.0},
    "gppo": PLAIN | {"clip": "gppo"},
    "gspo": PLAIN
    | {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "eps_low": 3e-4, "eps_high": 4e-4},
    "gigpo": PLAIN,
    "reinforce++": PLAIN,
}


def test_presets_are_the_numbers_of_their_papers():
    def fields(objective):  # one that no paper here knows would be off
        return {name: value for name, value in dataclasses.asdict(objective).items() if name in PLAIN}

    assert {name: fields(PolicyObjective.preset(name)) for name in PRESETS} == PAPERS
    assert list(PRESETS) == list(PAPERS)
    assert fields(PolicyObjective()) == PLAIN


@pytest.mark.parametrize(
    ("clip", "grad_low", "grad_high"), [("ppo", 0, 0), ("aepo", 0, 1.28), ("gppo", 0.9, 1.28), ("cispo", 0, 0)]
)
def test_numbers(clip, grad_low, grad_high):
    objective = PolicyObjective(
        clip=clip, eps_low=0.1, eps_high=0.28, entropy_advantage=0.3, clamp_entropy_factor=True, entropy_bonus=0.01,
        kl_coef=0.04, kl_estimator="k2", importance_cap=2, dual_clip=None if clip == "cispo" else 3,
    )  # fmt: skip
    expected = {
        "low": 0.9,
        "high": 1.28,
        "grad_low": grad_low,
        "grad_high": grad_high,
        "dual_clip": math.inf if clip == "cispo" else 3,
        "detached_ratio": float(clip == "cispo"),
        "entropy_advantage": 0.3,
        "clamp_factor": 1.0,
        "kl_coef": 0.04,
        "kl_estimator": 2,
        "entropy_bonus": 0.01,
        "importance_cap": 2,
    }
    found = objective.numbers()._asdict()
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert PolicyObjective().numbers().importance_cap == math.inf


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
        ("clip", "sapo", ValueError, rf"clip must be one of {', '.join(CLIPS)}; got 'sapo'"),
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
        ("importance_cap", 1e39, ValueError, "importance_cap must be at most 1e\\+30"),
        ("eps_high", 1e300, ValueError, r"eps_high must be at most 1e\+30, .*; got 1e\+300"),
        ("dual_clip", 2e30, ValueError, "dual_clip must be at most"),
        ("kl_coef", -1e38, ValueError, "kl_coef must be at most"),
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
    with pytest.raises(TypeError, match="no field 'colour'; it has clip, eps_low"):
        PolicyObjective.preset("aepo", colour=0.1)
    with pytest.raises(TypeError, match=r"no field 'eps_hi': did you mean 'eps_high'\? It has clip, eps_low"):
        PolicyObjective.preset("aepo", eps_hi=0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PolicyObjective().eps_low = 0.3


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("AEPO", ": did you mean 'aepo'?"),
        ("Reinforce_Plus_Plus", ": did you mean 'reinforce++'?"),
        ("aepoo", ": did you mean 'aepo'?"),
        ("gpso", ": did you mean 'gspo'?"),
        ("gpro", ": did you mean 'grpo'?"),
        ("ppo", ". PPO's clipped loss is PolicyObjective()"),
        ("ppo2", ": did you mean 'ppo'? PPO's clipped loss is PolicyObjective()"),
        (
            "dr_grpo",
            ". Dr. GRPO is PolicyObjective.preset('grpo', aggregation='constant') with denominator = sequences",
        ),
        ("drgrpo", ". Dr. GRPO is"),
        ("Dr. GRPO", ". Dr. GRPO is"),
        ("RLOO", ". RLOO is PolicyObjective(aggregation='seq-mean-token-sum') with leave_one_out_advantages("),
        ("reinforce", ". REINFORCE is PolicyObjective() with one update"),
        ("reinforce_plus_plus_baseline", ". REINFORCE++ with a baseline is"),
        (
            "sapo",
            ". SAPO has a loss of its own, which is no preset: write it as a function for aepo_kernels.logits_loss",
        ),
        ("trpo", ". TRPO has"),
        ("xyz", ""),
        (3, ""),
        (["aepo"], ""),
    ],
)
def test_a_name_that_is_no_preset_says_what_to_write(name, hint):
    with pytest.raises(ValueError, match="objective must be one of aepo, ") as error:
        PolicyObjective.preset(name)
    start = f"objective must be one of {', '.join(PRESETS)}; got {name!r}{hint}"
    assert str(error.value).startswith(start)
    assert hint or str(error.value) == start


def test_what_the_hints_say_to_write_can_be_written():
    names = vars(advantages) | {"PolicyObjective": PolicyObjective}
    names |= {"rewards": torch.rand(8), "groups": torch.arange(8) // 4}
    calls = [call for text in NO_PRESETS.values() for call in re.findall(r"\b\w[\w.]*\((?:[^()]|\([^()]*\))*\)", text)]
    assert len(calls) == 8
    for call in calls:
        assert eval(call, names) is not None, call


def test_help_says_what_every_field_means():
    text = pydoc.render_doc(PolicyObjective, renderer=pydoc.plaintext).replace(" |  ", "")
    described = re.search(r"\nAttributes:\n(.*?)\n *\n", text, re.S)[1]
    entries = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", described, re.M))
    assert list(entries) == [field.name for field in dataclasses.fields(PolicyObjective)]
    for name, hint in typing.get_type_hints(PolicyObjective).items():
        assert len(entries[name].split()) >= 6, name
        for choice in typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ():
            assert choice in entries[name], f"{name} does not say what {choice} is"


def test_type_checkers_see_the_fields_as_they_are():
    assert typing.get_type_hints(PolicyFields) == {
        field.name: typing.get_type_hints(PolicyObjective)[field.name] for field in dataclasses.fields(PolicyObjective)
    }
    assert list(typing.get_args(PresetName)) == list(PRESETS)


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
