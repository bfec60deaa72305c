"""The trainer speaks to its weights through one Parallel alone: here one that is told from OneProcess in all it says.

What is trained is another object than the model that was loaded, a whole weight is the double of what is here, a sum is
seven times what this process has, and a norm is a number that nobody would come to otherwise.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import same, trainer_for, weights
from torch import Tensor
from transformers import PreTrainedModel

from aepo.files.tensors import sha256_of_tensors
from aepo.parallel import OneProcess, Weights
from aepo.trainer import Trainer

SETTINGS = ("train.steps=2", "train.minibatches=2", "policy.kl_coef=0.1", "optimizer.max_grad_norm=0.5")


class Recorded(OneProcess):
    def __init__(self) -> None:
        self.shards: list[tuple[PreTrainedModel, bool, PreTrainedModel]] = []  # given, frozen, returned
        self.clips: list[tuple[PreTrainedModel, float]] = []
        self.wholes: list[tuple[PreTrainedModel, Weights]] = []
        self.states: list[tuple[PreTrainedModel, torch.optim.Optimizer, bool]] = []
        self.loads: list[tuple[PreTrainedModel, torch.optim.Optimizer | None]] = []

    def shard(self, model: PreTrainedModel, *, frozen: bool = False) -> PreTrainedModel:
        made = copy.deepcopy(model).requires_grad_(not frozen)
        self.shards.append((model, frozen, made))
        return made

    def clip(self, model: PreTrainedModel, max_norm: float) -> float:
        super().clip(model, max_norm)
        self.clips.append((model, max_norm))
        return 1000.0 * len(self.clips)

    def full_weights(self, model: PreTrainedModel) -> Weights:
        whole = ((names, 2 * tensor) for names, tensor in super().full_weights(model))
        self.wholes.append((model, whole))
        return whole

    def state(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, whole: bool) -> dict[str, Tensor]:
        self.states.append((model, optimizer, whole))
        return super().state(model, optimizer, whole=whole)

    def load(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None, entries: Any) -> None:
        self.loads.append((model, optimizer))
        OneProcess().load(model, optimizer, entries)  # into the weights that are here, which are not the whole ones

    def sum(self, value: float) -> float:
        return 7 * value


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """A trainer with a Recorded, which is its only one: whatever else it would make itself is a plain one."""

    def made(directory: Path, *overrides: str, resume_step: int | None = None) -> Trainer:
        given = iter([Recorded()])
        monkeypatch.setattr("aepo.trainer.OneProcess", lambda: next(given, None) or OneProcess())
        return trainer_for(directory, *SETTINGS, *overrides, resume_step=resume_step)

    return made


def doubled(model: PreTrainedModel) -> dict[str, Tensor]:
    return {names[0]: 2 * tensor for names, tensor in OneProcess().full_weights(model)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def refreshed(trainer: Trainer) -> list[tuple[int, Weights, int]]:
    """What the engine is given from now on, and how often whole weights had been asked for by then."""
    seen, inner = [], trainer.engine.refresh

    def refresh(version: int, given: Weights) -> None:
        seen.append((version, given, len(trainer.parallel.wholes)))
        inner(version, given)

    trainer.engine.refresh = refresh  # type: ignore[method-assign]
    return seen


def test_model_and_reference_are_what_it_shards(tmp_path: Path, make: Callable[..., Trainer]) -> None:
    trainer = make(tmp_path / "run")
    (loaded, frozen, model), (given, reference_is_frozen, reference) = trainer.parallel.shards
    assert loaded is given is trainer.language_model.model
    assert (frozen, reference_is_frozen) == (False, True)
    assert trainer.learner.model is model
    assert trainer.learner._reference is reference
    start = copy.deepcopy(model)
    trainer.train()
    assert not same([*start.parameters()], weights(trainer))
    assert same([*start.parameters()], [*trainer.language_model.model.parameters()])
    assert same([*start.parameters()], [*reference.parameters()])


def test_the_norm_is_what_it_says(tmp_path: Path, make: Callable[..., Trainer]) -> None:
    """And nothing else scales the gradients: as many calls as optimiser steps, two in each of two steps."""
    trainer = make(tmp_path / "run")
    trainer.train()
    assert len(trainer.parallel.clips) == 4
    assert all(model is trainer.learner.model and limit == 0.5 for model, limit in trainer.parallel.clips)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["optimizer.grad_norm"] for line in lines] == [1500.0, 3500.0]


def test_whole_weights_are_what_it_says(tmp_path: Path, make: Callable[..., Trainer]) -> None:
    """Those that the engine gets, those of a checkpoint, and those that the hash and the count are of."""
    trainer = make(tmp_path / "run")
    start, seen = doubled(trainer.learner.model), refreshed(trainer)
    trainer.train()
    assert [version for version, _, _ in seen] == [1, 2]
    assert all(given is trainer.parallel.wholes[asked - 1][1] for _, given, asked in seen)
    assert len({asked for _, _, asked in seen}) == 2, "an iterator of its own for each"
    assert all(model is trainer.learner.model for model, _ in trainer.parallel.wholes)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["starting_weights"] == sha256_of_tensors(start)
    assert facts["model"]["parameters"] == 7 * sum(p.numel() for p in trainer.learner.model.parameters())
    saved = tmp_path / "run" / "checkpoints" / "step_000002"
    assert_equal(load_file(saved / "model.safetensors"), doubled(trainer.learner.model))


def test_the_state_is_what_it_says(tmp_path: Path, make: Callable[..., Trainer]) -> None:
    """A checkpoint asks for the whole of it, an update for the part that is here."""
    trainer = make(tmp_path / "run", "eval.every=0", "checkpoint.every=0")
    model, optimizer = trainer.learner.model, trainer.learner.optimizer
    trainer.train()
    assert all(one[0] is model and one[1] is optimizer for one in trainer.parallel.states)
    # Saved after the first evaluation, as the best so far, and after the last step.
    assert [whole for _, _, whole in trainer.parallel.states] == [True, False, False, True]
    live = OneProcess().state(model, optimizer, whole=True)
    moments = {name: value for name, value in live.items() if "|" in name}
    saved = tmp_path / "run" / "checkpoints" / "step_000002"
    assert_equal(load_file(saved / "optimizer.safetensors"), moments)
    assert trainer.parallel.loads == []


def test_it_takes_an_update_back_and_loads_a_checkpoint(tmp_path: Path, make: Callable[..., Trainer]) -> None:
    trainer = make(tmp_path / "run")
    trainer.train_step()
    before = weights(trainer)

    def apply(*_: object) -> None:
        with torch.no_grad():
            trainer.learner.model.model.norm.weight.zero_()
        raise ZeroDivisionError

    trainer.learner.apply = apply  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert same(before, weights(trainer))
    resumed = make(tmp_path / "run", resume_step=1)
    for one in (trainer, resumed):
        ((model, optimizer),) = one.parallel.loads
        assert model is one.learner.model
        assert optimizer is one.learner.optimizer
    assert same([2 * value for value in before], weights(resumed)), "a whole weight is the double of what was here"
