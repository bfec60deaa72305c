"""Claims about the native row kernels (token_stats, logits_grad) that follow from how they cut a row:

every vector, chunk and segment boundary is right in every dtype; a row has the same bits alone or in a batch, on any
number of threads, aligned or not; offsets are 64 bits wide; 16-bit logits are read exactly and gradients rounded once.
"""

import math

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels.testing import DTYPES, assert_within_budget, eager_token_stats, make_labels, make_logits

pytestmark = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the extension is not built")
native = torch.ops.aepo_native
IGNORE = -100
SEGMENT = 32768  # csrc/include/row_kernels.h


def token_stats(logits, labels):
    return native.token_stats(logits, labels, 0.7, IGNORE, False)


def forward_backward(logits, labels):
    """logprobs, entropy and the gradient of sum(logprobs) + 0.3 * sum(entropy)."""
    logprobs, entropy, maximum, log_sum = token_stats(logits, labels)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grads = torch.ones_like(entropy), torch.full_like(entropy, 0.3)
    native.logits_grad(logits, labels, maximum, log_sum, entropy, *grads, 0.7, IGNORE, gradient)
    return logprobs, entropy, gradient


def check_against_truth(logits, labels):
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    grads = torch.ones(len(logits), dtype=acc), torch.full((len(logits),), 0.3, dtype=acc)
    truth = eager_token_stats(logits, labels, 0.7, *grads, dtype=torch.float64)
    eager = eager_token_stats(logits, labels, 0.7, *grads)
    log_vocab = math.log(logits.shape[-1]) + 1
    for name, scale, actual in zip(
        truth._fields, (log_vocab, log_vocab, 2 * log_vocab), forward_backward(logits, labels), strict=True
    ):
        assert_within_budget(name, actual, getattr(truth, name), getattr(eager, name), scale=scale)


