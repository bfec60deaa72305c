"""From one reward per answer to one advantage per answer, compared with its group, its batch, or the rest of its group.

B answers; a group is those to one question. Policy losses take the result as it is: [B] beside log-probs [B, L].

    group_advantages(rewards, groups)                (R - mean) / std of the group       GRPO, arXiv 2402.03300
    group_advantages(rewards, groups, scale=False)   R - mean of the group               Dr. GRPO, arXiv 2503.20783
    batch_advantages(rewards)                        (R - mean) / std of all             REINFORCE++, arXiv 2501.03262
    leave_one_out_advantages(rewards, groups)        R - mean of the others in the group RLOO, arXiv 2402.14740

All take rewards [B] floating point, integer or bool, and groups [B], any integers in any order: answers with the same
one belong together (`torch.arange(B, device=rewards.device) // k` where k answers to each question stand in a row).
They return [B] float32, float64 for float64 rewards, from float64 sums, without gradient.

- Rewards of a group that are equal up to rounding (`rewards_equal`), and a group of one, give exactly 0, so no epsilon
  is added to a std. Nothing overflows on the way: rewards of 1e300 are as good as those of 1.
- Equal inputs give equal bits, in whatever order the rows stand. Nothing waits for a GPU, and
  torch.compile(fullgraph=True) takes all of them.
- NaN and infinite rewards raise a ValueError on the CPU; where they cannot be read at no cost (another device, a
  compiled graph), the advantages of their group are NaN. Wrong types, shapes and devices raise a TypeError or
  ValueError that names the argument.

The batch is what is handed over: with data parallelism, gather the rewards of all ranks first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EQUAL_REWARDS = 4 * 2.0**-23
"""Difference, relative to the largest of a group, up to which rewards count as equal: four ulps of float32, in which
rewards are often summed."""

ZERO_REWARD = 1e-12
"""Difference up to which they do in any case: sums of numbers around 1 leave less where they should be 0."""

REWARD_DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def group_advantages(rewards: Tensor, groups: Tensor, *, scale: bool = True) -> Tensor:
    """Advantages [B] of rewards [B] within the groups [B] of equal ids: (R - mean) / unbiased std, GRPO's; with
    scale=False R - mean, Dr. GRPO's, in which a question whose answers hardly differ does not weigh as much as others.
    """
    if not isinstance(scale, bool):
        raise TypeError(f"scale must be a bool; got {scale!r}")
    _check(rewards, groups)
    grouped = _Grouped.of(rewards, groups)
    return grouped.advantages(grouped.standardized() if scale else grouped.raw(grouped.deviation))


def batch_advantages(rewards: Tensor) -> Tensor:
    """Advantages [B] of rewards [B]: (R - mean) / unbiased std over all of them, REINFORCE++'s. Its variant with a
    baseline is batch_advantages(group_advantages(rewards, groups, scale=False))."""
    _check(rewards)
    grouped = _Grouped.of(rewards, None)
    return grouped.advantages(grouped.standardized())


def leave_one_out_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Advantages [B] of rewards [B]: R - mean of the others with the same id in groups [B], RLOO's. An answer is no
    part of its own baseline, so the gradient is unbiased; a group of one has no baseline and gets 0."""
    _check(rewards, groups)
    grouped = _Grouped.of(rewards, groups)
    return grouped.advantages(grouped.raw(grouped.deviation * grouped.count / (grouped.count - 1)))


def rewards_equal(rewards: Tensor, groups: Tensor | None = None) -> Tensor:
    """Whether [B] all rewards of a row's group are the same number up to rounding, as 0.1 + 0.2 and 0.3 are: scaled to
    a std of 1, that rounding would be a full advantage. Such a group teaches nothing; DAPO (arXiv 2503.14476) leaves
    it out.

    rewards [B]; groups [B], or None where all of them are one group. NaN and infinity are equal to nothing.
    """
    _check(rewards, groups, finite=False)
    grouped = _Grouped.of(rewards, groups)
    return grouped.at_their_rows(grouped.equal)


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Rewards in float64, sorted by group and by size in it: so sums do not depend on the order of rows, and extremes
    stand at the ends. Everything [B] in this order."""

    dtype: torch.dtype  # of the advantages
    order: Tensor  # row of the batch
    first: Tensor  # where the group begins
    last: Tensor  # and its last place
    count: Tensor  # rewards in the group
    equal: Tensor  # whether they are, up to rounding
    half_spread: Tensor  # (largest - smallest) / 2: the whole one may overflow
    deviation: Tensor  # (R - mean) / spread, in [-1, 1]; NaN or infinite where the spread is 0

    @classmethod
    def of(cls, rewards: Tensor, groups: Tensor | None) -> _Grouped:
        dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
        x = rewards.detach().double()
        x = x.where(x.isfinite(), torch.nan)  # sorted last, so that it is found
        order = x.argsort(stable=True)
        ids = torch.zeros_like(order) if groups is None else groups.long()[order]
        ids, by_group = ids.sort(stable=True)
        order = order[by_group]
        x = x[order]
        first, end = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)
        low, high = x[first], x[end - 1]
        half_spread = high / 2 - low / 2
        size = torch.maximum(low.abs(), high.abs())
        equal = half_spread <= (EQUAL_REWARDS * size).clamp(min=ZERO_REWARD) / 2  # not where NaN
        share = (x / 2 - low / 2) / half_spread  # of the spread, in [0, 1]
        count = end - first
        deviation = share - _sums(share, first, end - 1) / count
        return cls(dtype, order, first, end - 1, count, equal, half_spread, deviation)

    def standardized(self) -> Tensor:
        variance = _sums(self.deviation.square(), self.first, self.last) / (self.count - 1)
        return self.deviation / variance.sqrt()

    def raw(self, deviation: Tensor) -> Tensor:
        """From parts of the spread to rewards."""
        return deviation * self.half_spread * 2

    def advantages(self, x: Tensor) -> Tensor:
        return self.at_their_rows(x.masked_fill(self.equal, 0.0).to(self.dtype))

    def at_their_rows(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).scatter(0, self.order, x)


def _sums(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Per place, the sum over its group. Segment i runs from first[i] to first[i + 1]: empty but at a group's last
    place, where it is the whole group. So the number of groups need not be known, for which a GPU would have to be
    waited for; and unlike those of index_add, which adds in any order there, the sums repeat."""
    if len(x) == 0:  # by which the CUDA kernel would divide
        return x
    offsets = torch.nn.functional.pad(first, (0, 1), value=len(x))
    return torch.segment_reduce(x, "sum", offsets=offsets, unsafe=True)[last]  # unsafe: offsets are not checked again


def _check(rewards: Tensor, groups: Tensor | None = None, *, finite: bool = True) -> None:
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor [B]; got {type(rewards).__name__}")
    if rewards.dtype not in REWARD_DTYPES:
        raise TypeError(f"rewards must be floating point (16 to 64 bits), integer or bool; got {rewards.dtype}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [B], one per answer; got shape {tuple(rewards.shape)}")
    if groups is not None:
        if not isinstance(groups, Tensor):
            raise TypeError(f"groups must be a tensor [B] of integers; got {type(groups).__name__}")
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"groups must have an integer dtype; got {groups.dtype}")
        if groups.shape != rewards.shape:
            raise ValueError(f"groups must have shape {tuple(rewards.shape)} like rewards; got {tuple(groups.shape)}")
        if groups.device != rewards.device:
            raise ValueError(f"groups must be on {rewards.device} like rewards; got {groups.device}")
    if finite and rewards.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~rewards.isfinite()
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(f"rewards must be finite; got {rewards[at].item()} at position {at}")
