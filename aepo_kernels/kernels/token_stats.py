"""Log-prob of a label, entropy and normaliser of every row of logits [T, V], from one read of the logits.

With x a row, d = (x - max x) / temperature and `rest` the sum of exp(d) over all entries but one maximum,

    log_sum = log1p(rest)      logprob(y) = d_y - log_sum      H = log_sum - sum exp(d) d / (1 + rest)

The loop is an online softmax whose state stays inside one lane (a thread): nothing is exchanged before the end. It
takes 9.4 instructions and 1.03 exponentials per bfloat16 logit on sm_90 and no barrier (benchmarks/gpu_static_check.py;
a loop that reduces every block, the textbook form, compiled to 17 instructions and 9 barriers).

`rest` must leave out the maximum's own 1, or a confident row loses its entropy (1 + 1e-9 == 1 in float32). A test per
logit would cost two instructions each. Instead a lane sums the tile that holds its maximum apart (`own`) from all its
other tiles (`others`), for 0.2 instructions per logit, and when the row's maximum is known that one tile of that one
lane, 32 logits, is read again without it.
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
    MAX_PROGRAMS_PER_ROW,
    aligned_row,
    cut_words,
    row_programs,
    tile_ranges,
    whole_words,
)

# 4 independent 16-byte loads per thread and 8 resident programs (64 registers each) keep 64 KiB in flight in every
# multiprocessor; 3.35 TB/s of memory, 1 us away from 132 of them, asks for 25. Left alone, the compiler takes up to 72
# registers, which leaves 7 programs; at 56 Triton 3.9 spills on sm_100.
NUM_WARPS = 4
MAX_REGISTERS = 64
WORDS = 4
LANES = 32 * NUM_WARPS

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32: no logit but -inf is below it


@triton.jit
def load_inside(x_ptr, at, begin, end, EVICTION: tl.constexpr):
    """The logits at positions `at` in float32, -inf outside [begin, end).

    A select, because -inf as the load's own default for masked elements takes 24 registers more (80, not 56).
    """
    inside = (at >= begin) & (at < end)
    return tl.where(inside, tl.load(x_ptr + at, mask=inside, eviction_policy=EVICTION).to(tl.float32), -float("inf"))


@triton.jit
def _sums(x, maximum, scale):
    """Per lane, sum exp(d) and sum exp(d) d of x [LANES, VEC] about `maximum`, in units of log2.

    d of the maximum is an exact 0. A NaN stays NaN (and +inf becomes one), and with it this lane's sums.
    """
    d = tl.maximum((x - maximum[:, None]) * scale, LOG2_ZERO, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d)
    return tl.sum(e, 1), tl.sum(e * d, 1)


@triton.jit
def absorb(state, x0, x1, x2, x3, tile, scale):
    """The state of each lane after one tile, of which it holds the four words x_i [LANES, VEC].

    About the lane's `maximum` and in units of log2, `own` and `others` sum exp(d) over the newest tile that reached the
    maximum (it starts at `own_tile`) and over all other tiles; `weighted` sums exp(d) d over all of them.
    """
    maximum, others, own, own_tile, weighted = state
    tile_maximum = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), 1)
    is_own = tile_maximum >= maximum  # False for a tile of -inf alone
    new_maximum = tl.maximum(maximum, tile_maximum)
    sum0, weighted0 = _sums(x0, new_maximum, scale)
    sum1, weighted1 = _sums(x1, new_maximum, scale)
    sum2, weighted2 = _sums(x2, new_maximum, scale)
    sum3, weighted3 = _sums(x3, new_maximum, scale)
    tile_sum = (sum0 + sum1) + (sum2 + sum3)
    tile_weighted = (weighted0 + weighted1) + (weighted2 + weighted3)
    shift = tl.maximum((maximum - new_maximum) * scale, LOG2_ZERO)
    decay = tl.exp2(shift)
    weighted = (weighted + shift * (others + own)) * decay + tile_weighted
    others = others * decay + tl.where(is_own, own * decay, tile_sum)
    return new_maximum, others, tl.where(is_own, tile_sum, own), tl.where(is_own, tile, own_tile), weighted


@triton.jit
def _rest_of(x, maximum, scale):
    """Sum of exp(d) over x without one occurrence of the maximum; -1 if there is none."""
    d = tl.maximum((x - maximum) * scale, LOG2_ZERO, propagate_nan=tl.PropagateNan.ALL)
    at_maximum = x == maximum
    smaller = tl.sum(tl.sum(tl.where(at_maximum, 0.0, tl.exp2(d)), 1), 0)
    return smaller + (tl.sum(tl.sum(at_maximum.to(tl.float32), 1), 0) - 1)


@triton.jit
def merge(maximum, rest, weighted, scale):
    """The state (maximum, rest, weighted) of a whole from those of its parts [N]; the `rest` of an empty part is -1."""
    whole_maximum = tl.max(maximum, 0)
    holder = tl.argmax(maximum, 0) == tl.arange(0, maximum.shape[0])
    shift = tl.maximum((maximum - whole_maximum) * scale, LOG2_ZERO)
    decay = tl.exp2(shift)
    part_sum = 1 + rest
    whole_rest = tl.sum(tl.where(holder, rest, part_sum * decay), 0)
    return whole_maximum, whole_rest, tl.sum((weighted + shift * part_sum) * decay, 0)


@triton.jit
def no_logits(LANES: tl.constexpr):
    """The state of lanes that have absorbed nothing."""
    zero = tl.zeros((LANES,), tl.float32)
    return tl.full((LANES,), LOWEST, tl.float32), zero, zero, tl.zeros((LANES,), tl.int32), zero


@triton.jit
def merge_lanes(state, x_ptr, begin, end, scale, VEC: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr):
    """The state (maximum, rest, weighted) of the positions [begin, end) from those of the lanes that absorbed them."""
    maximum, others, own, own_tile, weighted = state
    lane = tl.arange(0, LANES)
    # The lane that holds the row's maximum: its tile once more, now without the maximum itself.
    holder = tl.argmax(maximum, 0)
    at = tl.sum(tl.where(lane == holder, own_tile, 0), 0) + holder * VEC
    at += tl.arange(0, WORDS)[:, None] * (LANES * VEC) + tl.arange(0, VEC)[None, :]
    exact = _rest_of(load_inside(x_ptr, at, begin, end, ""), tl.max(maximum, 0), scale)
    rest = others + tl.where(lane == holder, exact, own - 1)
    return merge(maximum, rest, weighted, scale)


@triton.jit
def store_part(partials_ptr, row, part, maximum, rest, weighted):
    """Leave the state of this program's part of a split row in partials (T, programs, 3)."""
    partial_ptr = partials_ptr + (row.to(tl.int64) * tl.num_programs(1) + part) * 3
    tl.store(partial_ptr, maximum)
    tl.store(partial_ptr + 1, rest)
    tl.store(partial_ptr + 2, weighted)


