"""An update is all or nothing, whatever raises and however many optimiser steps it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_trainer import outcome, same, trainer_for, weights
from torch import Tensor

from aepo.learning.nonfinite import NonFiniteError, first_nonfinite
from aepo.learning.snapshot import Snapshot
from aepo.parallel import OneProcess
from aepo.run.checkpoint import list_checkpoints
from aepo.trainer import Trainer

STEPS = ("train.steps=3", "checkpoint.every=0", "eval.every=0")


def moments(trainer: Trainer) -> list[Tensor]:
    state = trainer.learner.optimizer.state
    found = [state[p] for group in trainer.learner.optimizer.param_groups for p in group["params"] if p in state]
    return [value.clone() for entry in found for _, value in sorted(entry.items())]


def fail_in(trainer: Trainer, nth: int, error: BaseException) -> None:
    """The nth call of AdamW changes half of the parameters and then raises, as it does where memory runs out."""
    optimizer, calls = trainer.learner.optimizer, [0]
    inner = optimizer.step

    def step() -> None:
        calls[0] += 1
        if calls[0] < nth:
            inner()
            return
        groups = optimizer.param_groups
        optimizer.param_groups = [{**groups[0], "params": groups[0]["params"][::2]}]
        inner()
        optimizer.param_groups = groups
        raise error

    optimizer.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), SystemExit(3)])
@pytest.mark.parametrize("several", [(), ("train.minibatches=2", "train.epochs=2")])
@pytest.mark.parametrize("finished", [0, 1])
def test_an_error_inside_of_the_optimizer(
    tmp_path: Path, error: BaseException, several: tuple[str, ...], finished: int
) -> None:
    """What is saved is the step before it, and what goes on from there is the run that never failed."""
    whole = trainer_for(tmp_path / "whole", *STEPS, *several)
    whole.train()
    trainer = trainer_for(tmp_path / "run", *STEPS, *several)
    for _ in range(finished):
        trainer.train_step()
    before = (weights(trainer), moments(trainer))
    assert bool(before[1]) == bool(finished)
    # The last optimiser step of the next update: in the first case its only one.
    fail_in(trainer, 4 if several else 1, error)
    with pytest.raises(type(error)):
        trainer.train()
    assert same(before[0], weights(trainer))
    assert same(before[1], moments(trainer))
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")] == [finished]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    resumed = trainer_for(tmp_path / "run", *STEPS, *several, resume_step=finished)
    resumed.train()
    assert same(weights(resumed), weights(whole))
    assert same(moments(resumed), moments(whole))
    assert outcome(tmp_path / "run")[0] == outcome(tmp_path / "whole")[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_taken_back(tmp_path: Path, bad: float) -> None:
    trainer = trainer_for(tmp_path / "run", *STEPS)
    trainer.train_step()
    before, inner = weights(trainer), trainer.learner.optimizer.step

    def step() -> None:
        inner()
        with torch.no_grad():
            trainer.learner.model.model.layers[1].mlp.up_proj.weight[3, 4] = bad

    trainer.learner.optimizer.step = step  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite after .* rate 0\.01"):
        trainer.train()
    assert same(before, weights(trainer))
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")] == [1]


def test_first_nonfinite() -> None:
    tensors = {"large": torch.full((3,), 3e38), "none": torch.zeros(0), "whole": torch.tensor([1 << 62])}
    assert first_nonfinite(tensors.items()) is None
    for bad in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            one = torch.zeros(5, 7, dtype=dtype)
            one[4, 2] = bad
            assert first_nonfinite([*tensors.items(), ("bad", one), ("worse", one)]) == "bad"


def test_the_copy_is_one_in_host_memory_and_of_trained_parameters_alone() -> None:
    model = torch.nn.Module()
    model.trained = trained = torch.nn.Parameter(torch.ones(10))
    model.frozen = frozen = torch.nn.Parameter(torch.ones(10), requires_grad=False)
    optimizer = torch.optim.AdamW([trained])
    snapshot = Snapshot(OneProcess(), model, optimizer)
    places = []
    for _ in range(3):
        with snapshot.all_or_nothing():
            trained.grad = torch.ones(10)
            optimizer.step()
        copies = snapshot._copies.values()
        places.append([copy.data_ptr() for copy in copies])
        assert {copy.device.type for copy in copies} == {"cpu"}
    assert frozen.data_ptr() not in places[-1]
    assert [len(one) for one in places] == [1, 4, 4]  # the weight; its moments and step, which the first update made
    assert places[1] == places[2]
    address, value = trained.data_ptr(), trained.detach().clone()
    trained.grad = torch.full((10,), 2.0)
    with pytest.raises(ZeroDivisionError), snapshot.all_or_nothing():  # noqa: PT012
        optimizer.step()
        raise ZeroDivisionError
    assert (trained.data_ptr(), optimizer.state[trained]["step"].item()) == (address, 3.0)
    assert torch.equal(trained, value)
