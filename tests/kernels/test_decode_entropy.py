"""Claims about decode_entropy, for every backend and device:

as exact as logprobs_and_entropy, with one temperature per row; results land in their slots and nothing else is touched;
a row that nobody wants is not read; equal inputs give equal bits; what does not fit is an error that names it.
"""

import ctypes
import math
import mmap

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels import logprobs_and_entropy
from aepo_kernels.ops.decode_entropy import decode_entropy
from aepo_kernels.testing import (
    DTYPES,
    REGIMES,
    assert_within_budget,
    eager_token_stats,
    make_labels,
    make_logits,
)

STAGE = "decode_entropy"
ROWS = 5
TEMPERATURES = torch.tensor([0.3, 0.7, 1.0, 1.3, 2.5])


def served(backend, dtype):
    if backend in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip(f"{backend} has no float64 kernels")
    return dtype


def check(entropy, logprobs, logits, tokens, temperatures):
    """Against float64 of the stored logits, with eager float32 setting the budget; all but the results on the CPU."""
    z = logits.double() / temperatures.double()[:, None]
    truth = eager_token_stats(z, tokens, dtype=torch.float64)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    eager = eager_token_stats(logits.to(acc) / temperatures[:, None].to(acc), tokens)
    assert entropy.dtype == logprobs.dtype == acc
    log_vocab = math.log(logits.shape[-1]) + 1
    assert_within_budget("entropy", entropy, truth.entropy, eager.entropy, scale=log_vocab)
    assert_within_budget("logprobs", logprobs, truth.logprobs, eager.logprobs, scale=log_vocab)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_against_float64_truth(regime, dtype, backend, device):
    logits = make_logits(ROWS, 8191, regime, served(backend, dtype))
    tokens = make_labels(logits)
    results = decode_entropy(logits.to(device), TEMPERATURES.to(device), tokens=tokens.to(device), backend=backend)
    check(*results, logits, tokens, TEMPERATURES)


@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 257, 1024, 4097, 40_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_edge_of_the_vocabulary(vocab, dtype, backend, device):
    logits = make_logits(ROWS, vocab, "normal", dtype)
    tokens = make_labels(logits)
    padded = torch.full((ROWS, vocab + 4), torch.nan, dtype=dtype, device=device)  # rows anywhere in a word
    rows = padded[:, 3 : 3 + vocab]
    rows.copy_(logits)
    results = decode_entropy(rows, TEMPERATURES.to(device), tokens=tokens.to(device), backend=backend)
    check(*results, logits, tokens, TEMPERATURES)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_entropy_is_relatively_exact_from_1e_8_to_ln_v(shift, backend, device):
    vocab = 4099
    logits = (make_logits(16, vocab, "tiny_entropy") * 512).round() / 512  # so that adding 1e4 to it is exact
    logits = torch.cat((logits, torch.zeros(1, vocab))) + shift
    truth = eager_token_stats(logits, make_labels(logits), dtype=torch.float64).entropy
    assert truth.min() < 1e-7
    entropy = decode_entropy(logits.to(device), backend=backend)
    torch.testing.assert_close(entropy.double().cpu(), truth, rtol=1e-5, atol=0)


def test_an_undefined_row_is_nan_and_disturbs_no_other(backend, device):
    logits = make_logits(4, 5000)
    logits[0, 77] = torch.nan
    logits[1, 4999] = torch.inf
    logits[2] = -torch.inf
    tokens = torch.tensor([3, 3, 3, 3], device=device)
    entropy, logprobs = decode_entropy(logits.to(device), tokens=tokens, backend=backend)
    assert entropy.isnan().tolist() == logprobs.isnan().tolist() == [True, True, True, False]


def test_the_three_ways_to_give_a_temperature_agree(backend, device):
    logits = make_logits(ROWS, 3001).to(device)
    half = torch.full((ROWS,), 0.5, device=device)
    assert torch.equal(decode_entropy(logits, 0.5, backend=backend), decode_entropy(logits, half, backend=backend))
    one = decode_entropy(logits, backend=backend)
    assert torch.equal(one, decode_entropy(logits, half + 0.5, backend=backend))
    assert torch.equal(one, decode_entropy(logits, half.bfloat16() * 2, backend=backend))


