"""What a run leaves of a step and of an evaluation: in this order, complete, and of the weights that it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_toys import full_disk
from test_trainer import trainer_for

from aepo.run.checkpoint import list_checkpoints
from aepo.run.log import RunLog, read_records
from aepo.run.records import fingerprints


def on_a_full_disk(log: RunLog, *names: str) -> None:
    """From now on these methods find no room; whatever else is written does."""

    def limited(call: Callable[..., None]) -> Callable[..., None]:
        def method(*arguments: object) -> None:
            with full_disk(0):
                call(*arguments)

        return method

    for name in names:
        setattr(log, name, limited(getattr(log, name)))


def saved(run: Path) -> list[int]:
    return [one.step for one in list_checkpoints(run / "checkpoints")]


def test_trees_name_the_weights_that_sampled_them(tmp_path: Path) -> None:
    """Step n samples with the weights after n - 1 steps, also where a run goes on."""
    run = tmp_path / "run"
    trainer_for(run, "train.steps=2", "log.trees_every=1").train()
    trainer_for(run, "train.steps=4", "log.trees_every=1", resume_step=2).train()
    versions = {}
    for file in (run / "trees").iterdir():
        found = json.loads(file.read_text())
        nodes = [node for entry in found["trees"] for node in entry["tree"]["nodes"]]
        versions[found["step"]] = {node["version"] for node in nodes if node["source"] == "model"}
    assert versions == {1: {0}, 2: {1}, 3: {2}, 4: {3}}


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 5]), (2, [0, 2, 4, 5]), (3, [0, 3, 5]), (5, [0, 5])])
def test_a_checkpoint_is_saved_after_so_many_steps(tmp_path: Path, every: int, steps: list[int]) -> None:
    """And after the first evaluation, the best so far, and the last step."""
    settings = ("train.steps=5", "eval.every=0", "checkpoint.keep=9", f"checkpoint.every={every}")
    trainer_for(tmp_path / "run", *settings).train()
    assert saved(tmp_path / "run") == steps


def test_a_checkpoint_that_finds_a_record_unwritten_writes_it_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = trainer_for(run)
    on_a_full_disk(trainer.log, "step")
    with pytest.raises(OSError, match="File too large"):
        trainer.train()
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [1]
    assert saved(run) == [0, 1]
    state = json.loads((run / "checkpoints" / "step_000001" / "state.json").read_text())
    assert state["records"] == fingerprints(run), "those that it came after"


def test_no_checkpoint_is_ahead_of_records_that_cannot_be_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = trainer_for(run)
    on_a_full_disk(trainer.log, "step", "flush")
    with pytest.raises(OSError, match="File too large"):
        trainer.train()
    assert saved(run) == [0]
    assert "the state after step 1 is not saved: " in json.loads((run / "run.json").read_text())["reason"]


def test_a_step_whose_record_fails_has_its_trees_and_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    trainer = trainer_for(run)
    on_a_full_disk(trainer.log, "step")
    with pytest.raises(OSError, match="File too large"):
        trainer.train()
    assert json.loads((run / "trees" / "step_000001.json").read_text())["step"] == 1
    said = capsys.readouterr().out
    assert "held-out after step 0: " in said
    assert "step 1/3" not in said


@pytest.mark.parametrize("name", ["answers", "evaluation"])
def test_an_evaluation_is_said_after_its_record_which_comes_after_its_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tmp_path / "run"
    trainer = trainer_for(run)
    on_a_full_disk(trainer.log, name)
    with pytest.raises(OSError, match="File too large"):
        trainer.train()
    assert "held-out after step" not in capsys.readouterr().out
    assert (run / "answers" / "step_000000.jsonl").exists(), "there is room again at the end"
    kept = [0] if name == "evaluation" else []  # without one, a run that goes on evaluates again
    assert [record["step"] for record in read_records(run / "evals.jsonl")] == kept
