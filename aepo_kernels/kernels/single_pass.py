"""The gradient of a whole policy loss in one visit to each row of logits: statistics, clip rule and gradient.

A row is read twice, and the second time from the cache: 4 bytes per 16-bit logit cross memory, where the two-pass form
(token_stats, policy_terms, logits_grad) moves 6. For that the rows in work must fit the second-level cache together.
One program keeps a row, and only so many programs run as find room: on an H100 one per multiprocessor, 132 rows of
151936 bfloat16 logits or 40 of its 50 MB. The program then has to bring all the threads that keep memory busy.

The functions are those of the other kernels, so the numbers are, too, up to the order of a row's sums. The second sweep
goes backwards: what was read last is found first, in the first-level cache even.
"""

# mypy: allow-incomplete-defs
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from aepo_kernels.kernels.common import ACCESS_BYTES, LOG2E, aligned_row, same_alignment
from aepo_kernels.kernels.logits_grad import write_row
from aepo_kernels.kernels.policy_terms import entropy_factor, token_terms
from aepo_kernels.kernels.token_stats import MAX_REGISTERS, WORDS, absorb_part, label_logit, merge_part, row_stats
from aepo_kernels.objective import ObjectiveNumbers

# 1024 threads of 64 registers are all the registers of a multiprocessor. They have 64 KiB in flight in the first sweep,
# as in token_stats, and 32 in the second, whose words come from the cache.
WARPS_PER_PROCESSOR = 32
MIN_WARPS = 4  # of a program
GRAD_WORDS = 2
CACHE_SHARE = 0.8  # of the second-level cache that rows may fill; the rest is for rows on their way back to memory


@triton.jit
def row_coefficients(
    row, logprob, entropy, old_logprobs_ptr, advantages_ptr, weight_ptr, counts_ptr, ref_logprobs_ptr,
    rollout_logprobs_ptr, entropy_stats_ptr, numbers,
):  # fmt: skip
    """(d loss/d logprob, d loss/d entropy) of one token in float32: policy_terms with one ratio per token."""
    weight = tl.load(weight_ptr + row).to(tl.float64)
    valid = weight != 0
    if counts_ptr is not None:
        valid = tl.load(counts_ptr + row) != 0
    logprob = logprob.to(tl.float64)
    old_logprob = tl.load(old_logprobs_ptr + row).to(tl.float64)
    factor = tl.full((), 1.0, tl.float64)
    if entropy_stats_ptr is not None:
        mean, std = tl.load(entropy_stats_ptr).to(tl.float64), tl.load(entropy_stats_ptr + 1).to(tl.float64)
        factor = entropy_factor(numbers, entropy.to(tl.float64), mean, std)
    ref_logprob = None
    if ref_logprobs_ptr is not None:
        ref_logprob = tl.load(ref_logprobs_ptr + row).to(tl.float64)
    rollout_logprob = None
    if rollout_logprobs_ptr is not None:
        rollout_logprob = tl.load(rollout_logprobs_ptr + row).to(tl.float64)
    _, grad, _, kl_slope, _, _, _ = token_terms(
        numbers, tl.exp(logprob - old_logprob), logprob, old_logprob, ref_logprob, rollout_logprob,
        tl.load(advantages_ptr + row).to(tl.float64), factor,
    )  # fmt: skip
    grad = weight * grad
    if numbers.kl_coef != 0:  # else a metric alone, which may be infinite
        grad += weight * numbers.kl_coef * kl_slope
    grad_entropy = -weight * numbers.entropy_bonus
    return tl.where(valid, grad, 0.0).to(tl.float32), tl.where(valid, grad_entropy, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["stride", "out_stride", "vocab", "ignore_index"])