def test_a_long_row_agrees_with_the_training_operation(backend, device):
    logits = make_logits(2, 151_936, dtype=torch.bfloat16).to(device)
    tokens = torch.tensor([5, 151_935], device=device)
    ours = decode_entropy(logits, 0.8, tokens=tokens, backend=backend)
    theirs = logprobs_and_entropy(logits, tokens, 0.8, backend="reference")
    torch.testing.assert_close(ours[0], theirs[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1], theirs[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("index", [torch.int32, torch.int64, torch.int16], ids=str)
def test_results_land_in_their_slots_and_nowhere_else(index, backend, device):
    logits = make_logits(ROWS, 3001)
    logits[1] = torch.nan  # untracked
    tokens = make_labels(logits.nan_to_num())
    ring = torch.full((9, 4), 42.0, device=device)  # a history of 4 steps per slot: out is a column of it
    logprobs_out = torch.full((9,), 43.0, device=device)
    slots = torch.tensor([[3, -1, 0, 8, 2], [-1] * 5], dtype=index).T[:, 0].to(device)
    results = decode_entropy(
        logits.to(device), TEMPERATURES.to(device), ring[:, 1], slots, tokens=tokens.to(device, index),
        logprobs_out=logprobs_out, backend=backend,
    )  # fmt: skip
    assert results[0].data_ptr() == ring[:, 1].data_ptr()
    assert results[1] is logprobs_out
    wanted = [0, 2, 3, 4]
    used = [3, 0, 8, 2]
    check(ring[used, 1], logprobs_out[used], logits[wanted], tokens[wanted], TEMPERATURES[wanted])
    unused = [1, 4, 5, 6, 7]
    assert ring[unused, 1].eq(42).all()
    assert ring[:, [0, 2, 3]].eq(42).all()
    assert logprobs_out[unused].eq(43).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_what_is_refused_on_the_cpu_does_no_harm_on_a_gpu(index, backend, device):
    # There values are not checked before the launch, so the stage is called without the checks here too.
    if backend == "cpu":
        pytest.skip("is always checked")
    stage = backends.stage(backend, STAGE)
    logits = make_logits(6, 5000).to(device)
    temperatures = torch.tensor([1.0, 0.0, -1.0, torch.nan, torch.inf, 1.0], device=device)
    tokens = torch.tensor([0, 0, 0, 0, 0, 5000], dtype=index, device=device)
    entropy, logprobs = torch.full((2, 6), 42.0, device=device).unbind()
    stage(logits, temperatures, 1.0, None, tokens, entropy, logprobs)
    assert entropy.isnan().tolist() == [False, True, True, True, True, False]
    assert logprobs.isnan().tolist() == [False, True, True, True, True, True]
    guarded = torch.full((12,), 42.0, device=device)
    slots = torch.tensor([6, 2**31 - 1, -1, 3, -(2**31), 5], dtype=index, device=device)
    stage(logits, None, 1.0, slots, None, guarded[:6], None)
    assert guarded.ne(42).nonzero()[:, 0].tolist() == [3, 5]


def test_without_slots_a_row_has_its_own_place(backend, device):
    logits = make_logits(ROWS, 100).to(device)
    out = torch.full((8,), 42.0, device=device)
    assert decode_entropy(logits, None, out, backend=backend) is out
    assert torch.equal(out[:ROWS], decode_entropy(logits, backend=backend))
    assert out[ROWS:].eq(42).all()


def test_no_rows(backend, device):
    logits = torch.empty(0, 10, device=device)
    assert decode_entropy(logits, backend=backend).shape == (0,)
    out = torch.ones(3, device=device)
    decode_entropy(logits, None, out, torch.empty(0, dtype=torch.int32, device=device), backend=backend)
    assert out.eq(1).all()


def test_a_row_that_nobody_wants_is_not_read(backend):
    vocab = 2 * mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * vocab * 4)
    logits = torch.frombuffer(memory, dtype=torch.float32).view(3, vocab)
    logits.copy_(make_logits(3, vocab))
    expected = decode_entropy(logits, backend=backend)
    libc = ctypes.CDLL(None, use_errno=True)
    second = ctypes.c_void_p(logits[1].data_ptr())
    assert libc.mprotect(second, ctypes.c_size_t(vocab * 4), 0) == 0  # a read of row 1 now kills the process
    out = torch.zeros(3)
    tokens = torch.tensor([1, 10**9, 1])
    decode_entropy(
        logits, None, out, torch.tensor([2, -1, 0]), tokens=tokens, logprobs_out=torch.zeros(3), backend=backend
    )
    libc.mprotect(second, ctypes.c_size_t(vocab * 4), mmap.PROT_READ | mmap.PROT_WRITE)
    assert out.tolist() == [expected[2], 0, expected[0]]


def test_offsets_have_64_bits(backend):
    # 2 rows that lie 2^31 + 8 elements apart in memory that exists only where it is touched.
    stride, vocab = 2**31 + 8, 1000
    memory = mmap.mmap(-1, (stride + vocab) * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rows = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, vocab), (stride, 1))
    logits = make_logits(2, vocab, dtype=torch.bfloat16)
    rows.copy_(logits)
    tokens = torch.tensor([7, 8])
    check(*decode_entropy(rows, tokens=tokens, backend=backend), logits, tokens, torch.ones(2))


def test_equal_inputs_give_equal_bits(backend, device):
    logits = make_logits(3, 20_000, dtype=torch.bfloat16).to(device)
    first = decode_entropy(logits, 0.9, backend=backend)
    for _ in range(3):
        assert torch.equal(first, decode_entropy(logits, 0.9, backend=backend))


def test_a_row_has_the_same_bits_in_any_batch_on_the_cpu():
    logits = make_logits(3, 40_000)
    together = decode_entropy(logits, TEMPERATURES[:3])
    alone = [decode_entropy(logits[i : i + 1], TEMPERATURES[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
