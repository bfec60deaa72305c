"""Claims about the Triton single pass: the gradient of the reference in one visit to each row, whatever its length, its
alignment and the numbers of its token.
"""

import functools

import pytest
import torch

pytest.importorskip("triton")

from aepo_kernels.kernels import single_pass as module
from aepo_kernels.kernels.single_pass import resident_programs, single_pass
from aepo_kernels.objective import PRESETS, ObjectiveNumbers, PolicyObjective
from aepo_kernels.reference.single_pass import single_pass as reference_pass
from aepo_kernels.testing import assert_within_budget, make_labels, make_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
TEMPERATURE = 0.7
WORD, TILE = 8, 4 * 128 * 8  # 16-bit logits of a word, and of a tile of the first sweep with the fewest warps
OBJECTIVE = PolicyObjective(
    clip="gppo", dual_clip=3.0, entropy_advantage=0.4, kl_coef=0.05, entropy_bonus=0.01, importance_cap=1.1
)
NUMBERS = OBJECTIVE.numbers()
PER_TOKEN = [name for name, fields in PRESETS.items() if fields.get("ratio_level") != "sequence"]


def make_inputs(logits, labels, seed=0):
    """What single_pass takes behind ignore_index and before `numbers`, with everything that it can be given.

    Eight rows see each case of the clip rule.
    """
    rows = len(logits)
    g = torch.Generator().manual_seed(seed)
    picked = labels.clamp(0, logits.shape[1] - 1)[:, None]
    logprobs = torch.log_softmax(logits.double() / TEMPERATURE, -1).gather(-1, picked)[:, 0].nan_to_num(-1.0)
    log_ratio = torch.tensor([-0.5, -0.1, 0.15, 1.3]).repeat(rows // 4 + 1)[:rows]
    old = logprobs - log_ratio - 0.05 * torch.rand(rows, generator=g)
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(4).repeat(rows // 8 + 1)[:rows]
    advantages = sign * (0.5 + torch.rand(rows, generator=g))
    counts = torch.randint(1, 4, (rows,), generator=g)
    ref, rollout = (old + 0.3 * torch.randn(rows, generator=g) for _ in range(2))
    weight = torch.rand(rows, generator=g) + 0.1
    inputs = [old, advantages, weight, counts, ref, rollout]
    for x in inputs:
        if x is counts:
            x[labels == IGNORE] = 0
        else:
            x[labels == IGNORE] = torch.nan
    return [x.float().to(DEVICE) for x in (*inputs, torch.tensor([1.1, 0.6]))]


def check(logits, labels, inputs, numbers=NUMBERS, out=None):
    """The kernel's log-probs, entropies and gradient, which are those of the float64 reference."""
    numbers = ObjectiveNumbers(*(torch.tensor(x).item() for x in numbers))  # in float32, as a GPU takes them
    labels, logits = labels.to(DEVICE), logits.to(DEVICE) if out is None else logits
    truth, eager = torch.empty(logits.shape, dtype=torch.float64, device=DEVICE), torch.empty_like(logits)
    exact = [None if x is None else x.double() for x in inputs]
    found = reference_pass(logits.double(), labels, TEMPERATURE, IGNORE, *exact, numbers, truth)
    plain = reference_pass(logits, labels, TEMPERATURE, IGNORE, *inputs, numbers, eager)
    out = logits if out is None else out
    largest = logits.double().nan_to_num(0, 0, 0).abs().amax(-1) / TEMPERATURE
    ours = single_pass(logits, labels, TEMPERATURE, IGNORE, *inputs, numbers, out)
    for name, one, other, theirs in zip(("logprobs", "entropy"), ours, found, plain, strict=True):
        assert one.dtype == torch.float32
        assert_within_budget(name, one, other, theirs, scale=largest)
    if out.dtype == torch.float32 and out.numel():
        # A ratio is as wrong, of itself, as its log-prob is in nats.
        scale = 1 + truth.abs().nan_to_num(0).amax(-1, keepdim=True) * largest[:, None]
        assert_within_budget("gradient", out, truth, eager, scale=scale)
    elif out.numel():  # the interpreter cuts 16-bit results off where a GPU rounds: one ulp, not half of one
        eps, tiny = torch.finfo(out.dtype).eps, torch.finfo(out.dtype).smallest_normal
        torch.testing.assert_close(out.double(), truth, rtol=eps + 2e-6, atol=tiny * eps + 4e-6, equal_nan=True)
    return *ours, out


# One element; less than a word; a word and less; a tile and its neighbours; more warps; every start of a row in a word.
@pytest.mark.parametrize("vocab", [1, WORD - 1, WORD, WORD + 5, TILE, TILE + 1, 2 * TILE - 1, 5 * TILE + 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_length_of_row_in_place(vocab, dtype):
    logits = make_logits(4, vocab, dtype=dtype)
    labels = make_labels(logits)
    labels[1] = IGNORE
    logits[1] = torch.nan  # not read
    _, _, grad = check(logits, labels, make_inputs(logits, labels))
    assert torch.equal(grad[1].float().view(torch.int32), torch.zeros(vocab, dtype=torch.int32, device=DEVICE))  # +0


@pytest.mark.parametrize("regime", ["peaked", "tiny_entropy", "minus_inf", "ties", "far_negative", "ascending"])
def test_every_kind_of_row(regime):
    logits = make_logits(4, TILE + 77, regime)
    labels = make_labels(logits)
    *_, grad = check(logits.clone(), labels, make_inputs(logits, labels))
    assert (grad[logits.isneginf()] == 0).all()


@pytest.mark.parametrize("name", PER_TOKEN)
def test_every_preset_with_one_ratio_per_token(name):
    logits = make_logits(9, 33)
    labels = make_labels(logits)
    labels[8] = IGNORE
    inputs = make_inputs(logits, labels)
    inputs[2], inputs[3] = inputs[2].nan_to_num(0.0), None
    check(logits, labels, inputs, PolicyObjective.preset(name).numbers())


@functools.cache
def usual():
    logits = make_logits(8, 33)
    labels = make_labels(logits)
    return check(logits.clone(), labels, make_inputs(logits, labels))[2]


@pytest.mark.parametrize(
    "changed",
    [
        {"kl_estimator": 1.0},
        {"kl_estimator": 2.0},
        {"kl_coef": 0.0},
        {"entropy_advantage": 5.0},
        {"entropy_advantage": 5.0, "clamp_factor": 1.0},
        {"entropy_bonus": 0.0},
        {"entropy_bonus": -0.3},
        {"dual_clip": 4.0},
        {"importance_cap": float("inf")},
        {"detached_ratio": 1.0, "grad_low": 0.0, "grad_high": 0.0},  # as CISPO has them, who does not use them
    ],
    ids=str,
)
def test_every_number(changed):
    logits = make_logits(8, 33)
    labels = make_labels(logits)
    *_, grad = check(logits, labels, make_inputs(logits, labels), NUMBERS._replace(**changed))
    assert not torch.equal(grad, usual())


@pytest.mark.parametrize("missing", [3, 4, 5, 6], ids=["counts", "ref_logprobs", "rollout_logprobs", "entropy_stats"])
def test_every_optional_input_may_be_missing(missing):
    logits = make_logits(4, 33)
    labels = make_labels(logits)
    inputs = make_inputs(logits, labels)
    inputs[missing] = None
    numbers = NUMBERS._replace(kl_coef=0.0) if missing == 4 else NUMBERS
    check(logits, labels, inputs, numbers._replace(entropy_advantage=0.0) if missing == 6 else numbers)


def test_rows_without_a_share_of_the_loss_keep_their_statistics():
    logits = make_logits(6, 99)
    labels = make_labels(logits)
    inputs = make_inputs(logits, labels)
    inputs[2][1:3] = 0.0  # counted for the metrics
    inputs[3][4] = 0.0  # not counted
    logprobs, entropy, grad = check(logits, labels, inputs)
    assert ((logprobs != 0) & (entropy != 0)).all()
    assert (grad == 0).all(-1).tolist() == [False, True, True, False, True, False]


@pytest.mark.parametrize("logit", [torch.nan, torch.inf])
def test_an_undefined_row_shows_in_itself_alone(logit):
    logits = make_logits(4, TILE + 9, dtype=torch.bfloat16)
    labels = make_labels(logits)
    inputs = make_inputs(logits, labels)
    logits[1, 5] = logits[2, TILE + 8] = logit  # in a whole word, and in one that the row's end cuts
    logprobs, entropy, grad = check(logits, labels, inputs)
    bad = [False, True, True, False]
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == grad.isnan().all(-1).tolist() == bad


@pytest.mark.parametrize("which", range(7))
def test_a_nan_of_a_token_shows_in_its_row(which):
    logits = make_logits(3, 99)
    labels = make_labels(logits)
    inputs = make_inputs(logits, labels)
    if which == 6:
        inputs[6][1] = torch.nan
    else:
        inputs[which][1] = torch.nan
    numbers = NUMBERS._replace(kl_coef=0.5)
    grad = torch.empty(3, 99, device=DEVICE)
    single_pass(logits.to(DEVICE), labels.to(DEVICE), TEMPERATURE, IGNORE, *inputs, numbers, grad)
    expected = {3: [False] * 3, 6: [True] * 3}.get(which, [False, True, False])  # any count but 0 is one
    assert grad.isnan().all(-1).tolist() == expected
    assert grad.isnan().any(-1).tolist() == expected


def test_a_label_outside_the_vocabulary_shows():
    logits = make_logits(4, 37)
    inputs = make_inputs(logits, make_labels(logits))
    labels = torch.tensor([-1, 37, 2**32 + 5, 3])
    logprobs, _, grad = check(logits, labels, inputs)
    assert logprobs.isnan().tolist() == grad.isnan().all(-1).tolist() == [True, True, True, False]


# The rows of out may lie on 16-byte boundaries like those of the logits, elsewhere in a word, or elsewhere in each row.
@pytest.mark.parametrize(("first", "width"), [(3, 16), (4, 16), (3, 11)])
def test_out_may_lie_anywhere_and_nothing_beside_it_is_written_or_read(first, width):
    vocab = TILE + 5
    wide = torch.full((4, vocab + 16), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    logits = wide[:, 3 : 3 + vocab]
    logits.copy_(make_logits(4, vocab, dtype=torch.bfloat16))
    before = wide.clone()
    canvas = torch.full((4, vocab + width), 7.0, dtype=torch.bfloat16, device=DEVICE)
    labels = make_labels(logits.cpu())
    check(logits, labels, make_inputs(logits.cpu(), labels), out=canvas[:, first : first + vocab])
    assert (canvas[:, :first] == 7).all()
    assert (canvas[:, first + vocab :] == 7).all()
    assert torch.equal(wide.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("vocab", [TILE + 5, 5])
def test_the_unaligned_rows_of_a_slice_in_place(vocab):
    wide = torch.full((9, vocab + 3), 7.0, dtype=torch.bfloat16, device=DEVICE)
    logits = wide[:, 1 : 1 + vocab]
    logits.copy_(make_logits(9, vocab, dtype=torch.bfloat16))
    labels = make_labels(logits.cpu())
    check(logits, labels, make_inputs(logits.cpu(), labels), out=logits)
    assert (wide[:, [0, -1, -2]] == 7).all()


def test_no_tokens():
    logits = torch.empty(0, 50, device=DEVICE)
    logprobs, entropy, _ = check(logits, torch.empty(0, dtype=torch.int64), [logits[:, 0]] * 6 + [torch.ones(2)])
    assert logprobs.shape == entropy.shape == (0,)


def test_equal_inputs_give_equal_bits():
    logits = make_logits(3, TILE + 5, dtype=torch.bfloat16).to(DEVICE)
    labels = make_labels(logits.cpu())
    inputs = make_inputs(logits.cpu(), labels)
    runs = []
    for rows in (3, 3, 2):  # also whatever the other rows are
        out = torch.empty_like(logits[:rows])
        given = [x[:rows] for x in inputs[:-1]]
        stats = single_pass(
            logits[:rows], labels.to(DEVICE)[:rows], TEMPERATURE, IGNORE, *given, inputs[-1], NUMBERS, out
        )
        runs.append([x[:2] for x in (*stats, out)])
    for one, two, three in zip(*runs, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize(
    ("processors", "cache_mib", "vocab", "programs"),
    [
        (132, 50, 151936, 1),  # H100
        (132, 50, 98304, 1),  # two would fit, and nothing else
        (132, 50, 65536, 2),
        (132, 50, 32768, 4),
        (132, 50, 1000, 8),
        (132, 50, 2**21, 1),  # no row fits
        (108, 40, 151936, 1),  # A100
        (148, 126, 151936, 2),  # B200
    ],
)
def test_the_rows_in_work_fit_the_cache(processors, cache_mib, vocab, programs):
    assert resident_programs(processors, cache_mib << 20, 2 * vocab) == programs
    assert 4 <= module.WARPS_PER_PROCESSOR // programs <= 32
