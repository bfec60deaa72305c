"""x * factor in another dtype, in one read and one write: how float32 sums become a gradient."""

# mypy: allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
BLOCK = 32 * NUM_WARPS * 16  # 16 elements per thread: four 16-byte loads are under way before the first store


@triton.jit(do_not_specialize=["numel"])
def scaled_cast_kernel(x_ptr, factor_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """Program (block): its elements. Only the last block is masked, so that the others keep 16-byte accesses."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    factor = tl.load(factor_ptr)
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= numel:
        tl.store(out_ptr + at, (tl.load(x_ptr + at) * factor).to(out_ptr.dtype.element_ty))
    else:
        inside = at < numel
        tl.store(out_ptr + at, (tl.load(x_ptr + at, mask=inside) * factor).to(out_ptr.dtype.element_ty), mask=inside)


def scaled_cast(
    x: Tensor,  # float32, contiguous
    factor: Tensor,  # [] float32
    out: Tensor,  # of the same shape, float16, bfloat16 or float32, contiguous; may be `x` itself
) -> None:
    """Write x * factor, rounded once, into `out`. The factor is read on the device: nothing waits for it."""
    if x.numel():
        with torch.cuda.device_of(x):
            scaled_cast_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
