"""AEPO's entropy-aware advantage made before the update: an ordinary advantage per token, however a batch is cut later.

    stats = entropy_statistics(entropy, mask, process_group=group)              of the old policy, over the whole batch
    advantages = entropy_aware_advantages(advantages, entropy, stats)           A (1 + a (H - mean H) / std H)

The policy losses make the same factor themselves where they get `entropy_stats=` and an objective with
`entropy_advantage`, from the entropies of the policy that is being changed. Here those of the policy that sampled are
used: an objective for the result has entropy_advantage=0. Source: arXiv 2510.14545, section 3.3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aepo_kernels.objective import ENTROPY_NOISE_ULPS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def entropy_statistics(
    entropy: Tensor, mask: Tensor, *, process_group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """(mean [], unbiased std []) in float64 of entropies [..] whose mask [..] is not 0, over all ranks of the group.

    Both are 0 without any such token, the std also with one. Every rank must call it, also one without tokens: it is
    one all-gather of 24 bytes. Nothing waits for a GPU. Raises TypeError or ValueError naming the argument.
    """
    _check_entropy(entropy)
    if not isinstance(mask, Tensor) or mask.shape != entropy.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have shape {tuple(entropy.shape)} like entropy; got {got}")
    valid = mask != 0
    x = entropy.detach().double().where(valid, 0.0)  # a select: NaN may stand where nothing counts
    count = valid.sum().double()
    mean = x.sum() / count.clamp(min=1)
    squares = (x - mean).square().where(valid, 0.0).sum()
    if process_group is not None:
        count, mean, squares = _over_ranks(torch.stack((count, mean, squares)), process_group)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def _over_ranks(own: Tensor, process_group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, sum of squared differences from it) of all ranks' tokens, from those [3] of this rank's."""
    parts = own.new_empty(process_group.size() * 3)  # flat, as gloo wants it
    torch.distributed.all_gather_into_tensor(parts, own, group=process_group)
    counts, means, squares = parts.view(-1, 3).unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return count, mean, squares.sum() + (counts * (means - mean).square()).sum()


def entropy_aware_advantages(
    advantages: Tensor,
    entropy: Tensor,
    stats: tuple[float | Tensor, float | Tensor],
    *,
    coefficient: float = 0.2,
    clamp: bool = False,
) -> Tensor:
    """Advantages [B, L] = A (1 + coefficient (H - mean) / std) of A [B], [B, 1] or [B, L] and entropies H [B, L].

    `stats` = (mean, std) as `entropy_statistics` makes them. Where the std is 0, or no more than rounding of the mean
    (`ENTROPY_NOISE_ULPS`), the factor is 1. It can be negative, for an H far below the mean; clamp=True keeps it at 0
    or above. The result has the dtype of the advantages. Raises TypeError or ValueError naming the argument.
    """
    _check_entropy(entropy)
    if entropy.dim() != 2:
        raise ValueError(f"entropy must be [B, L]; got shape {tuple(entropy.shape)}")
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        raise TypeError(f"advantages must be a floating-point tensor; got {getattr(advantages, 'dtype', advantages)}")
    rows = advantages[:, None] if advantages.dim() == 1 else advantages
    if rows.shape not in (entropy.shape, (len(entropy), 1)):
        raise ValueError(
            f"advantages must be [B], [B, 1] or [B, L] beside entropy {tuple(entropy.shape)}; got shape "
            f"{tuple(advantages.shape)}"
        )
    if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)) or not math.isfinite(coefficient):
        raise ValueError(f"coefficient must be a finite number; got {coefficient!r}")
    if not isinstance(stats, tuple) or len(stats) != 2:
        raise TypeError(f"stats must be (mean, std), as entropy_statistics makes them; got {type(stats).__name__}")
    if not isinstance(clamp, bool):
        raise TypeError(f"clamp must be a bool; got {clamp!r}")
    mean, std = (_number(x, entropy) for x in stats)
    accurate = torch.finfo(torch.float64 if entropy.dtype == torch.float64 else torch.float32).eps
    noise = std <= ENTROPY_NOISE_ULPS * accurate * mean.abs()
    factor = torch.where(noise, 1.0, 1 + coefficient * (entropy.detach().double() - mean) / std)
    return (rows * (factor.clamp(min=0) if clamp else factor)).to(advantages.dtype)


def _number(x: float | Tensor, like: Tensor) -> Tensor:
    """A number or one-element tensor of stats as a float64 tensor [] beside `like`; its value is not read."""
    if isinstance(x, Tensor) and x.numel() == 1 and not x.is_complex():
        return x.detach().reshape(()).to(device=like.device, dtype=torch.float64)
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise TypeError(f"stats must be two numbers or one-element tensors, (mean, std); got {got}")
    return torch.ones((), device=like.device, dtype=torch.float64) * x


def _check_entropy(entropy: Tensor) -> None:
    if not isinstance(entropy, Tensor) or not entropy.is_floating_point():
        raise TypeError(f"entropy must be a floating-point tensor; got {getattr(entropy, 'dtype', entropy)}")
