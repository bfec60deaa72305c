"""Exact entropies of the first tokens of segments, by one pass of the trainer's own model over a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing

from aepo.branching import mean_entropy
from aepo.integrations.trl.branching.paths import Path, Place


def measure(trainer: Any, paths: Sequence[Path], window: int) -> list[tuple[Path, bool, list[Place]]]:
    """Sets the entropies of the paths that are None: means over at most `window` tokens, in nats, over the whole
    vocabulary, at the temperature that samples.

    Returned: of each path whether that of its first segment was measured now, and the places that were.
    """
    wanted = [_Reading(path, window) for path in paths]
    batch = trainer.args.per_device_train_batch_size
    for start in range(0, len(wanted), batch):
        _read(trainer, wanted[start : start + batch])
    return [(one.path, one.initial, one.places) for one in wanted]


class _Reading:
    """A path, and where in its completion entropies are wanted."""

    def __init__(self, path: Path, window: int) -> None:
        self.path = path
        self.initial = path.initial_entropy is None
        self.places = [place for place in path.undecided if place.entropy is None]
        starts = [0] * self.initial + [place.end for place in self.places]
        self.spans = [(start, _end(path, start, window)) for start in starts]
        self.tokens = path.prompt + path.completion[: self.spans[-1][1]]  # what comes later changes nothing
        self.columns = self.spans[-1][1] - self.spans[0][0]

    def set(self, entropies: Sequence[float]) -> None:
        """entropies: of the tokens from the first span's to the last one's."""
        first = self.spans[0][0]
        means = [mean_entropy(entropies[start - first : end - first], end - start) for start, end in self.spans]
        if self.initial:
            self.path.initial_entropy = means.pop(0)
        for place, mean in zip(self.places, means, strict=True):
            place.entropy = mean


def _end(path: Path, start: int, window: int) -> int:
    """One past the last of the first `window` tokens of the segment that starts there."""
    end = start
    while end < min(start + window, len(path.mask)) and path.mask[end]:
        end += 1
    return end


@torch.no_grad()
def _read(trainer: Any, wanted: Sequence[_Reading]) -> None:
    width, columns = max(len(one.tokens) for one in wanted), max(one.columns for one in wanted)
    token_ids = torch.full((len(wanted), width), trainer._tokenizer.pad_token_id)
    mask = torch.zeros_like(token_ids)
    for row, one in enumerate(wanted):
        token_ids[row, width - len(one.tokens) :] = torch.tensor(one.tokens)
        mask[row, width - len(one.tokens) :] = 1
    device = trainer.accelerator.device
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        _, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, token_ids.to(device), mask.to(device), columns, compute_entropy=True
        )
    for row, one in zip(entropies.double().tolist(), wanted, strict=True):
        one.set(row[columns - one.columns :])
