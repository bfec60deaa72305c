"""From samples to packed batches: whole trajectories one after the other, no padding, cut by a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aepo.advantages import Sample

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N trajectories side by side. T counts positions; a trajectory of n tokens has n - 1, its last token is only
    predicted. Everything below stands at the position that predicts: `labels[t]` comes right after `input_ids[t]`,
    and the log-prob, entropy and advantage at t are those of `labels[t]`. So nothing is shifted later on.

        tokens   q q q A B r C      q: prompt   A B C: written by the model   r: read from a tool
        input    q q q A B r
        labels   . . A B . C        mask = where there is a label
    """

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], from 0 in every trajectory
    cu_seqlens: torch.Tensor  # int64 [N + 1]: trajectory n owns positions cu_seqlens[n] to cu_seqlens[n + 1]
    lengths: tuple[int, ...]  # N, the same on the host
    labels: torch.Tensor  # int64 [T]; IGNORED_LABEL off the mask
    mask: torch.Tensor  # bool [T]: the model wrote labels[t]
    rollout_logprobs: torch.Tensor  # float32 or float64 [T], nats, as the engine sampled; 0 off the mask
    old_logprobs: torch.Tensor  # same, of the policy that the ratio is taken against: the engine's unless recomputed
    entropies: torch.Tensor  # same, of the old policy
    advantages: torch.Tensor  # same
    ref_logprobs: torch.Tensor | None  # same, of the frozen reference; None where nothing needs it
    samples: tuple[Sample, ...]  # where the trajectories came from

    @property
    def trained_tokens(self) -> int:
        return sum(sum(sample.trajectory.generated) for sample in self.samples)


def pack(
    samples: Sequence[Sample], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PackedBatch:
    """Pack all samples into one batch. `dtype` is that of the log-probs, entropies and advantages."""
    trajectories = [sample.trajectory for sample in samples]
    lengths = tuple(len(t.token_ids) - 1 for t in trajectories)

    def joined(rows: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([value for row in rows for value in row], dtype=dtype, device=device)

    labels = joined([t.token_ids[1:] for t in trajectories], torch.int64)
    mask = joined([t.generated[1:] for t in trajectories], torch.bool)
    logprobs = joined([t.logprobs[1:] for t in trajectories], dtype)
    return PackedBatch(
        input_ids=joined([t.token_ids[:-1] for t in trajectories], torch.int64),
        position_ids=joined([range(length) for length in lengths], torch.int64),
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0),
        lengths=lengths,
        labels=labels.where(mask, torch.full_like(labels, IGNORED_LABEL)),
        mask=mask,
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        entropies=joined([t.entropies[1:] for t in trajectories], dtype),
        advantages=joined([sample.advantages[1:] for sample in samples], dtype),
        ref_logprobs=None,
        samples=tuple(samples),
    )


def entropy_statistics(batches: Sequence[PackedBatch]) -> tuple[float, float]:
    """Mean and unbiased std [nats] of the old policy's entropy over all trained tokens; std 0 below two tokens."""
    entropies = torch.cat([batch.entropies[batch.mask] for batch in batches]).double()
    # Compared exactly: the mean of equal numbers can be off by a bit, and dividing by such a std would blow it up.
    if len(entropies) < 2 or bool((entropies == entropies[0]).all()):
        return (entropies[0].item() if len(entropies) else 0.0), 0.0
    return entropies.mean().item(), entropies.std().item()


def microbatches(samples: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """Split into runs of at most `tokens` positions, longest trajectories first; one that is longer goes alone.

    The order puts like lengths together, so that memory, which peaks with the longest run, shows its peak at once.
    """
    longest_first = sorted(samples, key=lambda sample: -len(sample.trajectory.token_ids))  # stable: ties keep order
    batches: list[list[Sample]] = []
    room = 0
    for sample in longest_first:
        length = len(sample.trajectory.token_ids) - 1
        if not batches or length > room:
            batches.append([])
            room = tokens
        batches[-1].append(sample)
        room -= length
    return batches
