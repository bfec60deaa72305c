"""Log-prob of a label, entropy and normaliser of every row of logits [T, V], from one read of the logits.

With x a row, d = (x - max x) / temperature and `rest` the sum of exp(d) over all entries but one maximum,

    log_sum = log1p(rest)      logprob(y) = d_y - log_sum      H = log_sum - sum exp(d) d / (1 + rest)

The loop is an online softmax whose state stays inside one lane (a thread): nothing is exchanged before the end, so it
has no barrier and costs about 9.4 instructions and 1.03 exponentials per bfloat16 logit on sm_90 (the textbook form,
which reduces every block, costs 17 and 9 barriers; see benchmarks/gpu_static_check.py).

`rest` must leave out the maximum's own 1, or a confident row loses its entropy (1 + 1e-9 == 1 in float32). A test per
logit would cost two instructions each. Instead a lane sums the tile that holds its maximum apart (`own`) from all its
other tiles (`others`), for 0.2 instructions per logit, and when the row's maximum is known that one tile of that one
lane, 32 logits, is read again without it.
"""

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
    MAX_PROGRAMS_PER_ROW,
    aligned_row,
    row_programs,
    tile_ranges,
)

# 4 independent 16-byte loads per thread and 9 resident programs keep 72 KiB in flight per multiprocessor; HBM needs
# about 25 (H100: 3.35 TB/s x 1 us / 132).
NUM_WARPS = 4
UNROLL = 4
LANES = 32 * NUM_WARPS

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32: no logit but -inf is below it


@triton.jit
def _absorb(maximum, others, own, own_tile, weighted, x, tile, scale):
    """Take one tile x [UNROLL, LANES, VEC] into the state of each lane.

    Per lane, relative to its `maximum` and in units of log2: `own` and `others` sum exp(d) over the newest tile that
    reached the maximum (it starts at `own_tile`) and over all others, `weighted` sums exp(d) d over all.
    """
    tile_maximum = tl.max(tl.max(x, 2), 0)
    is_own = tile_maximum >= maximum  # False for a tile of -inf alone
    new_maximum = tl.maximum(maximum, tile_maximum)
    # d of the maximum is an exact 0. A NaN stays NaN (+inf becomes one), and with it this lane's sums.
    d = tl.maximum((x - new_maximum[None, :, None]) * scale, LOG2_ZERO, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d)
    tile_sum = tl.sum(tl.sum(e, 2), 0)
    shift = tl.maximum((maximum - new_maximum) * scale, LOG2_ZERO)
    decay = tl.exp2(shift)
    weighted = (weighted + shift * (others + own)) * decay + tl.sum(tl.sum(e * d, 2), 0)
    others = others * decay + tl.where(is_own, own * decay, tile_sum)
    own = tl.where(is_own, tile_sum, own)
    return new_maximum, others, own, tl.where(is_own, tile, own_tile), weighted


@triton.jit
def _rest_of(x, maximum, scale):
    """Sum of exp(d) over x without one occurrence of the maximum; -1 if there is none."""
    d = tl.maximum((x - maximum) * scale, LOG2_ZERO, propagate_nan=tl.PropagateNan.ALL)
    at_maximum = x == maximum
    smaller = tl.sum(tl.sum(tl.where(at_maximum, 0.0, tl.exp2(d)), 1), 0)
    return smaller + (tl.sum(tl.sum(at_maximum.to(tl.float32), 1), 0) - 1)