def single_pass_kernel(
    logits_ptr,  # (T, V), 16-bit or float32
    labels_ptr,  # (T,) int64
    old_logprobs_ptr,  # (T,), like all the per-token tensors float32
    advantages_ptr,
    weight_ptr,
    counts_ptr,  # or None
    ref_logprobs_ptr,  # or None
    rollout_logprobs_ptr,  # or None
    entropy_stats_ptr,  # (2,), or None
    out_ptr,  # (T, V), may be logits_ptr
    logprobs_ptr,  # (T,)
    entropy_ptr,  # (T,)
    stride,
    out_stride,
    vocab,
    inv_temperature,
    ignore_index,
    numbers,
    HAS_ENTROPY_GRAD: tl.constexpr,
    SAME_ALIGNMENT: tl.constexpr,  # as in logits_grad_kernel
    VEC: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
    GRAD_WORDS: tl.constexpr,
):
    """Program (row): its log-prob, entropy and gradient."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    maximum = tl.full((), 0.0, tl.float32)
    log_sum = tl.full((), 0.0, tl.float32)
    entropy = tl.full((), 0.0, tl.float32)
    logprob = tl.full((), 0.0, tl.float32)
    label_grad = tl.full((), 0.0, tl.float32)
    entropy_grad = tl.full((), 0.0, tl.float32)
    if label != ignore_index:  # an ignored row is not read
        tiles = (vocab + VEC) // (WORDS * LANES * VEC) + 1
        scale = inv_temperature * LOG2E
        state, x_ptr, begin, end = absorb_part(
            logits_ptr, row, 0, stride, vocab, tiles, scale, VEC, WORDS, LANES, "evict_last"
        )
        label = tl.load(labels_ptr + row, volatile=True)  # again: the sweep needs all registers
        x = label_logit(logits_ptr, row, stride, label, 0, vocab, ignore_index)
        row_max, rest, weighted = merge_part(state, x_ptr, begin, end, scale, VEC, WORDS, LANES)
        maximum, log_sum, entropy = row_stats(row_max, rest, weighted)
        logprob = (x - maximum) * inv_temperature - log_sum
        label_grad, entropy_grad = row_coefficients(
            row, logprob, entropy, old_logprobs_ptr, advantages_ptr, weight_ptr, counts_ptr, ref_logprobs_ptr,
            rollout_logprobs_ptr, entropy_stats_ptr, numbers,
        )  # fmt: skip
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)

    x_ptr, head = aligned_row(logits_ptr, row, stride, VEC)
    dx_ptr = out_ptr + row.to(tl.int64) * out_stride - head
    if SAME_ALIGNMENT:
        dx_ptr = tl.multiple_of(dx_ptr, 16)
    tl.debug_barrier()  # every thread has read its logits, the label's too, before any is overwritten
    write_row(
        x_ptr, dx_ptr, head, 0, head, head + vocab, label, 0, vocab, maximum, log_sum, entropy,
        label_grad * inv_temperature, entropy_grad * inv_temperature, inv_temperature, HAS_ENTROPY_GRAD,
        VEC, GRAD_WORDS * LANES * VEC, "evict_first",
    )  # fmt: skip


@functools.cache
def processors_and_cache(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of second-level cache); the interpreter counts as one of an H100's multiprocessors."""
    if device.type != "cuda":
        return 1, (50 << 20) // 132
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def resident_programs(processors: int, cache_bytes: int, row_bytes: int) -> int:
    """Programs per multiprocessor: a power of two, as many as keep their rows in the cache together, at least one."""
    room = int(CACHE_SHARE * cache_bytes) // (processors * max(row_bytes, 1))
    return 1 << (min(max(room, 1), WARPS_PER_PROCESSOR // MIN_WARPS).bit_length() - 1)


def single_pass(
    logits: Tensor,  # [T, V] float16, bfloat16 or float32, contiguous rows at any stride
    labels: Tensor,  # [T] int64
    temperature: float,
    ignore_index: int,
    old_logprobs: Tensor,  # [T] float32, like all the per-token tensors
    advantages: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy_stats: Tensor | None,  # [2] float32
    numbers: ObjectiveNumbers,
    out: Tensor,  # [T, V] of the logits' dtype, contiguous rows; may be `logits` itself
) -> tuple[Tensor, Tensor]:
    """Write the gradient into `out`; return (logprobs, entropy), each [T] float32.

    The meaning of every argument and output is that of reference.single_pass. Deterministic, also across T.
    """
    rows, vocab = logits.shape
    logprobs, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows == 0:
        return logprobs, entropy
    processors, cache_bytes = processors_and_cache(logits.device)
    resident = resident_programs(processors, cache_bytes, vocab * logits.element_size())
    warps = WARPS_PER_PROCESSOR // resident
    with torch.cuda.device_of(logits):
        single_pass_kernel[(rows,)](
            logits, labels, old_logprobs, advantages, weight, counts, ref_logprobs, rollout_logprobs, entropy_stats,
            out, logprobs, entropy, logits.stride(0), out.stride(0), vocab, 1 / temperature, ignore_index,
            numbers, HAS_ENTROPY_GRAD=numbers.entropy_bonus != 0, SAME_ALIGNMENT=same_alignment(logits, out),
            VEC=ACCESS_BYTES // logits.element_size(), WORDS=WORDS, LANES=32 * warps, GRAD_WORDS=GRAD_WORDS,
            num_warps=warps, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return logprobs, entropy
