"""Claims about the Triton sampler that depend on how it cuts a row into words, tiles, lanes and programs: it draws what
the reference draws, wherever the row begins, the winner sits and the candidates are."""

import pytest
import torch

pytest.importorskip("triton")

from aepo_kernels.kernels import sample_with_entropy as module
from aepo_kernels.kernels.sample_with_entropy import FINISH_LANES, LANES, WORDS, sample_with_entropy
from aepo_kernels.reference.sample_with_entropy import sample_with_entropy as reference_sample
from aepo_kernels.testing import make_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = WORDS * LANES * 4  # of float32 logits
VOCAB = 3 * TILE + 19  # two programs share a row of it


def check(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, offset=0):
    """The kernels' tokens, equal to the reference's, and their statistics, close to its in float64."""
    rows = len(logits)

    def column(value, dtype):
        return None if value is None else torch.full((rows,), value, dtype=dtype)

    args = [column(temperature, torch.float64), column(top_k, torch.int64), column(top_p, torch.float64)]
    args += [column(min_p, torch.float64), torch.arange(rows), column(offset, torch.int64)]
    ours = sample_with_entropy(logits, *(x if x is None else x.to(DEVICE) for x in args))
    tokens, logprobs, entropy = reference_sample(logits.cpu().double(), *args)
    assert ours[0].tolist() == tokens.tolist()
    # float32 with sums of thousands of terms in 128 lanes (test_triton_token_stats.py)
    torch.testing.assert_close(ours[1].double().cpu(), logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[2].double().cpu(), entropy, rtol=2e-6, atol=2e-6)
    return tokens


# One logit; less than a word; no whole tile; exactly one; one more; a row that two programs share.
@pytest.mark.parametrize("vocab", [1, 3, 1000, TILE, TILE + 1, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_length_of_row(vocab, dtype):
    check(make_logits(2, vocab, dtype=dtype).to(DEVICE))


def test_rows_may_begin_anywhere():
    # An odd stride puts the rows on all places in a word, so that no four neighbours of a random counter share one.
    padded = torch.full((8, 150), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    rows = padded[:, 5 : 5 + 133]
    padded[:, :5] = torch.inf
    rows.copy_(make_logits(8, 133))
    check(padded[:, 5:138])
    odd = torch.full((8, 151), torch.nan, dtype=torch.bfloat16, device=DEVICE)[:, 5:138]
    odd.copy_(rows)
    assert {row.data_ptr() % 16 for row in odd} == set(range(0, 16, 2))
    check(odd, top_k=3)


@pytest.mark.parametrize(
    "filters", [{"top_k": 2}, {"top_p": 0.05}, {"min_p": 0.7}, {"top_k": 9, "top_p": 0.2}], ids=str
)
def test_a_rejected_token_is_drawn_again_above_it(filters):
    logits = make_logits(1, WORDS * FINISH_LANES * 4 + 300).to(DEVICE) / 3  # flat: the first draw is outside
    assert check(logits, **filters) != check(logits)


# The winner far above all others, in the first and last word, on both sides of a tile, in another program's part.
@pytest.mark.parametrize("place", [0, 3, 4, TILE - 1, TILE, 2 * TILE + 77, 3 * TILE, VOCAB - 1])
def test_the_winner_is_found_wherever_it_is(place):
    logits = make_logits(1, VOCAB).to(DEVICE)
    logits[0, place] = 60.0
    assert check(logits, offset=place).tolist() == [place]


def test_ties_of_a_greedy_row_go_to_the_lowest_token():
    logits = torch.full((3, VOCAB), -2.0, dtype=torch.bfloat16, device=DEVICE)
    for row, places in enumerate(([17, 18, 3 * TILE], [2 * TILE + 8, TILE + 9, VOCAB - 1], [900, 20, 7])):
        logits[row, places] = 5.0
    assert check(logits, temperature=0.0).tolist() == [17, TILE + 9, 7]


def test_masked_and_far_logits_are_no_trouble():
    logits = make_logits(4, VOCAB).to(DEVICE)
    logits[0, : 2 * TILE] = -torch.inf
    logits[1, 5:] = torch.finfo(torch.float32).min
    logits[2] += 1e4
    logits[3, TILE:] -= 1e30
    check(logits, top_p=0.9)
    check(logits, temperature=0.3)


def test_a_parameter_out_of_range_is_seen_without_a_check_on_the_host():
    logits = make_logits(5, 40).to(DEVICE)
    one = torch.ones(5, dtype=torch.float64)
    temperature, top_p, min_p = one.clone(), one.clone(), one * 0.1
    top_k = torch.full((5,), 3)
    temperature[0], top_k[1], top_p[2], min_p[3] = torch.nan, 0, 1.5, -1.0
    args = (temperature, top_k, top_p, min_p, torch.arange(5), torch.arange(5))
    ours = sample_with_entropy(logits, *(x.to(DEVICE) for x in args))
    theirs = reference_sample(logits.cpu(), *args)
    for tokens, logprobs, entropy in (ours, theirs):
        assert (tokens[:4] == -1).all()
        assert tokens[4] >= 0
        assert logprobs[:4].isnan().all()
        assert entropy[:4].isnan().all()


def test_the_result_does_not_depend_on_the_number_of_programs(monkeypatch):
    logits = make_logits(2, VOCAB).to(DEVICE)
    tokens = []
    for split in ((1, 4), (2, 2), (4, 1)):
        monkeypatch.setattr(module, "row_programs", lambda *_, split=split: split)
        tokens.append(check(logits).tolist())
    assert tokens[0] == tokens[1] == tokens[2]
