"""A user's reward, branch rule and loss, in one file beside the runs: what they import has to stay."""

from __future__ import annotations

import torch

from aepo.own_loss import LossBatch
from aepo.rollout.branching import BranchPoint
from aepo.types import Question, Response


def brief(question: Question, response: Response) -> float:
    """Fewer characters than fifty, and an answer at all."""
    return float(response.answer is not None) - len(response.text) / 50


def rule(point: BranchPoint) -> float:
    """Where what follows the tool is more open than the beginning was."""
    return 0.5 + 0.4 * (point.entropies[0] > point.initial_entropy)


def loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, batch: LossBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped ratios, a bonus for entropy, and a penalty for what the reference would not write."""
    ratio = (logprobs - batch.old_logprobs).exp()
    clipped = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    assert batch.ref_logprobs is not None
    apart = batch.ref_logprobs - logprobs
    distance = apart.exp() - apart - 1
    total = (0.05 * distance - clipped - 0.001 * entropy).sum() / batch.tokens
    return total, {"distance": distance.mean()}
