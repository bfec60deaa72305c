"""AEPO's entropy-aware advantage in a trainer of TRL's: what is taken over all of its ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aepo_kernels import PolicyObjective
from aepo_kernels.entropy_advantage import entropy_aware_advantages, entropy_statistics


def statistics_over_ranks(accelerator: Any, entropy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [], std []) of the entropies that count, those of other ranks included."""
    world = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    return entropy_statistics(entropy, mask, process_group=world)


def shaped_advantages(
    accelerator: Any,
    objective: PolicyObjective,
    advantages: Tensor,
    entropy: Tensor,
    mask: Tensor,
    statistics: tuple[Tensor, Tensor],
) -> tuple[Tensor, float]:
    """Advantages [B, T] of [B, 1] or [B, T] with the objective's factor, and the share of all ranks' tokens that it
    turned around."""
    coefficient, clamp = objective.entropy_advantage, objective.clamp_entropy_factor
    shaped = entropy_aware_advantages(advantages, entropy, statistics, coefficient=coefficient, clamp=clamp)
    counted = mask != 0
    turned = ((shaped * advantages < 0) & counted).sum()
    counts = accelerator.reduce(torch.stack((turned, counted.sum())), reduction="sum")
    return shaped, (counts[0] / counts[1].clamp(min=1)).item()
