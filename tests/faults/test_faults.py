"""A sample of the faults that `make test-faults` puts into runs, and that the judge of them would see a lie."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "aepo"))

import judge
import safetensors.torch
from fault import Fault
from places import _Instrument
from runs import STEPS, Ended, Prepared, Scenario, Truth, files_of, state_of
from test_trainer import outcome, trainer_for

from aepo.run.checkpoint import list_checkpoints

SAMPLE = 32  # 40 s of one core with what comes before the first


@pytest.mark.slow
def test_a_sample_of_faults_is_survived() -> None:
    program = Path(__file__).with_name("inject.py")
    done = subprocess.run(
        [sys.executable, program, "--sample", str(SAMPLE), "--jobs", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("one signal", "several signals", "kill -9", "failing write", "error in a call", "two processes"):
        tried = re.search(rf"^{kind} +\d+ +(\d+)", done.stdout, re.MULTILINE)
        assert tried is not None, done.stdout
        assert int(tried[1]) > 0, done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    directory = tmp_path_factory.mktemp("finished") / "run"
    trainer_for(directory, f"train.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=99").train()
    states = {one.step: state_of(one.path) for one in list_checkpoints(directory / "checkpoints")}
    assert set(states) >= {1, 2, 3}
    truth = Truth(states, outcome(directory), files_of(directory))
    return Prepared(Scenario("finished", ()), directory, {0: truth})


def change_a_weight(run: Path) -> None:
    """And its checksum: whole, but not what the run was."""
    checkpoint = run / "checkpoints" / "step_000002"
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    name, tensor = next(iter(weights.items()))
    tensor.view(-1)[0] += 1e-6
    safetensors.torch.save_file({**weights, name: tensor}, checkpoint / "model.safetensors", {"format": "pt"})
    names = [line.split("  ")[1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()]
    sums = subprocess.run(["sha256sum", *names], cwd=checkpoint, capture_output=True, text=True, check=True)
    (checkpoint / "SHA256SUMS").write_text(sums.stdout)


def drop_a_moment(run: Path) -> None:
    (run / "checkpoints" / "step_000003" / "optimizer.safetensors").unlink()


def repeat_a_record(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + metrics.read_text().splitlines()[-1] + "\n")


def leave_a_temporary(run: Path) -> None:
    (run / "checkpoints" / ".writing_000003").mkdir()


def lose_answers(run: Path) -> None:
    (run / "answers" / "step_000002.jsonl").unlink()


def claim_to_run(run: Path) -> None:
    path = run / "run.json"
    path.write_text(path.read_text().replace('"finished"', '"running"', 1))


def replace_a_note(run: Path) -> None:
    (run / "notes.txt").write_text("ours")


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        (None, []),
        (change_a_weight, ["not the states of an undisturbed run"]),
        (drop_a_moment, ["listed, but corrupt checkpoint", "the last checkpoint is not"]),
        (repeat_a_record, ["metrics differ from the undisturbed run's; of steps 1 2 3 3"]),
        (leave_a_temporary, ["left behind: checkpoints/.writing_000003"]),
        (lose_answers, ["missing: answers/step_000002.jsonl"]),
        (claim_to_run, ["at the end, status running"]),
        (replace_a_note, ["not the run's, and changed: notes.txt"]),
    ],
)
def test_the_judge_sees(
    tmp_path: Path, finished: Prepared, lie: Callable[[Path], None] | None, found: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.directory, run)
    foreign = judge.Foreign(run, tmp_path / "outside")
    foreign.plant_early()
    foreign.plant_late()
    if lie is not None:
        lie(run)
    problems = [*judge.checkpoint_problems(run, finished), *foreign.problems()]
    if lie is not drop_a_moment:
        problems += judge.finished_problems(run, finished, foreign.names)
    assert len(problems) == len(found[:1])
    assert all(problem.startswith(text) for problem, text in zip(problems, found, strict=False)), problems


@pytest.mark.parametrize(
    ("fault", "code", "status", "err", "found"),
    [
        ("one/SIGINT@trainer.py:1#1", 130, "interrupted", "interrupted", None),
        ("one/SIGINT@trainer.py:1#1", 130, "interrupted", "Traceback (most recent call last):", "Traceback on stderr"),
        ("one/SIGTERM@trainer.py:1#1", -15, "running", "", "exit code -15, status running"),
        ("one/SIGHUP@trainer.py:1#1", 130, "failed", "", "interrupted, status failed"),
        ("one/SIGINT@trainer.py:1#1", 0, "finished", "", "signal lost"),
        ("one/SIGKILL@trainer.py:1#1", -9, "running", "", None),
        ("one/ENOSPC@open:run.json#1", 1, "failed", "error: no room", None),
        ("one/ENOSPC@open:run.json#1", 1, "running", "error: no room", "failed, status running"),
        ("one/ENOSPC..@open:run.json#1", 1, "running", "error: no room", None),
        ("one/MemoryError@step#1", 0, "finished", "", "error lost"),
    ],
)
def test_the_judge_sees_how_it_ended(
    tmp_path: Path, fault: str, code: int, status: str, err: str, found: str | None
) -> None:
    (tmp_path / "run.json").write_text(f'{{"status": "{status}", "reason": "it was so"}}')
    ended = Ended(code, "", err, left=False, seconds=0.0)
    problems = judge.ending_problems(Fault.read(fault), ended, tmp_path, before=None, steps_then=1)
    if found is None:
        assert problems == []
    else:
        assert problems[0].startswith(found)


def test_places_are_before_statements_and_after_blocks() -> None:
    import ast

    text = '''
def f(x):
    """Text."""
    with x:
        a = 1
    try:
        return a
    finally:
        del a

class C:
    y = 1
    def g(self): pass
'''
    tree = ast.fix_missing_locations(_Instrument("m.py").visit(ast.parse(text)))
    places = [node.args[0].value for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert sorted(places) == [
        *("m.py:13", "m.py:13+", "m.py:4", "m.py:5", "m.py:5+", "m.py:6", "m.py:7", "m.py:9", "m.py:9+", "m.py:9+")
    ]
    assert ast.get_docstring(tree.body[0]) == "Text."