@triton.jit
def merge_parts(partials_ptr, row, programs, scale, MAX_PROGRAMS: tl.constexpr):
    """The state of a split row from those that its programs left."""
    part = tl.arange(0, MAX_PROGRAMS)
    partial_ptr = partials_ptr + (row.to(tl.int64) * programs + part) * 3
    exists = part < programs
    maximum = tl.load(partial_ptr, mask=exists, other=LOWEST)
    rest = tl.load(partial_ptr + 1, mask=exists, other=-1.0)
    weighted = tl.load(partial_ptr + 2, mask=exists, other=0.0)
    return merge(maximum, rest, weighted, scale)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to 4e-7 relative, however small x is (tl.log(1 + x) would see x rounded at 1)."""
    r = x / (2 + x)
    r2 = r * r
    series = 2 * r * (1 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7 + r2 / 9))))  # 2 atanh(r); next term < 1e-8
    return tl.where(x < 0.5, series, tl.log(1 + x))


@triton.jit
def row_result(rest, weighted):
    """(defined, log_sum, entropy) of a whole row; NaN where it has no softmax.

    NaN in the row makes both sums NaN, +inf makes `weighted` NaN, no finite logit leaves rest = -1.
    """
    defined = (rest >= 0) & (weighted <= 0)
    log_sum = _log1p(tl.where(defined, rest, float("nan")))
    return defined, log_sum, log_sum - weighted * LN2 / (1 + rest)


@triton.jit
def row_stats(maximum, rest, weighted):
    """(maximum, log_sum, entropy) of a whole row as reference.token_stats has them, from its state."""
    defined, log_sum, entropy = row_result(rest, weighted)
    return tl.where(defined, maximum, tl.where(rest < 0, -float("inf"), float("nan"))), log_sum, entropy


@triton.jit
def label_logit(logits_ptr, row, stride, label, vocab_start, vocab, ignore_index):
    """The logit of the row's label, NaN where there is none."""
    at = label - vocab_start
    inside = (label >= vocab_start) & (at < vocab) & (label != ignore_index)
    return tl.load(logits_ptr + row.to(tl.int64) * stride + at, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _store_row(
    row, maximum, rest, weighted, logits_ptr, labels_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr,
    stride, vocab, vocab_start, inv_temperature, ignore_index, SKIP_IGNORED: tl.constexpr,
):  # fmt: skip
    """Write the row's results from its state."""
    maximum, log_sum, entropy = row_stats(maximum, rest, weighted)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        x = label_logit(logits_ptr, row, stride, label, vocab_start, vocab, ignore_index)
        logprob = (x - maximum) * inv_temperature - log_sum
        if SKIP_IGNORED:
            maximum = tl.where(label == ignore_index, 0.0, maximum)
            log_sum = tl.where(label == ignore_index, 0.0, log_sum)
            entropy = tl.where(label == ignore_index, 0.0, entropy)
        # `log_sum` is NaN in an undefined row that is not skipped, and shows it here too.
        tl.store(logprobs_ptr + row, tl.where((label == ignore_index) & (log_sum == log_sum), 0.0, logprob))
    tl.store(maximum_ptr + row, maximum)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(entropy_ptr + row, entropy)


@triton.jit
def absorb_part(
    logits_ptr, row, part, stride, vocab, tiles_per_program, scale,
    VEC: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """(state of each lane, pointer, begin, end) after the whole words of one program's part of a row, [begin, end).

    scale = log2(e) / temperature. EVICTION: how long the caches should keep the logits, as tl.load's eviction_policy.
    """
    STEP: tl.constexpr = LANES * VEC
    TILE: tl.constexpr = WORDS * STEP
    x_ptr, head = aligned_row(logits_ptr, row, stride, VEC)
    tile_0 = part * tiles_per_program * TILE
    begin = tl.maximum(head, tile_0)
    end = tl.minimum(head + vocab, tile_0 + tiles_per_program * TILE)
    first, last = whole_words(begin, end, VEC)
    edge_first, edge_step, whole_first, whole_end = tile_ranges(tile_0, first, last, TILE)

    word = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    state = no_logits(LANES)
    for tile in range(whole_first, whole_end, TILE):
        ptr = x_ptr + tile + word
        x0 = tl.load(ptr, eviction_policy=EVICTION).to(tl.float32)
        x1 = tl.load(ptr + STEP, eviction_policy=EVICTION).to(tl.float32)
        x2 = tl.load(ptr + 2 * STEP, eviction_policy=EVICTION).to(tl.float32)
        x3 = tl.load(ptr + 3 * STEP, eviction_policy=EVICTION).to(tl.float32)
        state = absorb(state, x0, x1, x2, x3, tile, scale)
    for tile in range(edge_first, last, edge_step):
        at = tile + word
        x0 = load_inside(x_ptr, at, first, last, EVICTION)
        x1 = load_inside(x_ptr, at + STEP, first, last, EVICTION)
        x2 = load_inside(x_ptr, at + 2 * STEP, first, last, EVICTION)
        x3 = load_inside(x_ptr, at + 3 * STEP, first, last, EVICTION)
        state = absorb(state, x0, x1, x2, x3, tile, scale)
    return state, x_ptr, begin, end


@triton.jit
def merge_part(state, x_ptr, begin, end, scale, VEC: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr):
    """The state (maximum, rest, weighted) of a part from what absorb_part returned: the lanes and the cut words."""
    first, last = whole_words(begin, end, VEC)
    maximum, rest, weighted = merge_lanes(state, x_ptr, first, last, scale, VEC, WORDS, LANES)
    if (first > begin) | (last < end):
        at, inside = cut_words(begin, end, VEC)
        x = tl.where(inside, tl.load(x_ptr + at, mask=inside).to(tl.float32), -float("inf"))
        x = tl.expand_dims(x, 0)
        cut_maximum = tl.maximum(tl.max(tl.max(x, 1), 0), LOWEST)
        cut_rest = _rest_of(x, cut_maximum, scale)
        _, cut_weighted = _sums(x, tl.full((1,), 0.0, tl.float32) + cut_maximum, scale)
        is_cut = tl.arange(0, 2) == 1
        maximum, rest, weighted = merge(
            tl.where(is_cut, cut_maximum, maximum), tl.where(is_cut, cut_rest, rest),
            tl.where(is_cut, tl.sum(cut_weighted, 0), weighted), scale,
        )  # fmt: skip
    return maximum, rest, weighted


@triton.jit
def part_state(
    logits_ptr, row, part, stride, vocab, tiles_per_program, scale,
    VEC: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The state (maximum, rest, weighted) of one program's part of a row."""
    state, x_ptr, begin, end = absorb_part(
        logits_ptr, row, part, stride, vocab, tiles_per_program, scale, VEC, WORDS, LANES, ""
    )
    return merge_part(state, x_ptr, begin, end, scale, VEC, WORDS, LANES)


@triton.jit(do_not_specialize=["stride", "vocab", "vocab_start", "tiles_per_program", "ignore_index"])
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
    vocab_start,
    tiles_per_program,
    inv_temperature,
    ignore_index,
    SKIP_IGNORED: tl.constexpr,
    VEC: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (row, part): the state of one part of one row; its results, if the row is not split."""
    row, part = tl.program_id(0), tl.program_id(1)
    length = vocab
    if SKIP_IGNORED:
        length = tl.where(tl.load(labels_ptr + row) == ignore_index, 0, vocab)  # nothing to read
    row_max, rest, weighted = part_state(
        logits_ptr, row, part, stride, length, tiles_per_program, inv_temperature * LOG2E, VEC, WORDS, LANES
    )
    if partials_ptr is None:
        _store_row(
            row, row_max, rest, weighted, logits_ptr, labels_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr,
            stride, vocab, vocab_start, inv_temperature, ignore_index, SKIP_IGNORED,
        )  # fmt: skip
    else:
        store_part(partials_ptr, row, part, row_max, rest, weighted)


@triton.jit(do_not_specialize=["stride", "vocab", "vocab_start", "programs", "ignore_index"])
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
    vocab_start,
    programs,
    inv_temperature,
    ignore_index,
    SKIP_IGNORED: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Program (row): the results of a split row from the states of its parts; arguments as in token_stats_kernel."""
    row = tl.program_id(0)
    maximum, rest, weighted = merge_parts(partials_ptr, row, programs, inv_temperature * LOG2E, MAX_PROGRAMS)
    _store_row(
        row, maximum, rest, weighted, logits_ptr, labels_ptr, logprobs_ptr, entropy_ptr, maximum_ptr, log_sum_ptr,
        stride, vocab, vocab_start, inv_temperature, ignore_index, SKIP_IGNORED,
    )  # fmt: skip


def token_stats(
    logits: Tensor,  # [T, V] float16, bfloat16 or float32, contiguous rows at any stride
    labels: Tensor | None,  # [T] int64
    temperature: float,
    ignore_index: int,
    skip_ignored: bool,
    vocab_start: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, maximum, log_sum), each [T] float32; the meaning is that of reference.token_stats.

    Deterministic. The number of programs that share a row depends on T, V and the GPU, and with it the last bits.
    """
    rows, vocab = logits.shape
    logprobs = logits.new_empty(rows if labels is not None else 0, dtype=torch.float32)
    entropy, maximum, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    vec = ACCESS_BYTES // logits.element_size()
    programs, tiles_per_program = row_programs(logits, WORDS * LANES * vec)
    partials = logits.new_empty(rows, programs, 3, dtype=torch.float32) if programs > 1 else None
    tensors = (logits, labels, logprobs, entropy, maximum, log_sum, partials, logits.stride(0), vocab, vocab_start)
    numbers = (1 / temperature, ignore_index, skip_ignored and labels is not None)
    with torch.cuda.device_of(logits):
        token_stats_kernel[(rows, programs)](
            *tensors, tiles_per_program, *numbers,
            VEC=vec, WORDS=WORDS, LANES=LANES, num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        if partials is not None:
            merge_parts_kernel[(rows,)](*tensors, programs, *numbers, MAX_PROGRAMS=MAX_PROGRAMS_PER_ROW, num_warps=1)
    return logprobs, entropy, maximum, log_sum
