"""Gradient of per-token log-probs and entropies in the logits [T, V]: one read and one write, in place or not.

    log p_i = (x_i - maximum) / temperature - log_sum
    dx_i = ( g_lp (1[i = label] - p_i) - g_H p_i (log p_i + H) ) / temperature

With the per-row numbers k = -(g_lp + g_H H) / temperature and s = -g_H / temperature this is p_i (k + s log p_i), plus
g_lp / temperature at the label. A row that takes part in no loss (both coefficients 0) is not read, only zeroed.
"""

# mypy: allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aepo_kernels.kernels.common import (
    ACCESS_BYTES,
    LN2,
    LOG2_ZERO,
    LOG2E,
    aligned_row,
    cut_words,
    row_programs,
    same_alignment,
    tile_ranges,
    whole_words,
)

NUM_WARPS = 8
LANES = 32 * NUM_WARPS


@triton.jit
def _gradient(x, at, row, HAS_ENTROPY_GRAD: tl.constexpr):
    """The gradient at the positions `at`, whose logits are x, from the numbers of their row."""
    maximum, scale, log2_sum, constant, slope, label_at, label_grad = row
    log2_p = (x - maximum) * scale - log2_sum
    if HAS_ENTROPY_GRAD:
        log2_p = tl.maximum(log2_p, LOG2_ZERO, propagate_nan=tl.PropagateNan.ALL)
        grad = tl.exp2(log2_p) * (constant + slope * log2_p)
    else:
        grad = tl.exp2(log2_p) * constant
    return tl.where(at == label_at, grad + label_grad, grad)


@triton.jit
def write_row(
    x_ptr, dx_ptr, head, tile_0, begin, end, label, vocab_start, vocab, maximum, log_sum, entropy, label_grad,
    entropy_grad, inv_temperature, HAS_ENTROPY_GRAD: tl.constexpr, VEC: tl.constexpr, TILE: tl.constexpr,
    EVICTION: tl.constexpr,
):  # fmt: skip
    """Write the gradient at the positions [begin, end) of a row, whose logits start at x_ptr + head.

    The two coefficients, of log-prob and entropy, are already divided by the temperature. It goes from the end to the
    begin, so that behind a sweep in the other direction the caches have what comes first. EVICTION: how long they
    should keep it, as tl.load's eviction_policy.
    """
    first, last = whole_words(begin, end, VEC)
    edge_first, edge_step, whole_first, whole_end = tile_ranges(tile_0, first, last, TILE)
    here = (label >= vocab_start) & (label - vocab_start < vocab)
    label_at = tl.where(here, label - vocab_start + head, -1).to(tl.int32)
    # An unused row is not read: its "logits" are 0 and so are all its coefficients. NaN != 0, so NaN is never hidden.
    used = (label_grad != 0) | (entropy_grad != 0)
    log2_sum = tl.where(used, log_sum, 0.0) * LOG2E
    constant = tl.where(used, -label_grad - entropy_grad * entropy, 0.0)
    slope = -entropy_grad * LN2  # log p = log2 p * LN2
    maximum = tl.where(used, maximum, 0.0)
    numbers = (maximum, inv_temperature * LOG2E, log2_sum, constant, slope, label_at, label_grad)

    in_tile = tl.arange(0, TILE)
    used_tile = tl.broadcast_to(used.to(tl.int32), (TILE,)) != 0  # Triton 3.9's interpreter takes no scalar mask
    for tile in range(edge_first, last, edge_step):
        at = tile + in_tile
        whole = (at >= first) & (at < last)
        x = tl.load(x_ptr + at, mask=whole & used_tile, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        dx = _gradient(x, at, numbers, HAS_ENTROPY_GRAD)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=whole, eviction_policy=EVICTION)
    for tile in range(whole_end - TILE, whole_first - TILE, -TILE):
        at = tile + in_tile
        x = tl.load(x_ptr + at, mask=used_tile, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        dx = _gradient(x, at, numbers, HAS_ENTROPY_GRAD)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), eviction_policy=EVICTION)
    if (first > begin) | (last < end):
        at, inside = cut_words(begin, end, VEC)
        x = tl.load(x_ptr + at, mask=inside & (at < tl.where(used, end, begin)), other=0.0).to(tl.float32)
        dx = _gradient(x, at, numbers, HAS_ENTROPY_GRAD)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride", "out_stride", "vocab", "vocab_start", "tiles_per_program", "ignore_index"])