@triton.jit
def _merge(maximum, rest, weighted, scale):
    """The state (maximum, rest, weighted) of a whole from those of its parts [N]; the `rest` of an empty part is -1."""
    whole_maximum = tl.max(maximum, 0)
    holder = tl.argmax(maximum, 0) == tl.arange(0, maximum.shape[0])
    shift = tl.maximum((maximum - whole_maximum) * scale, LOG2_ZERO)
    decay = tl.exp2(shift)
    part_sum = 1 + rest
    whole_rest = tl.sum(tl.where(holder, rest, part_sum * decay), 0)
    return whole_maximum, whole_rest, tl.sum((weighted + shift * part_sum) * decay, 0)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to 4e-7 relative, however small x is (the hardware logarithm is good to 2e-7 absolute)."""
    r = x / (2 + x)
    r2 = r * r
    series = 2 * r * (1 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7 + r2 / 9))))  # 2 atanh(r); next term < 1e-8
    return tl.where(x < 0.5, series, tl.log(1 + x))


@triton.jit
def _store_row(
    row, maximum, rest, weighted, logits_ptr, labels_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr,
    stride, vocab, inv_temperature, ignore_index, skip_ignored,
):  # fmt: skip
    """Write the row's results from its state."""
    nan = float("nan")
    # NaN in the row makes both sums NaN, +inf makes `weighted` NaN, no finite logit leaves rest = -1.
    defined = (rest >= 0) & (weighted <= 0)
    maximum = tl.where(defined, maximum, nan)
    log_sum = _log1p(tl.where(defined, rest, nan))
    entropy = log_sum - weighted * LN2 / (1 + rest)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        ignored = label == ignore_index
        inside = (label >= 0) & (label < vocab) & (not ignored)
        x = tl.load(logits_ptr + row.to(tl.int64) * stride + label, mask=inside, other=nan).to(tl.float32)
        logprob = (x - maximum) * inv_temperature - log_sum
        skipped = ignored & (skip_ignored != 0)
        tl.store(logprobs_ptr + row, tl.where(ignored & (defined | skipped), 0.0, logprob))
        maximum = tl.where(skipped, 0.0, maximum)
        log_sum = tl.where(skipped, 0.0, log_sum)
        entropy = tl.where(skipped, 0.0, entropy)
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=["stride", "vocab", "tiles_per_program", "ignore_index", "skip_ignored"])
def token_stats_kernel(
    logits_ptr,  # (T, V), 16-bit or float32
    labels_ptr,  # (T,) int64, or None
    logprobs_ptr,  # (T,)
    entropy_ptr,  # (T,)
    maximum_ptr,  # (T,)
    log_sum_ptr,  # (T,)
    partials_ptr,  # (T, programs, 3): the states of a split row, or None
    stride,
    vocab,
    tiles_per_program,
    inv_temperature,
    ignore_index,
    skip_ignored,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (row, part): the state of one part of one row; its results, if the row is not split."""
    TILE: tl.constexpr = UNROLL * LANES * VEC
    row, part = tl.program_id(0), tl.program_id(1)
    x_ptr, head = aligned_row(logits_ptr, row, stride, VEC)
    tile_0 = part * tiles_per_program * TILE
    begin = tl.maximum(head, tile_0)
    end = tl.minimum(head + vocab, tile_0 + tiles_per_program * TILE)
    if labels_ptr is not None:
        skipped = (tl.load(labels_ptr + row) == ignore_index) & (skip_ignored != 0)
        end = tl.where(skipped, begin, end)  # nothing to read
    edge_first, edge_step, whole_first, whole_end = tile_ranges(tile_0, begin, end, TILE)

    scale = inv_temperature * LOG2E
    lane = tl.arange(0, LANES)
    in_lane = tl.arange(0, UNROLL)[:, None] * (LANES * VEC) + tl.arange(0, VEC)[None, :]
    in_tile = in_lane[:, None, :] + lane[None, :, None] * VEC
    maximum = tl.full((LANES,), LOWEST, tl.float32)
    others = tl.zeros((LANES,), tl.float32)
    own = tl.zeros((LANES,), tl.float32)
    own_tile = tl.zeros((LANES,), tl.int32)
    weighted = tl.zeros((LANES,), tl.float32)
    for tile in range(edge_first, end, edge_step):
        at = tile + in_tile
        x = tl.load(x_ptr + at, mask=(at >= begin) & (at < end), other=-float("inf")).to(tl.float32)
        maximum, others, own, own_tile, weighted = _absorb(maximum, others, own, own_tile, weighted, x, tile, scale)
    for tile in range(whole_first, whole_end, TILE):
        x = tl.load(x_ptr + tile + in_tile).to(tl.float32)
        maximum, others, own, own_tile, weighted = _absorb(maximum, others, own, own_tile, weighted, x, tile, scale)

    # The lane that holds the row's maximum: its tile once more, now without the maximum itself.
    holder = tl.argmax(maximum, 0)
    at = tl.sum(tl.where(lane == holder, own_tile, 0), 0) + in_lane + holder * VEC
    x = tl.load(x_ptr + at, mask=(at >= begin) & (at < end), other=-float("inf")).to(tl.float32)
    exact = _rest_of(x, tl.max(maximum, 0), scale)
    rest = others + tl.where(lane == holder, exact, own - 1)
    row_max, rest, weighted = _merge(maximum, rest, weighted, scale)

    if partials_ptr is None:
        _store_row(
            row, row_max, rest, weighted, logits_ptr, labels_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr,
            stride, vocab, inv_temperature, ignore_index, skip_ignored,
        )  # fmt: skip
    else:
        partial_ptr = partials_ptr + (row.to(tl.int64) * tl.num_programs(1) + part) * 3
        tl.store(partial_ptr, row_max)
        tl.store(partial_ptr + 1, rest)
        tl.store(partial_ptr + 2, weighted)


@triton.jit(do_not_specialize=["stride", "vocab", "programs", "ignore_index", "skip_ignored"])
def merge_parts_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    maximum_ptr,
    log_sum_ptr,
    partials_ptr,
    stride,
    vocab,
    programs,
    inv_temperature,
    ignore_index,
    skip_ignored,
    MAX_PROGRAMS: tl.constexpr,
):
    """Program (row): the results of a split row from the states of its parts; arguments as in token_stats_kernel."""
    row = tl.program_id(0)
    part = tl.arange(0, MAX_PROGRAMS)
    partial_ptr = partials_ptr + (row.to(tl.int64) * programs + part) * 3
    exists = part < programs
    maximum = tl.load(partial_ptr, mask=exists, other=LOWEST)
    rest = tl.load(partial_ptr + 1, mask=exists, other=-1.0)
    weighted = tl.load(partial_ptr + 2, mask=exists, other=0.0)
    maximum, rest, weighted = _merge(maximum, rest, weighted, inv_temperature * LOG2E)
    _store_row(
        row, maximum, rest, weighted, logits_ptr, labels_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr,
        stride, vocab, inv_temperature, ignore_index, skip_ignored,
    )  # fmt: skip


def token_stats(
    logits: Tensor,  # [T, V] float16, bfloat16 or float32, contiguous rows at any stride
    labels: Tensor | None,  # [T] int64
    temperature: float,
    ignore_index: int,
    skip_ignored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, maximum, log_sum), each [T] float32; the meaning is that of reference.token_stats.

    Deterministic. The number of programs that share a row depends on T, V and the GPU, and with it the last bits.
    """
    rows, vocab = logits.shape
    logprobs = logits.new_empty(rows if labels is not None else 0, dtype=torch.float32)
    entropy, maximum, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    vec = ACCESS_BYTES // logits.element_size()
    programs, tiles_per_program = row_programs(logits, UNROLL * LANES * vec)
    partials = logits.new_empty(rows, programs, 3, dtype=torch.float32) if programs > 1 else None
    tensors = (logits, labels, logprobs, entropy, maximum, log_sum, partials, logits.stride(0), vocab)
    numbers = (1 / temperature, ignore_index, int(skip_ignored))
    with torch.cuda.device_of(logits):
        token_stats_kernel[(rows, programs)](
            *tensors, tiles_per_program, *numbers, VEC=vec, UNROLL=UNROLL, LANES=LANES, num_warps=NUM_WARPS
        )
        if partials is not None:
            merge_parts_kernel[(rows,)](
                *tensors, programs, *numbers, MAX_PROGRAMS=MAX_PROGRAMS_PER_ROW, num_warps=1
            )
    return logprobs, entropy, maximum, log_sum
