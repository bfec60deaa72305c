"""Claims about the native single_pass: its log-probs and entropies have the bits of token_stats, and its gradient is
that of policy_terms and logits_grad but for the last digit, for every dtype and objective; it is as near to float64
truth as any kernel has to be, and in float64 it is the reference's. It has the same bits in place or not, however many
rows and threads there are and wherever a row begins. Rows that do not count are written and never read.
"""

import math
from typing import Any

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels.objective import PolicyObjective
from aepo_kernels.reference.single_pass import single_pass as reference
from aepo_kernels.testing import DTYPES, assert_within_budget, eager_token_stats, make_labels, make_logits

pytestmark = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the extension is not built")
native = torch.ops.aepo_native
IGNORE = -100
SEGMENT = 32768  # csrc/include/row_kernels.h

OBJECTIVES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dual": {"dual_clip": 1.5},
    "aepo": {"clip": "aepo", "dual_clip": 3.0, "entropy_advantage": 0.4},
    "clamped": {"clip": "aepo", "entropy_advantage": 3.0, "clamp_entropy_factor": True},
    "bonus": {"clip": "gppo", "entropy_bonus": 0.1},
    "kl": {"clip": "gppo", "kl_coef": 0.1, "kl_estimator": "k1"},
    "detached": {"clip": "cispo", "importance_cap": 1.5, "kl_coef": 0.1, "kl_estimator": "k2", "entropy_bonus": -0.2},
    "uncapped": {"importance_cap": math.inf, "kl_coef": 0.1, "kl_estimator": "k3", "entropy_advantage": 0.2},
}


def columns(logits, labels, objective, *, temperature=0.7, counts=False, seed=0):
    """What single_pass takes between ignore_index and numbers. Log-ratios reach every bound; of three tokens that count
    one counts without weight; what an ignored row holds is NaN."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(seed)
    tokens = len(logits)
    old, ref, rollout, advantages = (torch.randn(tokens, generator=g, dtype=torch.float64) for _ in range(4))
    logprobs = native.token_stats(logits, labels, temperature, IGNORE, True)[0].double()
    weight = torch.rand(tokens, generator=g, dtype=torch.float64) + 0.1
    times = 1.0 + torch.arange(tokens) % 3 if counts else None
    if times is not None:
        weight[::3] = 0
        times[1::5] = 0
    ignored = labels == IGNORE
    weight[ignored] = 0
    if times is not None:
        times[ignored] = 0
    made = [logprobs + 0.7 * old, advantages, weight, times, logprobs + ref, logprobs + 0.5 * rollout]
    for column in made[:2] + made[4:]:
        column[ignored] = math.nan
    made = [None if column is None else column.to(acc) for column in made]
    if objective.kl_coef == 0:
        made[4] = None
    if objective.importance_cap is None:
        made[5] = None
    stats = torch.tensor([2.0, 1.5], dtype=acc) if objective.entropy_advantage != 0 else None
    return [*made, stats]


def two_pass(logits, labels, temperature, args, numbers, out):
    old, advantages, weight, counts, ref, rollout, stats = args
    logprobs, entropy, maximum, log_sum = native.token_stats(logits, labels, temperature, IGNORE, True)
    _, dlogp, dh, _ = native.policy_terms(
        logprobs, old, advantages, weight, counts, entropy, ref, rollout, None, stats, numbers
    )
    dh = dh if numbers.entropy_bonus != 0 else None
    native.logits_grad(logits, labels, maximum, log_sum, entropy, dlogp, dh, temperature, IGNORE, out)
    return logprobs, entropy, out


def single_pass(logits, labels, temperature, args, numbers, out):
    return *native.single_pass(logits, labels, temperature, IGNORE, *args, numbers, out), out


def same_bits(ours, theirs):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    same = ours.contiguous().view(integer) == theirs.contiguous().view(integer)
    return bool((same | (ours.isnan() & theirs.isnan())).all())  # which NaN it is says nothing


def assert_nearly_equal(ours, theirs):
    """Where two rounded numbers straddle a tie they are one unit apart. Before that, errors are float32's: 15 is about
    the largest |log p + H|, and what cancels is as large as the row's largest gradient."""
    acc = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps
    smallest = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    ours, theirs, unit = ours.double(), theirs.double(), torch.finfo(ours.dtype).eps
    largest = theirs.abs().amax(-1, keepdim=True)
    excess = (ours - theirs).abs() - (theirs.abs() * (unit + 60 * acc) + largest * 15 * acc + smallest)
    assert (excess <= 0)[theirs.isfinite()].all(), excess.max()
    assert torch.equal(ours[~theirs.isfinite()].nan_to_num(0.0), theirs[~theirs.isfinite()].nan_to_num(0.0))
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours.eq(0).all(-1), theirs.eq(0).all(-1))


