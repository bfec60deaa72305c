"""x * factor in another dtype, in one read and one write: how float32 sums become a gradient."""

# mypy: allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
TILE = 32 * NUM_WARPS * 16  # 16 elements per thread: four 16-byte loads are under way before the first store
TILES = 4  # per program


@triton.jit(do_not_specialize=["numel"])
def scaled_cast_kernel(
    x_ptr, factor_ptr, out_ptr, numel, IN_PLACE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Program (part): its elements. The last tile of all is masked, so that the others keep 16-byte accesses."""
    factor = tl.load(factor_ptr)
    first = tl.program_id(0).to(tl.int64) * (TILE * TILES)
    end = tl.minimum(first + TILE * TILES, numel)
    if IN_PLACE:
        end = tl.where(factor == 1, first, end)  # it is there already
    whole_end = first + (end - first) // TILE * TILE
    in_tile = tl.arange(0, TILE)
    for tile in range(first, whole_end, TILE):
        x = tl.load(x_ptr + tile + in_tile)
        tl.store(out_ptr + tile + in_tile, (x * factor).to(out_ptr.dtype.element_ty))
    if whole_end < end:
        at = whole_end + in_tile
        x = tl.load(x_ptr + at, mask=at < end)
        tl.store(out_ptr + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < end)


def scaled_cast(
    x: Tensor,  # float32, or of the dtype of `out`; contiguous
    factor: Tensor,  # [] float32
    out: Tensor,  # of the same shape, float16, bfloat16 or float32, contiguous; may be `x` itself
) -> None:
    """Write x * factor, rounded once, into `out`. The factor is read on the device: nothing waits for it.

    In place and with a factor of 1, as a loss has that nobody scales, no element is read or written.
    """
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):
        scaled_cast_kernel[(triton.cdiv(x.numel(), TILE * TILES),)](
            x,
            factor,
            out,
            x.numel(),
            IN_PLACE=out.data_ptr() == x.data_ptr(),
            TILE=TILE,
            TILES=TILES,
            num_warps=NUM_WARPS,
        )
