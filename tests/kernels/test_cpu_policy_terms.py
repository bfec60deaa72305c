"""Claims about the native policy_terms: in float64 it equals the reference to 1e-12 for every kind of objective,
float32 inputs lose nothing but their own rounding, and bounds that would read past the end are refused.

What the formulas should be is tested in test_policy_loss.py, for this backend too.
"""

import itertools
import math

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels.objective import PolicyObjective, Terms
from aepo_kernels.reference.policy_terms import policy_terms

pytestmark = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the extension is not built")
native = torch.ops.aepo_native
TOKENS = 400


def inputs(dtype=torch.float64):
    """Per-token inputs with ratios far beyond all bounds; a quarter masked, and NaN wherever masked."""
    g = torch.Generator().manual_seed(0)
    old, ref, rollout, noise, advantages = torch.randn(5, TOKENS, generator=g, dtype=torch.float64)
    old = old.abs().neg()
    weight = torch.rand(TOKENS, generator=g, dtype=torch.float64) * (torch.rand(TOKENS, generator=g) > 0.25)
    entropy = torch.rand(TOKENS, generator=g, dtype=torch.float64)
    columns = [old + 0.7 * noise, old, advantages, weight, entropy, old + ref, old + 0.5 * rollout]
    for column in columns[:3] + columns[4:]:
        column[weight == 0] = math.nan
    return [column.to(dtype) for column in columns]


def terms(**fields) -> Terms:
    return PolicyObjective(**fields).terms()


OBJECTIVES = {
    "ppo": terms(),
    "dual": terms(dual_clip=1.5, entropy_bonus=0.1),
    "aepo": terms(clip="aepo", dual_clip=3.0, entropy_advantage=0.4),
    "clamped": terms(clip="aepo", entropy_advantage=3.0, clamp_entropy_factor=True),
    "gppo": terms(clip="gppo", kl_coef=0.1, kl_estimator="k1"),
    "cispo": terms(clip="cispo", importance_cap=1.5, kl_coef=0.1, kl_estimator="k2", entropy_bonus=-0.2),
    "uncapped": terms(importance_cap=math.inf, kl_coef=0.1, kl_estimator="k3", entropy_advantage=0.2),
}


@pytest.mark.parametrize("sequences", [False, True], ids=["token", "sequence"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_reference_in_float64(name, sequences):
    *four, entropy, ref, rollout = inputs()
    cu_seqlens = torch.tensor([0, 1, 150, 150, 151, 399, 400]) if sequences else None
    stats = torch.tensor([0.5, 0.3], dtype=torch.float64)
    for h, r, w, s in itertools.product((entropy, None), (ref, None), (rollout, None), (stats, None)):
        objective = OBJECTIVES[name]
        if h is None and (objective.entropy_advantage or objective.entropy_bonus):
            continue
        args = (*four, h, r, w, cu_seqlens, s, *objective)
        for what, ours, theirs in zip(
            ("loss", "dlogp", "dH", "metrics"), native.policy_terms(*args), policy_terms(*args), strict=True
        ):
            assert theirs.isfinite().all()
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=lambda m, what=what: f"{what}: {m}")


def test_float32_inputs_are_computed_in_float64_and_rounded_once():
    *four, entropy, ref, rollout = inputs(torch.float32)
    for objective in OBJECTIVES.values():
        narrow = native.policy_terms(*four, entropy, ref, rollout, None, None, *objective)
        wide = native.policy_terms(
            *(x.double() for x in four), entropy.double(), ref.double(), rollout.double(), None, None, *objective
        )
        for ours, theirs in zip(narrow, wide, strict=True):
            assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("bad", [0, 2, 4, 5, 6])  # logprobs, advantages, entropy, ref_logprobs, rollout_logprobs
def test_nan_on_a_valid_token_shows_in_the_loss(bad):
    columns = inputs()
    columns[bad][int(columns[3].argmax())] = math.nan
    *four, entropy, ref, rollout = columns
    objective = terms(kl_coef=0.1, importance_cap=2.0, entropy_advantage=0.2)
    loss, *_ = native.policy_terms(*four, entropy, ref, rollout, None, None, *objective)
    assert loss.isnan()


@pytest.mark.parametrize("bounds", [[0, 401], [0, 300, 200, 400], [-1, 400], [0, 2**40, 400]])
def test_bounds_that_leave_the_tokens_are_refused(bounds):
    *four, _, _, _ = inputs()
    with pytest.raises(ValueError, match="cu_seqlens"):
        native.policy_terms(*four, None, None, None, torch.tensor(bounds), None, *terms())


def test_missing_entropy_is_refused():
    *four, _, _, _ = inputs()
    with pytest.raises(ValueError, match="need entropy"):
        native.policy_terms(*four, None, None, None, None, None, *terms(entropy_bonus=0.1))
