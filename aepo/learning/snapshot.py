"""The state of training before an update, so that a failed one can be taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aepo.parallel import Parallel


class Snapshot:
    """A copy of what an update changes, in host memory that is reused by every update.

    AdamW in float32: 12 bytes per trained parameter, and reading them once per update; with weights in 16 bits and
    their masters 14. Device memory stays as it is.
    """

    def __init__(self, parallel: Parallel, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        self._parallel, self._model, self._optimizer = parallel, model, optimizer
        self._copies: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the block raises, weights, masters and moments are as they were before it, to the bit and in the same
        memory.

        Nothing interrupts the block asynchronously (aepo/interrupt.py).
        """
        taken = self._take()
        try:
            yield
        except BaseException:
            # Without an entry are the moments that the first update has made: they are dropped.
            self._parallel.load(self._model, self._optimizer, ((name, self._copies[name]) for name in taken))
            raise

    @torch.no_grad()
    def _take(self) -> list[str]:
        """The names of what there is."""
        state = self._parallel.state(self._model, self._optimizer, whole=False)
        for name, tensor in state.items():
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu")
            self._copies[name].copy_(tensor)
        return list(state)
