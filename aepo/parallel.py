"""Where the weights that are trained are: six verbs, behind which a model is whole in this process, or cut.

What trains, saves and hands over weights speaks to these alone, so that shards, adapters and offloaded weights are
other objects with the same verbs, and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

Weights = Iterator[tuple[tuple[str, ...], Tensor]]
"""The names of each tensor of a model (tied ones have several, the first is the one to store it under), and it."""


class Parallel(Protocol):
    """How a model and the state of its optimizer are spread over processes. Every process calls every verb."""

    is_main: bool
    """This process writes the files and talks to people."""

    def shard(self, model: PreTrainedModel, *, frozen: bool = False) -> PreTrainedModel:
        """What this process computes with: the model itself, changed in place. frozen: a copy as the model is now,
        which no update reaches."""
        ...

    def clip(self, model: PreTrainedModel, max_norm: float) -> float:
        """Scale the gradients down to this norm; returns what it was, over all weights of all processes."""
        ...

    def full_weights(self, model: PreTrainedModel) -> Weights:
        """Whole, one after the other, buffers of the state dictionary included; each may be gone when the next one
        comes."""
        ...

    def state(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, whole: bool) -> dict[str, Tensor]:
        """What an update changes, live: trained weights by name, and by NAME|KEY the numbers that the optimizer keeps
        for each. whole: as one process would have them, else the part of this one."""
        ...

    def load(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, entries: Iterable[tuple[str, Tensor]]
    ) -> None:
        """Put such a state back, in place, one tensor after the other; also weights that are not trained, and buffers.
        What the optimizer keeps and has no entry, as it was never updated then, is dropped."""
        ...

    def sum(self, value: float) -> float:
        """Over all processes, of something that each has a part of."""
        ...


class OneProcess:
    """All of it here."""

    is_main = True

    def shard(self, model: PreTrainedModel, *, frozen: bool = False) -> PreTrainedModel:
        return copy.deepcopy(model).requires_grad_(False) if frozen else model

    def clip(self, model: PreTrainedModel, max_norm: float) -> float:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()

    def full_weights(self, model: PreTrainedModel) -> Weights:
        """The first name of tied ones is that of `embed_tokens` and not of `lm_head`, which vLLM passes over where they
        are tied."""
        tied: dict[Any, list[str]] = {}
        state = model.state_dict()
        for name, tensor in state.items():
            same = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            tied.setdefault((*same, tensor.dtype) if tensor.numel() else name, []).append(name)
        for names in tied.values():
            yield tuple(names), state[names[0]]

    def state(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, whole: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in trained(model, optimizer).items():
            found[name] = parameter
            found |= {f"{name}|{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
        return found

    @torch.no_grad()
    def load(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, entries: Iterable[tuple[str, Tensor]]
    ) -> None:
        weights = {name: tensor for names, tensor in self.full_weights(model) for name in names}
        parameters = {} if optimizer is None else trained(model, optimizer)
        there = {} if optimizer is None else self.state(model, optimizer, whole=True)
        kept: dict[Tensor, dict[str, Tensor]] = {}
        for name, value in entries:
            parameter_name, _, key = name.partition("|")
            if not key:
                weights[name].copy_(value)
                continue
            parameter = parameters[parameter_name]
            state = kept.setdefault(parameter, {})
            if name in there:
                state[key] = there[name].copy_(value)
            else:  # AdamW keeps `step` on the host
                place = value if key == "step" else value.to(parameter.device, state_dtype(parameter))
                state[key] = place.clone()
        if optimizer is not None:
            for parameter in parameters.values():
                optimizer.state.pop(parameter, None)
            optimizer.state.update(kept)

    def sum(self, value: float) -> float:
        return value


def trained(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """The optimizer's parameters by their names in the model."""
    theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in theirs}


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Of what an optimizer keeps for a parameter: 16 bits are too few (`aepo.learning.optimizer`)."""
    return torch.float32 if parameter.dtype.itemsize < 4 else parameter.dtype


def number_of_weights(parallel: Parallel, model: PreTrainedModel) -> int:
    return int(parallel.sum(sum(parameter.numel() for parameter in model.parameters())))