def check(logits, labels, objective, *, temperature=0.7, counts=False):
    """The two forms beside each other; returns what the single pass gives."""
    args = columns(logits, labels, objective, temperature=temperature, counts=counts)
    numbers = objective.numbers()
    logprobs, entropy, gradient = two_pass(logits, labels, temperature, args, numbers, torch.empty_like(logits))
    ours = single_pass(logits, labels, temperature, args, numbers, torch.empty_like(logits))
    assert same_bits(ours[0], logprobs)
    assert same_bits(ours[1], entropy)
    if len(logits):
        assert_nearly_equal(ours[2], gradient)
    own = logits.clone()
    for again, before in zip(single_pass(own, labels, temperature, args, numbers, own), ours, strict=True):
        assert same_bits(again, before)
    return ours


@pytest.mark.parametrize("counts", [False, True], ids=["weights", "counts"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_two_passes(dtype, name, counts):
    logits = make_logits(19, SEGMENT + 77, "normal", dtype)
    labels = make_labels(logits)
    labels[4] = SEGMENT + 76
    labels[5] = SEGMENT
    labels[6] = IGNORE
    _, _, gradient = check(logits, labels, PolicyObjective(**OBJECTIVES[name]), counts=counts)
    zero = gradient.eq(0).all(-1)
    assert zero[6]
    assert int((~zero).sum()) > 3


@pytest.mark.parametrize("bonus", [0.0, 0.3])
@pytest.mark.parametrize("regime", ["normal", "peaked", "minus_inf", "ties", "offset", "ascending", "tiny_entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_near_to_truth(dtype, regime, bonus):
    logits = make_logits(3, SEGMENT + 1009, regime, dtype)
    labels = make_labels(logits)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    logprobs = native.token_stats(logits, labels, 0.7, IGNORE, True)[0]
    # Ratio 1 and weight 1: the gradients of log-prob and entropy are -advantage and -bonus.
    advantages, ones, numbers = torch.tensor([1.0, -2.0, 0.5]), torch.ones(3), PolicyObjective(entropy_bonus=bonus)
    args = [logprobs, advantages.to(acc), ones.to(acc), None, None, None, None]
    ours = single_pass(logits, labels, 0.7, args, numbers.numbers(), torch.empty_like(logits))
    grads = -advantages.to(acc), (-bonus * ones).to(acc)
    truth = eager_token_stats(logits, labels, 0.7, *grads, dtype=torch.float64)
    eager = eager_token_stats(logits, labels, 0.7, *grads)
    log_vocab = math.log(logits.shape[1]) + 1
    for name, scale, actual in zip(truth._fields, (log_vocab, log_vocab, 2 * log_vocab), ours, strict=True):
        assert_within_budget(name, actual, getattr(truth, name), getattr(eager, name), scale=scale)


@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 64, 65, 129, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_rows(dtype, vocab):
    logits = make_logits(37, vocab, "normal", dtype, seed=vocab)
    check(logits, make_labels(logits), PolicyObjective(clip="gppo", entropy_bonus=0.1))


def test_no_tokens():
    logits, labels = torch.zeros(0, 50), torch.zeros(0, dtype=torch.int64)
    assert [len(x) for x in check(logits, labels, PolicyObjective())] == [0, 0, 0]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_bits_do_not_depend_on_threads(rows):
    # Rows that are no multiple of the threads are partly computed whole, partly by segments.
    logits = make_logits(rows, 2 * SEGMENT + 5, "peaked", torch.bfloat16)
    labels = make_labels(logits)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(check(logits, labels, PolicyObjective(clip="gppo", entropy_bonus=0.1)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(same_bits, other, results[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_gaps_between_them(dtype):
    objective = PolicyObjective(clip="gppo", entropy_bonus=0.1)
    rows = make_logits(5, 1009, "normal", dtype)
    labels = make_labels(rows)
    labels[3] = IGNORE
    args = columns(rows, labels, objective)
    expected = single_pass(rows, labels, 0.7, args, objective.numbers(), torch.empty_like(rows))
    for start in (0, 1, 3, 22):
        padded = torch.full((5, 1031), math.nan, dtype=dtype)  # NaN beside a row shows any read past its end
        view = padded[:, start : start + 1009]
        view.copy_(rows)
        assert all(map(same_bits, single_pass(view, labels, 0.7, args, objective.numbers(), view), expected))
        assert padded[:, :start].isnan().all()
        assert padded[:, start + 1009 :].isnan().all()


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_that_do_not_count_become_0_unread(in_place):
    objective = PolicyObjective(clip="cispo", importance_cap=2.0, kl_coef=0.1, entropy_bonus=0.1)
    logits = make_logits(9, SEGMENT + 9)
    labels = make_labels(logits)
    labels[[0, 3, 8]] = IGNORE
    args = columns(logits, labels, objective)
    expected = single_pass(logits, labels, 0.7, args, objective.numbers(), torch.empty_like(logits))
    logits[[0, 3, 8]] = math.nan
    out = logits if in_place else torch.full_like(logits, 7)
    ours = single_pass(logits, labels, 0.7, args, objective.numbers(), out)
    assert all(map(same_bits, ours, expected))
    assert all(x[[0, 3, 8]].eq(0).all() for x in ours)


def test_a_row_whose_coefficients_are_0_becomes_0_whatever_it_holds():
    logits = make_logits(3, SEGMENT + 9)
    logits[1, 5] = math.nan
    labels = torch.tensor([1, 2, 3])
    zeros, weight = torch.zeros(3), torch.tensor([1.0, 0.0, 1.0])
    logprobs, entropy, out = single_pass(
        logits, labels, 1.0, [zeros, zeros - 1, weight, None, None, None, None], PolicyObjective().numbers(), logits
    )
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert out[1].eq(0).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 3.0, 1e30])
def test_temperatures(temperature):
    logits = make_logits(5, 1037)
    check(logits, logits.argmax(-1), PolicyObjective(clip="gppo", entropy_bonus=0.1), temperature=temperature)


def test_nan_rows_and_labels_out_of_range_show():
    logits = make_logits(4, SEGMENT + 1)
    logits[1, SEGMENT] = math.nan
    labels = torch.tensor([3, 4, SEGMENT + 1, -5])
    logprobs, entropy, gradient = check(logits, labels, PolicyObjective(clip="gppo"))
    assert logprobs.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, True, True, True]
    assert entropy.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("counts", [False, True], ids=["weights", "counts"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_is_the_reference_in_float64(name, counts):
    objective = PolicyObjective(**OBJECTIVES[name])
    logits = make_logits(40, 333, "normal", torch.float64)
    labels = make_labels(logits)
    labels[7] = IGNORE
    args = columns(logits, labels, objective, counts=counts)
    ours = single_pass(logits, labels, 0.7, args, objective.numbers(), torch.empty_like(logits))
    out = torch.empty_like(logits)
    theirs = *reference(logits, labels, 0.7, IGNORE, *args, objective.numbers(), out), out
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-13)


def test_bad_input_is_named():
    logits, labels, row = torch.zeros(2, 10), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    numbers = PolicyObjective().numbers()
    args = [row, row, row, None, None, None, None]

    def run(logits=logits, labels=labels, args=args, numbers=numbers, out=None):
        return native.single_pass(logits, labels, 1.0, IGNORE, *args, numbers, logits if out is None else out)

    with pytest.raises(ValueError, match="out must be like the logits"):
        run(out=logits.bfloat16())
    with pytest.raises(ValueError, match=r"labels must be contiguous Long .* 2 elements"):
        run(labels=labels[:1])
    with pytest.raises(ValueError, match="needs entropy_stats"):
        run(numbers=PolicyObjective(entropy_advantage=0.1).numbers())
    with pytest.raises(ValueError, match=r"numbers must be the .*; got 1$"):
        run(numbers=[1.0])
    names = ("old_logprobs", "advantages", "weight", "counts", "ref_logprobs", "rollout_logprobs", "entropy_stats")
    for place, name in enumerate(names):
        wrong = [*args]
        wrong[place] = torch.zeros(3)
        with pytest.raises(ValueError, match=rf"{name} must be contiguous Float .* 2 elements"):
            run(args=wrong)
        wrong[place] = torch.zeros(2, dtype=torch.float64)
        with pytest.raises(ValueError, match=rf"{name} must be contiguous Float .* got Double"):
            run(args=wrong)
    with pytest.raises(RuntimeError, match="single memory location"):
        run(logits=torch.zeros(1, 10).expand(2, 10))
    x = torch.zeros(21)
    with pytest.raises(RuntimeError, match="single memory location"):
        run(logits=x[:20].view(2, 10), out=x[1:].view(2, 10))