# Lanes are 4, 8 or 16 wide, loads take two of them, chunks eight; a segment is 32768 logits.
EDGES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 257, 1009, SEGMENT - 1, SEGMENT, SEGMENT + 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", EDGES)
def test_every_edge(vocab, dtype):
    logits = make_logits(3, vocab, "normal", dtype, seed=vocab)
    labels = make_labels(logits)
    labels[-1] = vocab - 1
    check_against_truth(logits, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("regime", ["peaked", "minus_inf", "ascending", "ties", "flat"])
def test_segments_merge(regime, dtype):
    logits = make_logits(3, 3 * SEGMENT + 77, regime, dtype)
    check_against_truth(logits, make_labels(logits))


@pytest.mark.parametrize("at", [0, 5, SEGMENT, SEGMENT + 100, 2 * SEGMENT + 12])  # a chunk, a tail, of each segment
@pytest.mark.parametrize(("value", "everywhere"), [(math.nan, 1.0), (math.inf, 1.0), (math.nan, -math.inf)])
def test_one_bad_logit_makes_its_row_nan_and_no_other(value, everywhere, at):
    logits = torch.full((3, 2 * SEGMENT + 13), everywhere)
    logits[1, at] = value
    logits[::2] = 0.5
    labels = torch.tensor([0, 1, IGNORE])
    for stat in token_stats(logits, labels):
        assert stat[1].isnan()
        assert stat[[0, 2]].isfinite().all()


def test_the_maximum_is_an_exact_copy_of_every_16_bit_number():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        logits = bits.view(dtype)[:, None]
        maximum = token_stats(logits, None)[2]
        assert torch.equal(maximum.isnan(), logits[:, 0].isnan() | logits[:, 0].isposinf())
        number = ~maximum.isnan()
        assert torch.equal(maximum[number], logits[number, 0].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_once_to_nearest_even(dtype):
    # The kernels compute in float32 whatever the storage: the same logits stored as float32 show what gets rounded.
    # Coefficients from 1e-9 to 1e9 take the results through the subnormals of float16 and past its maximum.
    logits = make_logits(64, 1037, "normal", dtype)
    labels = make_labels(logits)
    _, entropy, maximum, log_sum = token_stats(logits, labels)
    coefficients = torch.logspace(-9, 9, 64)
    gradients = []
    for x in (logits, logits.float()):
        out = torch.empty_like(x)
        native.logits_grad(x, labels, maximum, log_sum, entropy, coefficients, None, 0.7, IGNORE, out)
        gradients.append(out)
    assert gradients[1].abs().max() > 1e8
    assert torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_are_rounded_to_even(dtype):
    # With log p = 0 the gradient of any logit but the label's is -grad_logprob: float32 numbers half way between two of
    # the storage type, one unit beside that, and at the ends of each kind (zero, subnormal, normal, infinite).
    lost = 16 if dtype == torch.bfloat16 else 13
    kept = torch.arange(0x7F80 << (16 - lost), dtype=torch.int64)[:: 37 << (16 - lost)]
    kept = torch.cat([kept, kept + 1])[:, None]
    bits = (kept << lost) + (1 << (lost - 1)) + torch.tensor([-(1 << (lost - 1)), -1, 0, 1])
    coefficients = bits.flatten().to(torch.int32).view(torch.float32)
    coefficients = torch.cat([coefficients, -coefficients])
    coefficients = coefficients[coefficients != 0]  # a row of coefficient 0 is not computed
    if dtype == torch.float16:
        coefficients = coefficients[coefficients.abs() < 1e5]
    rows = len(coefficients)
    logits, zeros = torch.zeros(rows, 70, dtype=dtype), torch.zeros(rows)
    labels = torch.zeros(rows, dtype=torch.int64)
    native.logits_grad(logits, labels, zeros, zeros, zeros, coefficients, None, 1.0, IGNORE, logits)
    expected = -coefficients[:, None].to(dtype)
    assert expected.isfinite().any()
    assert torch.equal(logits[:, 1:], expected.expand(-1, 69))


@pytest.mark.parametrize("temperature", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_finite_logits_at_any_temperature(dtype, temperature):
    # The ends of the type beside each other, in one segment and in several; nothing overflows into 0 * inf.
    largest = torch.finfo(dtype).max
    logits = make_logits(4, 2 * SEGMENT + 13, "normal", dtype)
    logits[0, 7], logits[0, SEGMENT:] = largest, -largest
    logits[1, :SEGMENT], logits[1, -1] = -largest, largest
    logits[2, ::3], logits[2, SEGMENT] = -math.inf, -largest
    logits[3] = -largest
    logits[3, SEGMENT + 1 : 2 * SEGMENT] = -math.inf
    labels = logits.argmax(-1)
    logprobs, entropy, maximum, log_sum = native.token_stats(logits, labels, temperature, IGNORE, False)
    # Halves, because the difference of two ends is no float64.
    x = logits.double() / 2
    d = (x - x.amax(-1, keepdim=True)) / (temperature / 2)
    truth = d.exp().sum(-1).log()
    torch.testing.assert_close(log_sum.double(), truth, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(logprobs.double(), -truth, rtol=1e-5, atol=5e-6)
    assert torch.equal(maximum, logits.amax(-1).to(maximum.dtype))
    p = d.softmax(-1)
    expected = truth - (p * d.masked_fill(p == 0, 0)).sum(-1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6)
    # Coefficients of the size of the temperature make gradients of the size of 1.
    size = torch.full_like(entropy, temperature)
    gradient = torch.empty_like(logits)
    native.logits_grad(logits, labels, maximum, log_sum, entropy, size, size, temperature, IGNORE, gradient)
    log_p = (d - truth[:, None]).masked_fill(p == 0, 0)
    expected = -p - p * (log_p + expected[:, None])
    expected[range(4), labels] += 1
    # One rounding, after the errors of float32 (15 is about the largest |log p + H|); float16 has steps of 6e-8 near 0.
    torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 15e-6, atol=1e-7)
    assert gradient[p == 0].eq(0).all()


@pytest.mark.parametrize(("temperature", "log_sum"), [(1e-300, 0.0), (1e300, math.log(500))])
def test_a_temperature_beyond_float32_is_its_limit(temperature, log_sum):
    logits = make_logits(2, 1000, "normal")
    logits[:, ::2] = -math.inf
    statistics = native.token_stats(logits, logits.argmax(-1), temperature, IGNORE, False)
    assert statistics[3].tolist() == pytest.approx([log_sum] * 2, rel=1e-6)
    assert statistics[1].tolist() == pytest.approx([log_sum] * 2, rel=1e-6)
    assert statistics[0].tolist() == pytest.approx([-log_sum] * 2, rel=1e-6)


def test_a_confident_label_keeps_the_digits_of_one_minus_p():
    logits = make_logits(32, 500, "tiny_entropy")
    labels = logits.argmax(-1)
    _, _, gradient = forward_backward(logits, labels)
    # Truth without the cancellation of 1 - p and of log p + H: with R and W the sum and the weighted sum over the other
    # logits, p = 1 / (1 + R), 1 - p = R / (1 + R) and log p + H = -W / (1 + R).
    d = (logits.double() - logits.double().gather(1, labels[:, None])) / 0.7
    rest, weighted = d.scatter(1, labels[:, None], -math.inf).exp().sum(-1), (d.exp() * d).sum(-1)
    truth = (rest / (1 + rest) + 0.3 * weighted / (1 + rest) ** 2) / 0.7
    assert truth.abs().min() < 1e-9
    torch.testing.assert_close(gradient.gather(1, labels[:, None])[:, 0].double(), truth, rtol=1e-5, atol=0)


def test_a_row_of_nearly_equal_logits_sums_to_1e_6():
    # The worst case for float32 sums: all terms alike, so all roundings may fall to the same side. 151936 is Qwen's V.
    for gap in (1e-3, 0.01, 0.1, 0.3, 0.7, 1.0):
        logits = torch.full((1, 151936), -gap)
        logits[0, 1000] = 0
        log_sum = native.token_stats(logits, None, 1.0, IGNORE, False)[3].item()
        assert log_sum == pytest.approx(math.log1p(151935 * math.exp(-logits[0, 0].double().neg().item())), abs=5e-6)


def test_bits_do_not_depend_on_threads_or_batch():
    logits = make_logits(5, 2 * SEGMENT + 5, "peaked", torch.bfloat16)
    labels = make_labels(logits)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(forward_backward(logits, labels))
    finally:
        torch.set_num_threads(threads)
    results.append(
        [
            torch.cat(parts)
            for parts in zip(*(forward_backward(logits[i : i + 1], labels[i : i + 1]) for i in range(5)), strict=True)
        ]
    )
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_alignment_or_row_stride(dtype):
    rows = make_logits(4, 1009, "normal", dtype)
    labels = make_labels(rows)
    expected = forward_backward(rows, labels)
    padded = torch.full((4, 1031), math.nan, dtype=dtype)  # NaN beside a row shows any read past its end
    for start in (0, 1, 3, 22):
        view = padded[:, start : start + 1009]
        view.copy_(rows)
        for ours, theirs in zip(forward_backward(view, labels), expected, strict=True):
            assert torch.equal(ours, theirs)
        # In place through the same view: equal gradients, and nothing beside them is written.
        _, entropy, maximum, log_sum = token_stats(view, labels)
        grads = torch.ones_like(entropy), torch.full_like(entropy, 0.3)
        native.logits_grad(view, labels, maximum, log_sum, entropy, *grads, 0.7, IGNORE, view)
        assert torch.equal(view, expected[2])
        assert padded[:, :start].isnan().all()
        assert padded[:, start + 1009 :].isnan().all()
        padded.fill_(math.nan)


def test_expanded_rows_are_read_but_never_written():
    row = make_logits(1, 300)
    expanded = row.expand(4, 300)
    labels = make_labels(row).expand(4).contiguous()
    for ours, alone in zip(forward_backward(expanded, labels), forward_backward(row, labels[:1]), strict=True):
        assert torch.equal(ours, alone.expand(ours.shape))
    stats = torch.zeros(4)
    with pytest.raises(RuntimeError, match="single memory location"):
        native.logits_grad(expanded, labels, stats, stats, stats, stats + 1, None, 1.0, IGNORE, expanded)
    x = torch.zeros(1300)
    shifted = x[:1200].view(4, 300), x[1:1201].view(4, 300)
    with pytest.raises(RuntimeError, match="single memory location"):
        native.logits_grad(shifted[0], labels, stats, stats, stats, stats + 1, None, 1.0, IGNORE, shifted[1])


def test_rows_without_a_gradient_become_0_unread():
    logits = torch.full((3, SEGMENT + 9), math.nan)
    logits[1] = 0
    labels = torch.tensor([IGNORE, 4, 4])
    _, entropy, maximum, log_sum = token_stats(logits, labels)
    out = torch.full_like(logits, 7)
    native.logits_grad(
        logits, labels, maximum, log_sum, entropy, torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3), 1.0, IGNORE, out
    )
    assert out[[0, 2]].eq(0).all()
    assert out[1].isfinite().all()
    assert out[1, 4] > 0.9
    native.logits_grad(
        logits, labels, maximum, log_sum, entropy, torch.tensor([0.0, math.nan, 0.0]), None, 1.0, IGNORE, out
    )
    assert out[1].isnan().all()


@pytest.mark.parametrize("labels", [[-1, 50], [2**40, -(2**63)]])
def test_a_label_out_of_range_is_nan_and_reads_nothing(labels):
    logits = make_logits(2, 50)
    labels = torch.tensor(labels)
    logprobs, entropy, maximum, log_sum = token_stats(logits, labels)
    assert logprobs.isnan().all()
    assert entropy.isfinite().all()
    out = torch.empty_like(logits)
    native.logits_grad(logits, labels, maximum, log_sum, entropy, torch.ones(2), None, 0.7, IGNORE, out)
    torch.testing.assert_close(out.double(), -torch.softmax(logits.double() / 0.7, -1) / 0.7, rtol=1e-5, atol=1e-7)


def test_bad_input_is_named():
    x = torch.zeros(2, 10)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        token_stats(x.t().contiguous().t(), None)
    with pytest.raises(TypeError, match=r"bfloat16, float16, float32 or float64; got Int"):
        token_stats(x.int(), None)
    with pytest.raises(ValueError, match=r"labels must be contiguous Long .* 2 elements"):
        token_stats(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[T, V\]"):
        token_stats(x[0], None)
    stats = torch.zeros(2)
    with pytest.raises(ValueError, match="out must be like the logits"):
        native.logits_grad(x, None, stats, stats, stats, None, stats, 1.0, IGNORE, x.bfloat16())
    with pytest.raises(ValueError, match="needs labels"):
        native.logits_grad(x, None, stats, stats, stats, stats, None, 1.0, IGNORE, x)
    with pytest.raises(ValueError, match="maximum must be contiguous Float"):
        native.logits_grad(x, None, stats.double(), stats, stats, None, stats, 1.0, IGNORE, x)
