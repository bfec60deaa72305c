"""What the model and the loss get of a rollout batch: the rows that are trained on, and how steps share them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aepo.advantages import Sample


@dataclass(frozen=True, slots=True)
class LossRows:
    """One micro-batch: N paths side by side, T positions that the model reads, and R rows, one per trained token.

    Row r is predicted at position `rows[r]`: what stands at r below is of the token `labels[r]`, so nothing is shifted
    later on. A path of n tokens has n - 1 positions, as its last token is only predicted.

        tokens   q q q A B r C      q: prompt   A B C: written by the model   r: read from a tool
        input    q q q A B r        T = 6
        rows         2 3   5        R = 3
        labels       A B   C
    """

    input_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T], from 0 in every path
    lengths: tuple[int, ...]  # N: positions of each path; no path sees another one
    rows: Tensor  # int64 [R], ascending
    labels: Tensor  # int64 [R]
    bounds: Tensor  # int64 [N + 1]: path n has the rows bounds[n] to bounds[n + 1]
    rollout_logprobs: Tensor  # float32 or float64 [R], nats, as the engine sampled
    old_logprobs: Tensor  # same, of the policy that the ratio is taken against: the engine's unless recomputed
    entropies: Tensor  # same, of the old policy
    advantages: Tensor  # same
    ref_logprobs: Tensor | None  # same, of the frozen reference; None where nothing needs it
    origins: tuple[tuple[int, int], ...]  # N: question of the rollout batch, and path of its tree


@dataclass(frozen=True, slots=True)
class Batch:
    """A rollout batch as its optimiser steps take it: `minibatches[i]` are the micro-batches of step i of an epoch."""

    question_ids: tuple[str, ...]
    samples: tuple[Sample, ...]  # the paths that are trained on
    minibatches: tuple[tuple[LossRows, ...], ...]

    def micro_batches(self) -> Iterator[LossRows]:
        return (rows for minibatch in self.minibatches for rows in minibatch)


@dataclass(frozen=True, slots=True)
class Update:
    """What the optimiser steps of a rollout batch were like, in their order."""

    metrics: tuple[tuple[dict[str, float], ...], ...]  # of the loss, per step and micro-batch
    gradient_norms: tuple[float, ...]  # before clipping
    learning_rate: float | None  # of the last one; None: there was none


def entropy_statistics(batches: Sequence[LossRows]) -> tuple[float, float]:
    """Mean and unbiased std [nats] of the old policy's entropy over all trained tokens; std 0 below two tokens."""
    entropies = torch.cat([batch.entropies for batch in batches]).double()
    # Compared exactly: the mean of equal numbers can be off by a bit, and dividing by such a std would blow it up.
    if len(entropies) < 2 or bool((entropies == entropies[0]).all()):
        return (entropies[0].item() if len(entropies) else 0.0), 0.0
    return entropies.mean().item(), entropies.std().item()
