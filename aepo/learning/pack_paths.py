"""From samples to rows: whole paths one after the other, no padding, cut by a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from aepo.advantages import Sample
from aepo.learning.batch import LossRows


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LossRows:
    """Pack all samples into one micro-batch. `dtype` is that of the log-probs, entropies and advantages."""
    paths = [sample.trajectory for sample in samples]
    lengths = tuple(len(path.token_ids) - 1 for path in paths)
    written = [[index for index, generated in enumerate(path.generated) if generated] for path in paths]
    starts = [0, *accumulate(lengths)]

    def joined(parts: Iterable[Iterable], dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for part in parts for value in part], dtype=dtype, device=device)

    def of_written(values: Iterable[Sequence], dtype: torch.dtype) -> Tensor:
        return joined(([one[index] for index in indices] for one, indices in zip(values, written, strict=True)), dtype)

    logprobs = of_written((path.logprobs for path in paths), dtype)
    return LossRows(
        input_ids=joined((path.token_ids[:-1] for path in paths), torch.int64),
        position_ids=joined(map(range, lengths), torch.int64),
        lengths=lengths,
        rows=joined(
            ([start + index - 1 for index in indices] for start, indices in zip(starts, written, strict=False)),
            torch.int64,
        ),
        labels=of_written((path.token_ids for path in paths), torch.int64),
        bounds=torch.tensor([0, *accumulate(map(len, written))], device=device),
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        entropies=of_written((path.entropies for path in paths), dtype),
        advantages=of_written((sample.advantages for sample in samples), dtype),
        ref_logprobs=None,
        origins=tuple((sample.question, sample.path) for sample in samples),
    )


def microbatches(samples: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """Split into runs of at most `tokens` positions, longest paths first; one that is longer goes alone.

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
