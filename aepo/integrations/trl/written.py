"""Scoring only what the model wrote: TRL's head runs for all tokens of a completion, results of tools included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnlyWritten:
    """A model of TRL's, called as TRL's scoring calls it: with the rows of a batch in order, some at a time.

    Tokens of the completions, the last `columns` of the labels, that are 0 in `written` [B, <= columns] get the label
    -100: no product is made for them, and log-probs and entropies are 0 there, as on padding. Where an agent reads more
    than it writes that is most of the head's work.
    """

    def __init__(self, model: Any, written: Tensor, columns: int) -> None:
        self._model = model
        self._written = written
        self._columns = columns
        self._next = 0  # row

    def __call__(self, *, labels: Tensor, **inputs: Any) -> Any:
        written = self._written[self._next : self._next + len(labels)].to(labels.device)
        self._next += len(labels)
        labels = labels.clone()
        labels[:, -self._columns :][:, : written.size(1)].masked_fill_(written == 0, -100)
        return self._model(labels=labels, **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def of_tool_masks(masks: list[list[int]] | None) -> Tensor | None:
    """[B, T] of lists of 1 (written) and 0 (read); None where there is nothing to leave out."""
    if masks is None:
        return None
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(mask) for mask in masks], batch_first=True)
