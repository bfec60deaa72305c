"""What is left of a run whose engine fails, or that a signal ends: the last step that the optimizer has done."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_trainer import outcome, trainer_for

from aepo.parallel import Weights
from aepo.run.checkpoint import CheckpointError, list_checkpoints
from aepo.run.log import read_records
from aepo.types import RolloutTree


def test_an_engine_that_cannot_be_refreshed_costs_no_step(tmp_path: Path) -> None:
    """The optimizer has stepped: what is saved is that step, and a resumed run goes on from it."""
    trainer_for(tmp_path / "whole", "train.steps=2").train()
    trainer = trainer_for(tmp_path / "parts", "train.steps=2", "checkpoint.every=0")
    calls = []

    def refresh(version: int, weights: Weights) -> None:
        raise OSError("no room for the new weights")

    trainer.engine.refresh = refresh  # type: ignore[method-assign]
    trainer.engine.close = lambda: calls.append("close")  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no room"):
        trainer.train()
    assert calls == ["close"]
    assert [record["step"] for record in read_records(tmp_path / "parts" / "metrics.jsonl")] == [1]
    resumed = trainer_for(tmp_path / "parts", "train.steps=2", resume_step=1)
    resumed.train()
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_a_request_to_terminate_is_an_interruption(tmp_path: Path) -> None:
    """Schedulers send SIGTERM a while before they kill."""
    trainer = trainer_for(tmp_path / "run")
    before, rollout = signal.getsignal(signal.SIGTERM), trainer.sampler.rollout

    def terminated(*arguments: object, **options: object) -> object:
        if trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return rollout(*arguments, **options)  # type: ignore[arg-type]

    trainer.sampler.rollout = terminated  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_that_also_ends_the_engine_is_an_interruption(tmp_path: Path) -> None:
    """A terminal sends it to every process of the run: the refresh then fails, while the trainer waits for its end."""
    trainer = trainer_for(tmp_path / "run")

    def refresh(version: int, weights: Weights) -> None:
        signal.raise_signal(signal.SIGINT)
        raise ConnectionError("the engine is gone")

    trainer.engine.refresh = refresh  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


def test_a_signal_while_the_last_files_are_written_is_not_lost(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "train.steps=1")
    close = trainer.log.close

    def closed(*arguments: str | None) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(*arguments)  # type: ignore[arg-type]

    trainer.log.close = closed  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_a_state_that_an_interrupted_run_cannot_save_is_an_error(tmp_path: Path) -> None:
    """Whoever pressed Ctrl-C believes that the last step is kept."""
    trainer = trainer_for(tmp_path / "run")

    def refresh(version: int, weights: Weights) -> None:
        signal.raise_signal(signal.SIGINT)

    def save(step: int) -> None:
        if trainer.interrupt.came:
            raise CheckpointError("no room for a checkpoint")

    trainer.engine.refresh, trainer.saver.save = refresh, save  # type: ignore[method-assign]
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as ended:
        trainer.train()
    assert isinstance(ended.value, CheckpointError)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["status"], "is not saved: no room for a checkpoint" in run["reason"]) == ("failed", True)


def test_a_signal_cannot_keep_a_failed_run_from_saving(tmp_path: Path) -> None:
    """Also where the error came at the door of what may be interrupted, so that nothing has closed it."""
    trainer = trainer_for(tmp_path / "run")
    save = trainer.saver.save

    def rollout(*arguments: object, **options: object) -> list[RolloutTree]:
        raise RuntimeError("the engine is gone")

    def interrupted_save(step: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(step)

    @contextlib.contextmanager
    def left_open() -> Iterator[None]:
        trainer.interrupt._allowed = True
        yield

    trainer._evaluate_if_due = lambda: None  # type: ignore[method-assign]
    trainer.sampler.rollout, trainer.saver.save = rollout, interrupted_save  # type: ignore[method-assign]
    trainer.interrupt.allowed = left_open  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, KeyboardInterrupt)) as error:  # the latter would end all tests
        trainer.train()
    assert error.type is RuntimeError
    assert [one.step for one in list_checkpoints(tmp_path / "run" / "checkpoints")] == [0]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
