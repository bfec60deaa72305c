"""Claims about the sampler on every backend: its random numbers are Philox4x32-10 by (seed, offset, token); it draws
the best score among the tokens that an independent oracle keeps; what else is in the batch does not matter."""

import math

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels import logprobs_and_entropy, sample_with_entropy
from aepo_kernels.reference.sample_with_entropy import gumbel_noise, philox
from aepo_kernels.testing import REGIMES, assert_within_budget, eager_token_stats, make_logits

STAGE = "sample_with_entropy"
FILTERS = {
    "none": {},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 6, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
}


def oracle_kept(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """[V] bool by comparing every pair of logits, in float64: another way than the reference's sort."""
    p = torch.softmax(row.double() / temperature, -1)
    above = row[None, :] > row[:, None]
    kept = p > 0
    if top_k is not None:
        kept &= above.sum(-1) < top_k
    if top_p is not None:
        kept &= (above * p).sum(-1) < top_p
    if min_p is not None:
        kept &= p >= min_p * p.max()
    return kept


def oracle_words(seed, offset, count):
    """The first words of the generator, from its definition (Salmon et al. 2011) in Python's integers."""
    words = []
    for block in range((count + 3) // 4):
        c = [block, offset % 2**32, (offset >> 32) % 2**32, 0]
        k = [seed % 2**32, (seed >> 32) % 2**32]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        words += c
    return words[:count]


# The vectors that the generator's authors publish with their code (Random123, kat_vectors).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_gives_its_published_words(counter, key, words):
    assert [int(w) for w in philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))] == words


SEEDS = [0, 1, -1, 2**32, 2**40 + 7, -(2**63), 2**63 - 1]
OFFSETS = [0, 5, 2**32, -3, 2**33 + 1, 2**63 - 1, 1]


def test_among_equal_logits_the_smallest_word_wins(backend, device):
    words = [oracle_words(seed, offset, 37) for seed, offset in zip(SEEDS, OFFSETS, strict=True)]
    logits = torch.full((len(SEEDS), 37), -3.5, device=device)
    seed, offset = torch.tensor(SEEDS, device=device), torch.tensor(OFFSETS, device=device)
    got = sample_with_entropy(logits, seed=seed, offset=offset, backend=backend).tokens
    assert got.tolist() == [row.index(min(row)) for row in words]
    v = (torch.tensor(words[4]).double() + 0.5) / 2**32
    noise = gumbel_noise(torch.tensor([SEEDS[4]]), torch.tensor([OFFSETS[4]]), 37)[0]
    torch.testing.assert_close(noise, -(-(1 - v).log()).log(), rtol=1e-6, atol=1e-6)  # 1 - v loses digits of v


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_best_score_of_the_kept_tokens_is_drawn(filters, dtype, backend, device):
    if reason := backends.unserved(backend, torch.empty(0, dtype=dtype, device=device), STAGE):
        pytest.skip(reason)
    rows = 4 if backend == "triton" else 40
    settings = FILTERS[filters]
    logits = make_logits(rows, 203, dtype=dtype)
    seed = torch.arange(rows)
    score = logits.double() / settings.get("temperature", 1.0) + gumbel_noise(seed, torch.full((rows,), 9), 203)
    kept = torch.stack([oracle_kept(row, **settings) for row in logits])
    expected = score.masked_fill(~kept, -torch.inf).argmax(-1)
    got = sample_with_entropy(logits.to(device), seed=seed.to(device), offset=9, backend=backend, **settings)
    assert got.tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("regime", REGIMES)
def test_statistics_are_those_before_truncation(regime, backend, device):
    rows = 2 if backend == "triton" else 20
    logits = make_logits(rows, 211, regime)
    temperature = torch.linspace(0.6, 1.5, rows)
    ours = sample_with_entropy(
        logits.to(device), temperature=temperature.to(device), top_k=5, seed=3, offset=1, backend=backend
    )
    tokens = ours.tokens.cpu()
    for i in range(rows):
        args = (logits[i : i + 1], tokens[i : i + 1], float(temperature[i]))
        truth, eager = eager_token_stats(*args, dtype=torch.float64), eager_token_stats(*args)
        log_vocab = math.log(211) + 1  # as in test_token_stats.py
        assert_within_budget("logprob", ours.logprobs[i : i + 1], truth.logprobs, eager.logprobs, scale=log_vocab)
        assert_within_budget("entropy", ours.entropy[i : i + 1], truth.entropy, eager.entropy, scale=log_vocab)
        same = logprobs_and_entropy(args[0].to(device), ours.tokens[i : i + 1], args[2], backend=backend)
        torch.testing.assert_close((ours.logprobs[i], ours.entropy[i]), (same[0][0], same[1][0]), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("filters", FILTERS)
def test_frequencies_are_the_truncated_probabilities(filters):
    # On the fastest backend: the others draw the same tokens, as the test above says. The seed is fixed, so this passes
    # or fails always.
    draws, settings = 40_000, FILTERS[filters]
    row = make_logits(1, 23, seed=5)[0] / 2
    row[:2] = torch.tensor([1.7, 1.7])
    row[2] = -torch.inf
    tokens = sample_with_entropy(row.expand(draws, -1), seed=11, offset=torch.arange(draws), **settings).tokens
    p = torch.softmax(row.double() / settings.get("temperature", 1.0), -1) * oracle_kept(row, **settings)
    expected = draws * p / p.sum()
    counts = tokens.bincount(minlength=23)
    assert (counts[expected == 0] == 0).all()
    common = expected > 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = int(common.sum()) - 1
    assert degrees >= 2
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5  # its mean and four of its standard deviations


def test_equal_logits_share_their_fate(backend, device):
    # The third largest value comes twice. top_k = 3 keeps both, and so does top_p, whose bound falls between them.
    draws = 9 if backend == "triton" else 100
    row = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.5, -1.0], device=device)
    p = torch.softmax(row, -1)
    between = float(p[1] + p[4] + 0.5 * p[2])
    for settings in ({"top_k": 3}, {"top_p": between}, {"min_p": float(p[2] / p[1]) * 0.999}):
        tokens = sample_with_entropy(
            row.expand(draws, -1), seed=2, offset=torch.arange(draws, device=device), backend=backend, **settings
        ).tokens.tolist()
        assert set(tokens) == {1, 2, 3, 4}


