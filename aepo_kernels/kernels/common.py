"""What the two kernels that stream the logits share: where a row begins, which of its tiles are whole, who does it."""

# mypy: allow-incomplete-defs
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

ACCESS_BYTES = 16  # the widest load or store of one thread
# Loops count in units of log2: exp2 is one instruction on a GPU, exp is two.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Stands for log2 p = -inf: 2**-200 is exactly 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN.
LOG2_ZERO = tl.constexpr(-200.0)


@triton.jit
def aligned_row(ptr, row, stride, VEC: tl.constexpr):
    """(pointer, head): the row starts `head` < VEC elements behind a pointer that is aligned to 16 bytes.

    A vocabulary, stride or slice that is no multiple of VEC puts rows anywhere. Counting positions from the aligned
    pointer keeps every access to a whole tile 16 bytes wide, whatever the row (without it: VEC narrow loads instead).
    """
    start = ptr + row.to(tl.int64) * stride
    head = (start.to(tl.int64) % 16 // (16 // VEC)).to(tl.int32)
    return tl.multiple_of(start - head, 16), head


@triton.jit
def tile_ranges(tile_0, begin, end, TILE: tl.constexpr):
    """Cut positions [begin, end), which start in the tile at `tile_0`, into whole tiles and at most two cut ones.

    Returns (edge_first, edge_step, whole_first, whole_end): the cut tiles are range(edge_first, end, edge_step), the
    whole ones range(whole_first, whole_end, TILE). So the hot loop needs no mask.
    """
    whole_first = tl.where(begin > tile_0, tile_0 + TILE, tile_0)
    whole_end = whole_first + tl.maximum(end - whole_first, 0) // TILE * TILE
    edge_first = tl.where(begin > tile_0, tile_0, whole_end)
    return edge_first, tl.maximum(whole_end - tile_0, TILE), whole_first, whole_end


@triton.jit
def whole_words(begin, end, VEC: tl.constexpr):
    """(first, end) of the 16-byte words that lie inside positions [begin, end); first > end where none does."""
    return tl.multiple_of((begin + VEC - 1) // VEC * VEC, VEC), tl.multiple_of(end // VEC * VEC, VEC)


@triton.jit
def cut_words(begin, end, VEC: tl.constexpr):
    """(positions [2 VEC], mask) of what [begin, end) holds beside its whole words, in the words that its ends cut."""
    first, last = whole_words(begin, end, VEC)
    second = tl.where(last < first, end, last)  # both ends may cut the same word
    at = tl.arange(0, 2 * VEC)
    at = tl.where(at < VEC, first - VEC + at, second - VEC + at)
    return at, (at >= begin) & (at < end)


def row_programs(logits: Tensor, tile: int) -> tuple[int, int]:
    """(programs per row, tiles per program) for logits [T, V] processed in tiles of `tile` elements.

    One program per row once the rows fill the GPU several times over; fewer rows are split, so that every
    multiprocessor has work, but never into parts of less than two tiles, whose fixed costs would dominate.
    """
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab + ACCESS_BYTES, tile)  # positions count from up to VEC - 1 before the row
    wanted = triton.cdiv(_programs_to_fill(logits.device), max(rows, 1))
    programs = max(1, min(wanted, tiles // 2, MAX_PROGRAMS_PER_ROW))
    per_program = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, per_program), per_program


MAX_PROGRAMS_PER_ROW = 64


@functools.cache
def _programs_to_fill(device: torch.device) -> int:
    """Programs for four waves: 8 programs are resident per multiprocessor, and the last, partly filled wave of n costs
    about 1/n of the time. The interpreter has no multiprocessors; 1 lets its tests see split rows."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return 4 * 8 * processors


def same_alignment(logits: Tensor, out: Tensor) -> bool:
    """Whether every row of `out` starts as many bytes past a 16-byte boundary as that row of `logits`."""
    places = [(x.data_ptr(), x.stride(0) * x.element_size()) for x in (logits, out)]
    if out.dtype == logits.dtype:
        apart = [x - y for x, y in zip(*places, strict=True)]
    else:  # a step of one element is not the same number of bytes: all rows must start on a boundary
        apart = [nbytes for place in places for nbytes in place]
    return all(nbytes % ACCESS_BYTES == 0 for nbytes in apart)
