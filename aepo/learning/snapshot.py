"""The state of training before an update, so that a failed one can be taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Snapshot:
    """A copy of the weights that are trained and of their moments, in host memory that is reused by every update.

    AdamW in float32: 12 bytes per trained parameter, and reading them once per update. Device memory stays as it is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._copies: dict[tuple[int, str], Tensor] = {}  # by parameter, and name in its state; "": the parameter

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the block raises, weights and moments are as they were before it, to the bit and in the same memory.

        Nothing interrupts the block asynchronously (aepo/interrupt.py).
        """
        self._take()
        try:
            yield
        except BaseException:
            self._restore()
            raise

    @torch.no_grad()
    def _take(self) -> None:
        for key, tensor in self._tensors():
            if key not in self._copies:
                self._copies[key] = torch.empty_like(tensor, device="cpu")
            self._copies[key].copy_(tensor)

    @torch.no_grad()
    def _restore(self) -> None:
        for key, tensor in self._tensors():
            if key in self._copies:
                tensor.copy_(self._copies[key])
        for index, parameter in enumerate(self._parameters):
            if (index, "step") not in self._copies:  # its first update, which made the moments
                self._optimizer.state.pop(parameter, None)

    def _tensors(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        for index, parameter in enumerate(self._parameters):
            yield (index, ""), parameter
            for name, value in self._optimizer.state.get(parameter, {}).items():
                yield (index, name), value
