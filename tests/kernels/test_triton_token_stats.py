"""Claims about the Triton forward that depend on how it cuts a row: into words, tiles, lanes and programs.

Wherever the row begins and ends, whatever lies beside it, and wherever its maximum or its masked logits sit, the
results are those of the float64 reference. (What every backend must do is tested in test_token_stats.py.)
"""

import pytest
import torch

pytest.importorskip("triton")

from aepo_kernels import reference
from aepo_kernels.kernels import common
from aepo_kernels.kernels import token_stats as module
from aepo_kernels.kernels.token_stats import LANES, WORDS, token_stats, token_stats_kernel
from aepo_kernels.testing import REGIMES, make_labels, make_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
VEC = 8  # 16-bit logits per 16-byte word
STEP = LANES * VEC
TILE = WORDS * STEP
VOCAB = 3 * TILE + 19  # two programs share a row of it, while there are at most 16 rows

# float32 with sums of up to 5e4 terms in 128 lanes: a lane adds a few hundred terms one by one, which costs a few ulp.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def run(logits, labels=None, temperature=1.0, skip_ignored=False):
    """(logprobs, entropy, maximum, log_sum) of the kernel and of the float64 reference, both on the CPU in float64."""
    labels = labels if labels is None else labels.to(DEVICE)
    ours = token_stats(logits, labels, temperature, IGNORE, skip_ignored)
    truth = reference.token_stats(logits.double(), labels, temperature, IGNORE, skip_ignored)
    return [x.double().cpu() for x in ours], [x.cpu() for x in truth]


