"""A run goes on from a checkpoint with the records that came before it, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_trainer import outcome, trainer_for

from aepo.run.records import fingerprints, require_records

STEPS = ("train.steps=3", "checkpoint.every=1", "checkpoint.keep=9", "eval.every=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    trainer_for(run, *STEPS).train()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evals.jsonl"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:-1],  # the newline alone: the record is no longer one
        lambda text: text[:-40],
        lambda text: "".join(text.splitlines(keepends=True)[:1]),
        lambda text: "".join(text.splitlines(keepends=True)[1:]),
        lambda text: text.replace('"step": 2', '"step": 2, "mine": 1'),
    ],
)
def test_records_that_are_not_those_of_the_checkpoint(run: Path, name: str, change: object) -> None:
    path = run / name
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    before = {one: one.read_bytes() for one in run.rglob("*") if one.is_file() and one.name != ".lock"}
    with pytest.raises(ValueError, match=f"{name}: (was changed|has .* bytes, expected)"):
        trainer_for(run, *STEPS, resume_step=3)
    assert {one: one.read_bytes() for one in run.rglob("*") if one.is_file() and one.name != ".lock"} == before


def test_a_checkpoint_of_another_run(run: Path, tmp_path: Path) -> None:
    """Of the same shapes, with whole checksums."""
    trainer_for(tmp_path / "other", *STEPS, "run.seed=1").train()
    shutil.rmtree(run / "checkpoints" / "step_000003")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step_000003", run / "checkpoints" / "step_000003")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: .* is of another run"):
        trainer_for(run, *STEPS, resume_step=3)


def test_an_older_checkpoint_may_still_fit(run: Path, finished: Path) -> None:
    (run / "metrics.jsonl").write_text("".join(lines(run / "metrics.jsonl")[:2]))
    trainer_for(run, *STEPS, resume_step=2).train()
    assert outcome(run) == outcome(finished)


def test_a_checkpoint_of_before_says_nothing(run: Path) -> None:
    require_records(run, {}, run)
    written = fingerprints(run)
    assert written["metrics.jsonl"][0] == (run / "metrics.jsonl").stat().st_size
    with (run / "metrics.jsonl").open("a") as file:
        file.write("later\n")
    require_records(run, written, run)
    state = json.loads((run / "checkpoints" / "step_000003" / "state.json").read_text())
    assert state["records"] == written


def test_fewer_steps_than_were_made(run: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.steps = 2: expected 3 or more"):
        trainer_for(run, *STEPS, "train.steps=2", resume_step=3)


def test_settings_that_are_not_those_of_the_checkpoint_are_said_and_recorded(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where they have come into the run's own config.yaml."""
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("questions: 4", "questions: 3"))
    trainer_for(run, *STEPS, "eval.questions=3", "train.steps=4", resume_step=3).train()
    said = "eval.questions was 4 and is 3"
    assert f"not as in the run: {said}" in capsys.readouterr().out
    assert said in json.loads((run / "run.json").read_text())["resumed"][-1]["changed"]
