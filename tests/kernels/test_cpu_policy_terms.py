"""Claims about the native policy_terms: it was built for the numbers and the metrics that objective.py lists; in
float64 it equals the reference to 1e-12 for every kind of objective; a token that counts n times is n tokens; float32
inputs lose nothing but their own rounding, and bounds that would read past the end are refused.

What the formulas should be is tested in test_policy_loss.py, for this backend too.
"""

import itertools
import math

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels.objective import METRICS, ObjectiveNumbers, PolicyObjective
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


def numbers(**fields) -> ObjectiveNumbers:
    return PolicyObjective(**fields).numbers()


OBJECTIVES = {
    "ppo": numbers(),
    "dual": numbers(dual_clip=1.5, entropy_bonus=0.1),
    "aepo": numbers(clip="aepo", dual_clip=3.0, entropy_advantage=0.4),
    "clamped": numbers(clip="aepo", entropy_advantage=3.0, clamp_entropy_factor=True),
    "gppo": numbers(clip="gppo", kl_coef=0.1, kl_estimator="k1"),
    "cispo": numbers(clip="cispo", importance_cap=1.5, kl_coef=0.1, kl_estimator="k2", entropy_bonus=-0.2),
    "uncapped": numbers(importance_cap=math.inf, kl_coef=0.1, kl_estimator="k3", entropy_advantage=0.2),
}
CU_SEQLENS = torch.tensor([0, 1, 150, 150, 151, 399, 400])
COUNTS = torch.arange(TOKENS, dtype=torch.float64) % 4  # 0: masked, though it may have a weight
COUNTS[150] = 0  # the only token of its sequence


def test_the_extension_was_built_for_the_lists_of_objective_py():
    assert native.objective_numbers() == list(ObjectiveNumbers._fields)
    assert native.policy_metrics() == list(METRICS)


@pytest.mark.parametrize("counts", [None, COUNTS], ids=["once", "counts"])
@pytest.mark.parametrize("sequences", [None, CU_SEQLENS], ids=["token", "sequence"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_reference_in_float64(name, sequences, counts):
    *four, entropy, ref, rollout = inputs()
    if counts is not None:
        for column in (*four, entropy, ref, rollout):
            column[column.isnan()] = 0.5  # what weight 0 masks, counts may call valid
            column[counts == 0] = math.nan
    stats = torch.tensor([0.5, 0.3], dtype=torch.float64)
    for h, r, w, s in itertools.product((entropy, None), (ref, None), (rollout, None), (stats, None)):
        objective = OBJECTIVES[name]
        if h is None and (objective.entropy_advantage or objective.entropy_bonus):
            continue
        args = (*four, counts, h, r, w, sequences, s, objective)
        for what, ours, theirs in zip(
            ("loss", "dlogp", "dH", "metrics"), native.policy_terms(*args), policy_terms(*args), strict=True
        ):
            assert theirs.isfinite().all()
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("sequences", [False, True], ids=["token", "sequence"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_token_that_counts_n_times_is_n_tokens(name, sequences):
    columns = inputs()
    valid = columns[3] != 0
    columns = [column[valid] for column in columns]
    tokens = len(columns[0])
    times = 1 + torch.arange(tokens) % 3
    bounds = torch.tensor([0, 7, 100, tokens])
    repeated = torch.cat([torch.zeros(1, dtype=torch.int64), times.cumsum(0)])[bounds]

    def run(columns, counts, cu_seqlens):
        *four, entropy, ref, rollout = columns
        cu_seqlens = cu_seqlens if sequences else None
        return native.policy_terms(*four, counts, entropy, ref, rollout, cu_seqlens, None, OBJECTIVES[name])

    loss, dlogp, dh, metrics = run([column.repeat_interleave(times) for column in columns], None, repeated)
    columns[3] = columns[3] * times
    ours = run(columns, times.double(), bounds)
    owner = torch.arange(tokens).repeat_interleave(times)
    summed = [x.new_zeros(tokens).index_add(0, owner, x) if len(x) else x for x in (dlogp, dh)]
    for mine, theirs in zip(ours, (loss, *summed, metrics), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_float32_inputs_are_computed_in_float64_and_rounded_once():
    *four, entropy, ref, rollout = inputs(torch.float32)
    for objective in OBJECTIVES.values():
        narrow = native.policy_terms(*four, None, entropy, ref, rollout, None, None, objective)
        wide = native.policy_terms(
            *(x.double() for x in four), None, entropy.double(), ref.double(), rollout.double(), None, None, objective
        )
        for ours, theirs in zip(narrow, wide, strict=True):
            assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("bad", [0, 2, 4, 5, 6])  # logprobs, advantages, entropy, ref_logprobs, rollout_logprobs
def test_nan_on_a_valid_token_shows_in_the_loss(bad):
    columns = inputs()
    columns[bad][int(columns[3].argmax())] = math.nan
    *four, entropy, ref, rollout = columns
    objective = numbers(kl_coef=0.1, importance_cap=2.0, entropy_advantage=0.2)
    loss, *_ = native.policy_terms(*four, None, entropy, ref, rollout, None, None, objective)
    assert loss.isnan()


@pytest.mark.parametrize("bounds", [[0, 401], [0, 300, 200, 400], [-1, 400], [0, 2**40, 400]])
def test_bounds_that_leave_the_tokens_are_refused(bounds):
    *four, _, _, _ = inputs()
    with pytest.raises(ValueError, match="cu_seqlens"):
        native.policy_terms(*four, None, None, None, None, torch.tensor(bounds), None, numbers())


def test_missing_entropy_is_refused():
    *four, _, _, _ = inputs()
    with pytest.raises(ValueError, match="need entropy"):
        native.policy_terms(*four, None, None, None, None, None, None, numbers(entropy_bonus=0.1))


def test_another_number_of_numbers_is_refused():
    *four, _, _, _ = inputs()
    with pytest.raises(ValueError, match=rf"numbers must be the {len(numbers())} of .*; got {len(numbers()) - 1}"):
        native.policy_terms(*four, None, None, None, None, None, None, numbers()[:-1])


@pytest.mark.parametrize(("place", "name"), [(3, "weight"), (4, "counts"), (5, "entropy"), (6, "ref_logprobs")])
def test_a_column_of_another_length_is_refused(place, name):
    *four, entropy, ref, rollout = inputs()
    args = [*four, None, entropy, ref, rollout, None, None, numbers()]
    args[place] = torch.ones(TOKENS - 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{name} must be contiguous Double .* {TOKENS} elements"):
        native.policy_terms(*args)
