"""The log of a run: what reaches the disk, what is tried again, and what a resumed run says of itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from disk_toys import flushed, full_disk, recorded

from aepo.config import load_config
from aepo.run.directory import RunDirectory
from aepo.run.files import FORMAT, read_facts
from aepo.run.log import RunLog


def log_of(path: Path, *, resumed: bool = False) -> RunLog:
    config = load_config(None, ["log.tensorboard=false"])
    held = RunDirectory.claim(path, resume_step=0 if resumed else None)
    return RunLog(held, config, {"model": {}}, 0, resumed=resumed)


def test_what_was_logged_before_is_on_the_disk_after_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(tmp_path / "run")
    log.step({"step": 1})
    log.evaluation({"step": 1, "success": 0.5})
    events = recorded(monkeypatch)
    log.flush()
    assert events == [flushed(tmp_path / "run" / name) for name in ("metrics.jsonl", "evals.jsonl")]


def test_trees_and_answers_that_fail_while_they_are_written_are_tried_again(tmp_path: Path) -> None:
    log = log_of(tmp_path / "run")
    for name in ("trees", "answers"):
        (tmp_path / "run" / name).mkdir()
    with full_disk(0):
        with pytest.raises(OSError, match="File too large"):
            log.trees(1, [], [], vocab_size=5, temperature=1.0, decode=str)
        with pytest.raises(OSError, match="File too large"):
            log.flush()
    log.flush()
    assert json.loads((tmp_path / "run" / "trees" / "step_000001.json").read_text())["step"] == 1


def test_a_resumed_run_has_the_time_of_both_and_the_version_that_writes_it(tmp_path: Path) -> None:
    log = log_of(tmp_path / "run")
    log.close("interrupted")
    log.directory.release()
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": FORMAT - 1, "wall_seconds": 1000.0}))
    began = time.perf_counter()
    resumed = log_of(tmp_path / "run", resumed=True)
    resumed.close("finished")
    facts = read_facts(tmp_path / "run")
    assert facts["version"] == FORMAT
    assert 1000 <= facts["wall_seconds"] <= 1000 + time.perf_counter() - began


@pytest.mark.parametrize("status", ["finished", "interrupted", "failed"])
def test_the_boards_are_told_whether_the_run_has_finished(tmp_path: Path, status: str) -> None:
    class Told:
        def write(self, *args: object) -> None: ...

        def close(self, *, finished: bool) -> None:
            said.append(finished)

    said: list[bool] = []
    log = log_of(tmp_path / "run")
    log._boards._boards["own"] = Told()
    log.close(status)
    assert said == [status == "finished"]
