"""From rewards to advantages where TRL's own estimate is not the one asked for: batch, GiGPO, the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from aepo.advantages import step_advantages
from aepo.types import Trajectory
from aepo_kernels.advantages import batch_advantages


def of_rewards(kind: str | Callable[[Tensor, Tensor], Tensor], rewards: Tensor, generations: int) -> Tensor:
    """Advantages [N] float32 of rewards [N], NaN where no reward function had anything to say: 0 there.

    kind "batch": REINFORCE++'s; a function gets the other rewards, float64, and their questions, int64.
    """
    known = ~rewards.isnan()
    given = rewards[known].double()
    advantages = torch.zeros_like(rewards, dtype=torch.float32)
    if callable(kind):
        questions = (torch.arange(len(rewards), device=rewards.device) // generations)[known]
        found = _checked(kind, kind(given, questions), given)
    else:
        found = batch_advantages(given)
    advantages[known] = found.to(advantages)
    return advantages


def _checked(function: Callable, found: object, rewards: Tensor) -> Tensor:
    name = getattr(function, "__qualname__", repr(function))
    try:
        tensor = torch.as_tensor(found, dtype=torch.float64, device=rewards.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"advantage: {name} must return advantages [N]; got {type(found).__name__}") from error
    if tensor.shape != rewards.shape:
        raise ValueError(f"advantage: {name} returned shape {list(tensor.shape)}, expected {list(rewards.shape)}")
    if not tensor.isfinite().all():
        index = int((~tensor.isfinite()).nonzero()[0])
        raise ValueError(f"advantage: {name} returned {tensor[index].item()} at {index}: expected finite ones")
    return tensor


def turns(prompt: Sequence[int], completion: Sequence[int], written: Sequence[int]) -> Trajectory:
    """A completion as steps: each run of tokens that the model wrote, and what it had just read (GiGPO's anchor)."""
    steps: list[int] = [-1] * len(prompt)
    anchors: list[tuple[int, ...]] = []
    read = tuple(prompt)
    for by_model, run in groupby(zip(completion, written, strict=True), key=lambda pair: bool(pair[1])):
        tokens = tuple(token for token, _ in run)
        steps += [len(anchors) if by_model else -1] * len(tokens)
        if by_model:
            anchors.append(read)
        read = tokens
    zeros = (0.0,) * len(steps)
    return Trajectory(
        token_ids=(*prompt, *completion),
        generated=tuple(step >= 0 for step in steps),
        logprobs=zeros,
        entropies=zeros,
        steps=tuple(steps),
        anchors=tuple(anchors),
    )


def step_level(paths: Sequence[Trajectory], rewards: Sequence[float], generations: int, discount: float) -> list:
    """GiGPO's step advantages, per path and step: paths of a question stand in a row, `generations` of them. A path
    whose reward is NaN takes no part and has none."""
    found: list[list[float]] = []
    for first in range(0, len(paths), generations):
        group = range(first, first + generations)
        known = [i for i in group if rewards[i] == rewards[i]]
        made = dict(
            zip(known, step_advantages([paths[i] for i in known], [rewards[i] for i in known], discount), strict=True)
        )
        found += [made.get(i, [0.0] * len(paths[i].anchors)) for i in group]
    return found


def per_token(path: Trajectory, steps: Sequence[float], prompt: int) -> list[float]:
    """Step advantages as one per token of the completion, which begins after `prompt` tokens; 0 where it was read."""
    return [steps[step] if step >= 0 else 0.0 for step in path.steps[prompt:]]
