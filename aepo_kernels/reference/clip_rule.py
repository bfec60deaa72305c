"""The clip rule: what multiplies -A in a token's loss, and in its gradient, given ratio r and advantage A.

One rule serves all methods, because they differ only in numbers (`aepo_kernels.objective.ObjectiveNumbers`): the two
bounds, the factor F that multiplies the gradient beyond each, the dual-clip bound, and whether the ratio is detached.

    case                        policy term L      dL/dlogprob = -A F
    A > 0 and r > high          -A high            F = grad_high      (PPO 0, AEPO and GPPO high)
    A < 0 and r > dual_clip     -A dual_clip       F = 0
    A < 0 and r < low           -A low             F = grad_low       (PPO and AEPO 0, GPPO low)
    otherwise                   -A r               F = r
    detached ratio (CISPO)      -A clip(r) logprob F = clip(r, low, high)

Its twins are kernels/clip_rule.py and csrc/include/clip_rule.h; a new rule goes into these three.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from aepo_kernels.objective import ObjectiveNumbers


class Clipped(NamedTuple):
    """What the rule makes of some tokens, each [T]."""

    value: Tensor
    """Of -A (of -A logprob where the ratio is detached) in the loss."""
    slope: Tensor
    """F, of -A in the gradient."""
    above: Tensor
    """bool: at the upper bound, and likewise at the lower one and at the dual clip."""
    below: Tensor
    beyond: Tensor


def clip_rule(numbers: ObjectiveNumbers, ratio: Tensor, advantage: Tensor) -> Clipped:
    """The rule for ratios and advantages [T]. A NaN ratio holds no case, so it stays visible."""
    above, below, beyond = ratio > numbers.high, ratio < numbers.low, ratio > numbers.dual_clip
    if numbers.detached_ratio:
        value = choose(ratio, (above, numbers.high), (below, numbers.low))
        return Clipped(value, value, above, below, beyond & False)
    above, below, beyond = above & (advantage > 0), below & (advantage < 0), beyond & (advantage < 0)
    value = choose(ratio, (above, numbers.high), (beyond, numbers.dual_clip), (below, numbers.low))
    slope = choose(ratio, (above, numbers.grad_high), (beyond, 0.0), (below, numbers.grad_low))
    return Clipped(value, slope, above, below, beyond)


def choose(otherwise: Tensor, *cases: tuple[Tensor, float]) -> Tensor:
    """The value of the first case that holds, per token."""
    for condition, value in reversed(cases):
        otherwise = otherwise.masked_fill(condition, value)
    return otherwise