def logits_grad_kernel(
    logits_ptr,  # (T, V), 16-bit or float32
    labels_ptr,  # (T,) int64; read only with grad_logprobs_ptr
    maximum_ptr,  # (T,)
    log_sum_ptr,  # (T,)
    entropy_ptr,  # (T,)
    grad_logprobs_ptr,  # (T,) or None
    grad_entropy_ptr,  # (T,) or None
    out_ptr,  # (T, V), may be logits_ptr
    stride,
    out_stride,
    vocab,
    vocab_start,
    tiles_per_program,
    inv_temperature,
    ignore_index,
    SAME_ALIGNMENT: tl.constexpr,  # rows of out start as many bytes past a 16-byte boundary as those of logits
    VEC: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (row, part): the gradient of one part of one row."""
    TILE: tl.constexpr = LANES * VEC
    row, part = tl.program_id(0), tl.program_id(1)
    x_ptr, head = aligned_row(logits_ptr, row, stride, VEC)
    dx_ptr = out_ptr + row.to(tl.int64) * out_stride - head
    if SAME_ALIGNMENT:
        dx_ptr = tl.multiple_of(dx_ptr, 16)
    tile_0 = part * tiles_per_program * TILE
    begin = tl.maximum(head, tile_0)
    end = tl.minimum(head + vocab, tile_0 + tiles_per_program * TILE)

    label_grad = tl.full((), 0.0, tl.float32)
    label = tl.full((), -1, tl.int64)
    if grad_logprobs_ptr is not None:
        label = tl.load(labels_ptr + row)
        label_grad = tl.where(label == ignore_index, 0.0, tl.load(grad_logprobs_ptr + row) * inv_temperature)
    entropy_grad = tl.full((), 0.0, tl.float32)
    entropy = 0.0
    if grad_entropy_ptr is not None:
        entropy_grad = tl.load(grad_entropy_ptr + row) * inv_temperature
        entropy = tl.load(entropy_ptr + row)
    write_row(
        x_ptr, dx_ptr, head, tile_0, begin, end, label, vocab_start, vocab, tl.load(maximum_ptr + row),
        tl.load(log_sum_ptr + row), entropy, label_grad, entropy_grad, inv_temperature,
        grad_entropy_ptr is not None, VEC, TILE, "",
    )  # fmt: skip


def logits_grad(
    logits: Tensor,  # [T, V] float16, bfloat16 or float32, contiguous rows at any stride
    labels: Tensor | None,  # [T] int64, needed with grad_logprobs
    maximum: Tensor,  # [T] float32, like log_sum and entropy from token_stats
    log_sum: Tensor,  # [T] float32
    entropy: Tensor,  # [T] float32
    grad_logprobs: Tensor | None,  # [T] float32
    grad_entropy: Tensor | None,  # [T] float32
    temperature: float,
    ignore_index: int,
    out: Tensor,  # [T, V] float16, bfloat16 or float32, contiguous rows; may be `logits` itself
    vocab_start: int = 0,
) -> None:
    """Write the gradient into `out`; the meaning is that of reference.logits_grad. Deterministic, also across T.

    Loads are always 16 bytes wide. Stores carry as many elements, unless the rows of `out` lie differently on 16-byte
    boundaries than those of the logits (never in place): then they are as narrow as one element.
    """
    rows, vocab = logits.shape
    vec = ACCESS_BYTES // logits.element_size()
    programs, tiles_per_program = row_programs(logits, LANES * vec)
    with torch.cuda.device_of(logits):
        logits_grad_kernel[(rows, programs)](
            logits, labels, maximum, log_sum, entropy, grad_logprobs, grad_entropy, out,
            logits.stride(0), out.stride(0), vocab, vocab_start, tiles_per_program, 1 / temperature, ignore_index,
            SAME_ALIGNMENT=same_alignment(logits, out),
            VEC=vec, LANES=LANES, num_warps=NUM_WARPS,
        )  # fmt: skip
