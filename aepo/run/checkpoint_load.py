"""From a checkpoint into a model and its optimizer, which may have another type than those that were saved.

The master of a weight is that weight, more exactly. So a float32 model takes masters as its weights, and one of 16 bits
takes float32 weights as masters; where neither was saved, a master is the weight of 16 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from aepo.learning.optimizer import has_master
from aepo.parallel import OneProcess, Parallel, trained
from aepo.run.checkpoint import CheckpointError, verified_state
from aepo.run.checkpoint_fit import MASTER, MOMENTS, model_problem, moments_problem


def load_weights(path: Path, model: PreTrainedModel) -> None:
    """Verify the checkpoint and load its weights into `model`, in place. CheckpointError, in one line and before a
    weight is changed, where it is damaged, newer than this program, or of another model."""
    parallel = OneProcess()
    verified_state(path)
    _refuse(path, model_problem(path, model, parallel))
    parallel.load(model, None, _weights(path, [names for names, _ in parallel.full_weights(model)]))


def load_state(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, parallel: Parallel) -> None:
    """As `load_weights`, and what the optimizer keeps, which must be of this one too."""
    state = verified_state(path)
    _refuse(path, model_problem(path, model, parallel))
    _refuse(path, moments_problem(path, trained(model, optimizer), optimizer_name(optimizer), state))
    names = [names for names, _ in parallel.full_weights(model)]
    masters = {name for name, parameter in trained(model, optimizer).items() if has_master(parameter)}
    parallel.load(model, optimizer, _weights_and_moments(path, names, masters))


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Of the class of torch that it is, or is made of: that says which numbers it keeps."""
    return next(one.__name__ for one in type(optimizer).__mro__ if one.__module__.startswith("torch.optim"))


def _refuse(path: Path, problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(f"cannot load checkpoint {path}: {problem}")


def _weights(path: Path, names: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time: a model on a GPU is not there twice. names: of each tensor; checkpoints of before have
    tied ones under another of them."""
    with safe_open(path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        for several in names:
            yield several[0], file.get_tensor(next(name for name in several if name in stored))


def _weights_and_moments(
    path: Path, names: Sequence[tuple[str, ...]], masters: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """masters: names of weights that have one in the optimizer."""
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        stored = set(file.keys())
        for name, weight in _weights(path, names):
            exact = file.get_tensor(f"{name}|{MASTER}") if f"{name}|{MASTER}" in stored else weight
            yield name, exact
            if f"{name}|step" in stored:
                yield from ((f"{name}|{key}", file.get_tensor(f"{name}|{key}")) for key in MOMENTS)
                if name in masters:
                    yield f"{name}|{MASTER}", exact
