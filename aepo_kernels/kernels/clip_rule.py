"""The clip rule of reference.clip_rule in Triton, for float64 ratios and advantages of any shape, scalars included.

`numbers` is an `aepo_kernels.objective.ObjectiveNumbers`: Triton takes the tuple as one argument, by the names of its
fields. So a new number of an objective goes into no launcher and no signature, and other values compile nothing.
"""

# mypy: allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def clip_rule(numbers, ratio, advantage):
    """(value, slope, above, below, beyond), as the fields of reference.clip_rule.Clipped."""
    above, below, beyond = ratio > numbers.high, ratio < numbers.low, ratio > numbers.dual_clip
    detached, attached = numbers.detached_ratio != 0, numbers.detached_ratio == 0
    above, below = above & (detached | (advantage > 0)), below & (detached | (advantage < 0))
    beyond = beyond & attached & (advantage < 0)
    value = tl.where(above, numbers.high, tl.where(beyond, numbers.dual_clip, tl.where(below, numbers.low, ratio)))
    slope = tl.where(above, numbers.grad_high, tl.where(beyond, 0.0, tl.where(below, numbers.grad_low, ratio)))
    return value, tl.where(detached, value, slope), above, below, beyond