def test_temperature_zero_is_the_first_of_the_largest(backend, device):
    logits = make_logits(4, 300, "ties", torch.bfloat16).to(device)
    temperature = torch.tensor([0.0, 0.0, 1.0, 0.0], device=device)
    seed = torch.arange(4, device=device)
    ours = sample_with_entropy(logits, temperature=temperature, seed=seed, top_p=0.5, backend=backend)
    at_one = sample_with_entropy(logits, seed=seed, top_p=0.5, backend=backend)
    first = logits.float().argmax(-1)
    assert ours.tokens[[0, 1, 3]].tolist() == first[[0, 1, 3]].tolist()
    assert ours.tokens[2] == at_one.tokens[2] != first[2]
    assert torch.equal(ours.entropy, at_one.entropy)


def test_an_undefined_row_disturbs_no_other(backend, device):
    logits = make_logits(5, 50).to(device)
    settings = {"top_k": 4, "top_p": 0.9, "seed": torch.arange(5, device=device), "backend": backend}
    healthy = sample_with_entropy(logits, **settings)
    logits[1, 7], logits[2, 49], logits[3] = torch.nan, torch.inf, -torch.inf
    ours = sample_with_entropy(logits, **settings)
    assert ours.tokens[1:4].tolist() == [-1, -1, -1]
    assert ours.logprobs[1:4].isnan().all()
    assert ours.entropy[1:4].isnan().all()
    for one, other in zip(ours, healthy, strict=True):
        assert torch.equal(one[[0, 4]], other[[0, 4]])


def test_a_row_is_drawn_alike_alone_in_a_batch_and_through_a_view(backend, device):
    padded = make_logits(5, 140, dtype=torch.bfloat16).to(device)
    view = padded[:, 3:133]
    settings = {"top_p": 0.95, "backend": backend}
    seed = torch.arange(5, device=device)
    whole = sample_with_entropy(view.clone(), seed=seed, offset=4, **settings)
    through_view = sample_with_entropy(view, seed=seed, offset=4, **settings)
    assert torch.equal(whole.tokens, through_view.tokens)
    torch.testing.assert_close(whole.entropy, through_view.entropy, rtol=1e-6, atol=1e-6)
    for i in (0, 3):
        alone = sample_with_entropy(view[i : i + 1].clone(), seed=i, offset=4, **settings)
        assert alone.tokens[0] == whole.tokens[i]
    again = sample_with_entropy(view, seed=seed, offset=4, **settings)
    for one, two in zip(through_view, again, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("top_k", [1, 2**40])
def test_extreme_filters(top_k, backend, device):
    logits = make_logits(3, 60).to(device)
    ours = sample_with_entropy(logits, seed=1, top_k=top_k, top_p=1.0, min_p=0.0, backend=backend).tokens
    expected = logits.argmax(-1) if top_k == 1 else sample_with_entropy(logits, seed=1, backend=backend).tokens
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-3, 1e3, 1e30, 1e300])
@pytest.mark.parametrize("shift", [0.0, 1e4, -3e38])
def test_extreme_temperatures_and_offsets(temperature, shift, backend, device):
    logits = make_logits(2, 70) + shift
    seed = torch.arange(2)
    score = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature + gumbel_noise(seed, seed, 70)
    ours = sample_with_entropy(
        logits.to(device), temperature=temperature, min_p=0.0, seed=seed.to(device), offset=seed.to(device),
        backend=backend,
    )  # fmt: skip
    assert ours.tokens.tolist() == score.argmax(-1).tolist()
    assert ours.entropy.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.02}, {"min_p": 0.6}, {"temperature": 0.0}], ids=str)
def test_long_rows_whose_candidates_are_far_apart(settings, backend, device):
    # Three segments of the C++ kernels, or three tiles of Triton's; flat, so that filters reject the first draws.
    vocab = 2 * 2048 + 77 if (backend, device) == ("triton", "cpu") else 2 * 32768 + 77
    logits = make_logits(2, vocab, seed=3) / 3
    logits[:, vocab // 2] = logits[:, -1] = logits.max()
    seed = torch.arange(len(logits))
    ours = sample_with_entropy(logits.to(device), seed=seed.to(device), offset=1, backend=backend, **settings)
    theirs = sample_with_entropy(logits, seed=seed, offset=1, backend="reference", **settings)
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    # Sums of 65,613 nearly equal float32 terms (docs/kernels.md: 5e-6 where all roundings go the same way).
    torch.testing.assert_close(ours.entropy.cpu(), theirs.entropy, rtol=5e-6, atol=5e-6)


def test_an_empty_batch(backend, device):
    ours = sample_with_entropy(torch.zeros(0, 9, device=device), seed=0, top_k=2, backend=backend)
    assert [x.shape for x in ours] == [(0,)] * 3
    assert ours.tokens.dtype == torch.int64
