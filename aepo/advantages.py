"""From rewards to one advantage per generated token: group, batch and step-level estimates.

A group is the k paths of one question. The estimates are those of aepo_kernels.advantages, in float64; AEPO's
entropy-aware factor is not here: the loss kernel applies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from aepo.agents.protocol import AgentError, blamed
from aepo.config import PolicyConfig
from aepo.registry import resolve_function
from aepo.rollout.tree import flatten
from aepo.types import ScoredTree, TokenIds, Trajectory
from aepo_kernels.advantages import batch_advantages, group_advantages, rewards_equal

Kind = Literal["group", "batch", "gigpo"]


@dataclass(frozen=True, slots=True)
class AdvantageSettings:
    """How rewards become advantages: the part of a preset that is not a loss."""

    kind: Kind = "group"
    own: Callable[[Tensor, Tensor], Tensor] | None = None  # rewards [N], questions [N] -> advantages [N]
    drop_equal_groups: bool = False
    overlong_buffer: int = 0
    step_weight: float = 1.0
    step_discount: float = 0.95


# REINFORCE++ normalises over the batch; DAPO drops groups without a signal and shapes the reward of long answers
# (its buffer is a fifth of the longest answer: 4096 of 20480 there, 64 tokens of our short paths); GiGPO adds steps.
PRESETS: dict[str, dict] = {
    "reinforce++": {"kind": "batch"},
    "dapo": {"drop_equal_groups": True, "overlong_buffer": 64},
    "gigpo": {"kind": "gigpo"},
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory to train on. `advantages` has one entry per token, 0.0 where the model did not write it."""

    question: int  # index in the rollout batch
    path: int
    trajectory: Trajectory
    advantages: tuple[float, ...]


def advantage_settings(policy: PolicyConfig) -> AdvantageSettings:
    """The preset's settings with the configured fields in their place. ValueError: policy.advantage names nothing."""
    own = None
    if policy.advantage is not None and ":" in policy.advantage:
        own = resolve_function(policy.advantage, "policy.advantage", "rewards, questions")
    elif policy.advantage not in (None, *get_args(Kind)):
        raise ValueError(
            f"policy.advantage = {policy.advantage!r}: expected {', '.join(get_args(Kind))} or package.module:function"
        )
    chosen = {
        "own": own,
        "kind": policy.advantage if own is None else None,
        "drop_equal_groups": policy.drop_equal_groups,
        "overlong_buffer": policy.overlong_buffer,
    }
    overrides = {name: value for name, value in chosen.items() if value is not None}
    return AdvantageSettings(
        step_weight=policy.step_weight,
        step_discount=policy.step_discount,
        **{**PRESETS.get(policy.preset, {}), **overrides},
    )


def make_samples(scored: Sequence[ScoredTree], settings: AdvantageSettings, max_tokens: int) -> list[Sample]:
    """Samples of a rollout batch, in order: `scored[q]` is the tree of question q.

    The overlong penalty is part of the reward; equal rewards are looked for after it. With `drop_equal_groups` the
    paths of a question without any difference are left out, so they do not count in the loss's denominator either.
    """
    groups = [[flatten(one.tree, path.id) for path in one.tree.paths] for one in scored]
    shaped = [
        [
            reward.total - overlong_penalty(_length(path), max_tokens, settings.overlong_buffer)
            for path, reward in zip(group, one.rewards, strict=True)
        ]
        for group, one in zip(groups, scored, strict=True)
    ]
    for q, path_rewards in enumerate(shaped):
        for j, reward in enumerate(path_rewards):
            if not math.isfinite(reward):
                raise ValueError(f"reward of question {q}, path {j} is {reward}: expected a finite number")
    flat = torch.tensor([reward for group in shaped for reward in group], dtype=torch.float64)
    questions = torch.tensor([q for q, group in enumerate(shaped) for _ in group], dtype=torch.int64)
    per_path = _per_path(flat, questions, settings)
    per_question = [part.tolist() for part in per_path.split([len(group) for group in groups])]
    samples = []
    for q, group in enumerate(groups):
        if settings.drop_equal_groups and all_equal(shaped[q]):
            continue
        steps = step_advantages(group, shaped[q], settings.step_discount) if settings.kind == "gigpo" else None
        for j, trajectory in enumerate(group):
            bonus = [settings.step_weight * a for a in steps[j]] if steps else [0.0] * len(trajectory.anchors)
            advantages = tuple(per_question[q][j] + bonus[step] if step >= 0 else 0.0 for step in trajectory.steps)
            samples.append(Sample(q, j, trajectory, advantages))
    return samples


def _per_path(rewards: Tensor, questions: Tensor, settings: AdvantageSettings) -> Tensor:
    """Advantages [N] of rewards [N], float64."""
    if settings.own is None:
        return batch_advantages(rewards) if settings.kind == "batch" else group_advantages(rewards, questions)
    name = getattr(settings.own, "__qualname__", repr(settings.own))
    with blamed(f"policy.advantage: {name}", settings.own):
        found = torch.as_tensor(settings.own(rewards, questions), dtype=torch.float64).detach()
    if found.shape != rewards.shape:
        raise AgentError(f"policy.advantage: {name} returned shape {list(found.shape)}, expected {list(rewards.shape)}")
    if not found.isfinite().all():
        index = int((~found.isfinite()).nonzero()[0])
        raise AgentError(
            f"policy.advantage: {name} returned {found[index].item()} for path {index}: expected finite ones"
        )
    return found


def all_equal(rewards: Sequence[float]) -> bool:
    """Whether the rewards of one group are the same number up to rounding, by the rule of `rewards_equal`."""
    return bool(rewards_equal(torch.tensor(rewards, dtype=torch.float64)).all())


def step_advantages(trajectories: Sequence[Trajectory], rewards: Sequence[float], discount: float) -> list[list[float]]:
    """GiGPO (arXiv 2505.10978): per path and step, the discounted return among all steps of the question that started
    from the same anchor state. The reward comes at the end, so the return of step s of n is discount^(n-1-s) R. Steps
    whose anchor occurs once have nothing to be compared with: 0."""
    numbers: dict[TokenIds, int] = {}  # of the anchors
    anchors, returns = [], []
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        for step, anchor in enumerate(trajectory.anchors):
            anchors.append(numbers.setdefault(anchor, len(numbers)))
            returns.append(reward * discount ** (len(trajectory.anchors) - 1 - step))
    advantages = group_advantages(torch.tensor(returns, dtype=torch.float64), torch.tensor(anchors, dtype=torch.int64))
    of_step = iter(advantages.tolist())
    return [[next(of_step) for _ in trajectory.anchors] for trajectory in trajectories]


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO (arXiv 2503.14476, equation 13): 0 up to max_tokens - buffer, then linearly up to 1 at max_tokens."""
    if buffer == 0:
        return 0.0
    return min(max(length - (max_tokens - buffer), 0) / buffer, 1.0)


def _length(trajectory: Trajectory) -> int:
    """Tokens after the prompt, written or read."""
    return len(trajectory.token_ids) - trajectory.generated.index(True)