def check(logits, labels=None, temperature=1.0, skip_ignored=False):
    for name, ours, truth in zip(
        ("logprobs", "entropy", "maximum", "log_sum"), *run(logits, labels, temperature, skip_ignored), strict=True
    ):
        torch.testing.assert_close(
            ours, truth, **TOLERANCE, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


# One element; less than a word; words but no whole tile; exactly one tile; one more; a last tile that is nearly whole;
# a row that two programs share, one of them with a cut tile.
@pytest.mark.parametrize("vocab", [1, VEC - 1, 1000, TILE, TILE + 1, 2 * TILE - 1, 3 * TILE + 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_length_of_row(vocab, dtype):
    logits = make_logits(3, vocab, dtype=dtype)
    check(logits.to(DEVICE), make_labels(logits), 0.7)


@pytest.mark.parametrize("vocab", [2 * VEC + 3, TILE + 3])
def test_rows_may_begin_anywhere_and_their_neighbours_do_not_matter(vocab):
    # An odd stride puts the 8 rows on the 8 possible places in a word. Beside them stands what must not be read into
    # the result: padding of NaN and +inf, where a kernel that rounds a row up to its block sees "ghost columns".
    padded = torch.full((8, vocab + 10), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    padded[:, -4:] = torch.inf
    rows = padded[:, 5 : 5 + vocab]
    assert {row.data_ptr() % 16 for row in rows} == set(range(0, 16, 2))
    logits = make_logits(8, vocab, dtype=torch.bfloat16)
    rows.copy_(logits)
    check(rows, make_labels(logits))
    copied = token_stats(rows.contiguous(), None, 1.0, IGNORE, False)
    for ours, theirs in zip(token_stats(rows, None, 1.0, IGNORE, False)[1:], copied[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_split_rows_agree_with_whole_ones(monkeypatch):
    logits = make_logits(2, VOCAB, "normal", torch.bfloat16).to(DEVICE)
    results = []
    for programs, tiles in ((1, 4), (2, 2), (4, 1)):
        monkeypatch.setattr(module, "row_programs", lambda *_, split=(programs, tiles): split)
        results.append(token_stats(logits, None, 1.0, IGNORE, False)[1:])
    for whole, *splits in zip(*results, strict=True):
        for split in splits:
            torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 100, 10**6])
@pytest.mark.parametrize("vocab", [1, 4096, 50_257, 151_936, 10**6])
def test_programs_cover_every_row(rows, vocab):
    programs, tiles = common.row_programs(torch.empty(rows, vocab, device="meta"), TILE)
    assert programs * tiles * TILE >= vocab + VEC - 1  # the row may start VEC - 1 into its first word
    assert (programs - 1) * tiles * TILE < vocab + VEC  # and no program is idle
    assert 1 <= programs <= common.MAX_PROGRAMS_PER_ROW


# Where the maximum sits decides which words are read a second time: in the first and last word, on both sides of a step
# and of a tile, in the second program's part (from 2 * TILE on), in the last, cut tile.
PLACES = [0, 7, 8, STEP - 1, STEP, 2 * STEP + 5, TILE - 1, TILE, 2 * TILE + 77, 3 * TILE, 3 * TILE + 18]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_confident_rows_keep_their_entropy_wherever_the_maximum_is(shift):
    gap = torch.tensor([31.0, 22.0, 15.0]).repeat(4)[: len(PLACES), None]  # H of about 1e-8, 6e-5 and 0.1 nats
    places = torch.tensor(PLACES)
    logits = make_logits(len(PLACES), VOCAB).mul(0.5).scatter(1, places[:, None], gap) + shift
    (logprobs, entropy, _, _), truth = run(logits.to(DEVICE), places)
    assert 1e-9 < truth[1].min() < 1e-7
    assert 0.05 < truth[1].max() < 0.5
    torch.testing.assert_close(entropy, truth[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(logprobs, truth[0], rtol=1e-5, atol=0)


# A second maximum in the same word, step, tile, lane, another program's part: each must be counted, one left out.
@pytest.mark.parametrize("second", [6, 8, STEP + 5, TILE + 5, VOCAB - 1])
def test_ties_of_the_maximum_count(second):
    logits = torch.full((1, VOCAB), -20.0, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 5] = logits[0, second] = 10.0
    check(logits, torch.tensor([second]))
    assert run(logits)[0][1].item() == pytest.approx(0.6931471805599453, rel=1e-6)


def test_masked_logits_contribute_nothing_wherever_they_are():
    # Leading words, tiles and a whole program's part of -inf; everything but one logit; one -inf alone; the masks that
    # are a dtype's lowest number; a row of nothing but that number, which is finite: ln V.
    logits = make_logits(8, VOCAB, dtype=torch.float32).to(DEVICE)
    lowest = torch.finfo(torch.float32).min
    logits[0, : 2 * TILE] = -torch.inf
    logits[1, : 3 * TILE + 8] = -torch.inf
    logits[2, TILE:] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 3 * TILE] = -300.0
    logits[4, 17] = -torch.inf
    logits[5, : 2 * TILE] = lowest
    logits[6] = lowest
    logits[7] -= 300.0  # all far below 0, where a maximum that starts at 0 underflows
    labels = torch.full((8,), 3 * TILE)
    labels[0], labels[1] = 5, VOCAB - 1
    check(logits, labels)
    (logprobs, entropy, _, _), _ = run(logits, labels)
    assert logprobs[0] == -torch.inf
    assert entropy[3] == 0
    assert entropy[6].item() == pytest.approx(torch.tensor(float(VOCAB)).log().item(), rel=1e-6)


@pytest.mark.parametrize("place", [0, TILE + 1, VOCAB - 1])
def test_an_undefined_row_is_nan_and_disturbs_no_other(place):
    logits = make_logits(5, VOCAB, dtype=torch.bfloat16).to(DEVICE)
    logits[1, place] = torch.nan
    logits[2, place] = torch.inf
    logits[3] = -torch.inf
    labels = torch.tensor([3, 3, IGNORE, 3, IGNORE])
    check(logits, labels)
    ours, _ = run(logits, labels)
    assert ours[2][3] == -torch.inf  # the maximum of nothing: an empty part of a longer row
    ours[2][3] = torch.nan
    for stat in ours:
        assert stat.isnan().tolist() == [False, True, True, True, False]


def test_skipped_rows_are_zero_whatever_they_hold():
    logits = make_logits(4, VOCAB, dtype=torch.bfloat16).to(DEVICE)
    logits[1] = torch.nan
    logits[2] = torch.nan
    labels = torch.tensor([2, IGNORE, 2, IGNORE])
    check(logits, labels, skip_ignored=True)
    ours, _ = run(logits, labels, skip_ignored=True)
    for stat in ours:
        assert stat[[1, 3]].tolist() == [0, 0]
        assert stat[2].isnan()


def test_labels_outside_the_vocabulary_read_nothing():
    logits = make_logits(4, 37, dtype=torch.bfloat16).to(DEVICE)
    (logprobs, entropy, _, _), _ = run(logits, torch.tensor([-1, 37, 2**32 + 5, 5]))
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert entropy.isfinite().all()


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_in_split_rows(regime):
    logits = make_logits(2, VOCAB, regime, torch.bfloat16)
    check(logits.to(DEVICE), make_labels(logits), 1.3)


def test_equal_inputs_give_equal_bits():
    logits = make_logits(2, VOCAB, dtype=torch.bfloat16).to(DEVICE)
    for one, two in zip(*(token_stats(logits, None, 1.0, IGNORE, False) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


def test_more_rows_than_the_second_grid_dimension_holds(monkeypatch):
    grids = []
    monkeypatch.setattr(token_stats_kernel, "run", lambda *args, grid, **kwargs: grids.append(grid))
    token_stats(torch.empty(70_000, 8, device=DEVICE), None, 1.0, IGNORE, False)
    assert grids == [(70_000, 1)]  # rows along x (2^31 - 1 of them), programs of a row along y (65535)
