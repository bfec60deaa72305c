"""The log of a run: what reaches the disk, what is tried again, and what a resumed run says of itself."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from disk_toys import flushed, full_disk, recorded
from run_toys import claiming, content, make_run, new_log, steps

from aepo.config import Config, load_config
from aepo.report.reader import read_run
from aepo.report.summary import summary
from aepo.run.directory import RunDirectory
from aepo.run.files import FORMAT, read_facts, read_records
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


def test_a_record_that_cannot_be_written_is_kept_whole(tmp_path):
    log = new_log(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    log.step({"step": 1, "text": "a" * 100})
    size = file.stat().st_size
    with full_disk(size + 20):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                log.step({"step": step, "text": "b" * 100})
        with pytest.raises(OSError, match="File too large"):
            log.evaluation({"step": 3, "success": 0.5, "text": "c" * 200})
        assert file.stat().st_size == size, "no half line"
        assert [record["step"] for record in log.evaluations()] == [3]
        with pytest.raises(OSError, match="File too large"):
            log.flush()
    log.flush()
    log.flush()
    assert steps(file) == [1, 2, 3]
    assert steps(tmp_path / "run" / "evals.jsonl") == [3]


def test_a_run_that_lacks_records_has_not_finished(tmp_path):
    log = new_log(tmp_path / "run")
    log.step({"step": 1, "text": "a" * 10_000})
    with full_disk(9_000):  # run.json fits
        with pytest.raises(OSError, match="File too large"):
            log.step({"step": 2})
        log.close("finished")
    facts = read_facts(tmp_path / "run")
    assert facts["status"] == "failed"
    assert facts["reason"].startswith("metrics.jsonl lacks step 2: [Errno 27] File too")


def test_what_is_written_as_a_whole_stays_whole(tmp_path):
    log = new_log(tmp_path / "run")
    log.trees(1, [], [], vocab_size=5, temperature=1.0, decode=str)
    before = content(tmp_path / "run")
    for write in (
        lambda: log.trees(1, [], [], vocab_size=6, temperature=1.0, decode=str),
        lambda: log.close("finished"),
    ):
        with full_disk(10), pytest.raises(OSError, match="File too large"):
            write()
        assert content(tmp_path / "run") == before


def test_a_run_that_ends_while_it_is_set_up_says_so(tmp_path):
    held = RunDirectory.claim(tmp_path / "run")
    with full_disk(1_500), pytest.raises(OSError, match="File too large"):  # run.json fits, config.yaml does not
        RunLog(held, Config(), {}, 0, resumed=False)
    held.release()
    assert read_facts(tmp_path / "run")["status"] == "failed"
    RunDirectory.check(tmp_path / "run", overwrite=True)


def test_a_cut_off_line_is_left_out_at_the_end_only(tmp_path):
    file = tmp_path / "records.jsonl"
    assert read_records(file) == []
    for tail in ('{"st', '{"step": 2}', "\0\0\0\0"):
        file.write_text('{"step": 1, "a": "\u2028"}\n' + tail)
        assert [record["step"] for record in read_records(file)] == [1]
    for middle in ('{"st', "", "[1]", "3", "\0"):
        file.write_text(f'{{"step": 1}}\n{middle}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match=r"records.jsonl, line 2: not a record"):
            read_records(file)


def test_a_resumed_run_reads_like_one(tmp_path):
    path = tmp_path / "run"
    log = RunLog(RunDirectory.claim(path), Config(), {"model": {}}, 0, resumed=False)
    for step in (1, 2, 3):
        log.step({"step": step, "policy.loss": float("nan"), "rollout.branches_per_path": [step]})
        log.evaluation({"step": step, "success": step / 10})
        log.trees(step, [], [], vocab_size=5, temperature=1.0, decode=str)
    log.close("failed", "power cut")
    log.directory.release()
    held = RunDirectory.claim(path, resume_step=0)
    held.set_aside(2)
    resumed = RunLog(held, Config(), {"model": {}}, 2, resumed=True, changed=["a was 1 and is 2"])
    assert (read_facts(path)["status"], read_facts(path)["reason"]) == ("interrupted", "it had not begun")
    resumed.begin()
    assert (read_facts(path)["status"], read_facts(path)["reason"]) == ("running", None)
    resumed.step({"step": 3, "policy.loss": 0.5})
    resumed.close("finished")
    records = read_records(path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[0] == {"step": 1, "policy.loss": None, "rollout.branches_per_path": [1]}
    assert [record["step"] for record in resumed.evaluations()] == [1, 2]
    assert sorted(file.stem for file in (path / "trees").iterdir()) == ["step_000001", "step_000002"]
    facts = read_facts(path)
    assert (facts["status"], facts["reason"]) == ("finished", None)
    assert [entry["changed"] for entry in facts["resumed"]] == [["a was 1 and is 2"]]
    assert facts["versions"]["torch"]
    assert facts["machine"]["cores"] >= 1


def test_the_report_says_whether_a_run_goes_on_or_was_killed(tmp_path):
    path = tmp_path / "run"

    def progress() -> str:
        return summary(read_run(path, "run"))["progress"]

    more = "import shutil; shutil.copytree(sys.argv[1] + '-files', sys.argv[1], dirs_exist_ok=True); print(flush=True)"
    make_run(tmp_path / "run-files")
    for file in ("metrics.jsonl", "evals.jsonl"):
        text = (tmp_path / "run-files" / file).read_text()
        (tmp_path / "run-files" / file).write_text(text.replace("}", ', "success": 0.5}'))
    process = claiming(path, more)
    assert process.stdout is not None
    assert process.stdout.readline() + process.stdout.readline() == "held\n\n"
    assert progress().endswith("35 of 40 steps, still going")
    process.kill()
    process.wait()
    assert progress().endswith("35 of 40 steps, ended without a word: killed, or the disk was full")
    (path / ".lock").write_text((path / ".lock").read_text().replace(socket.gethostname(), "elsewhere"))
    assert progress().endswith("still going (or it died without a word)")


def test_trees_and_answers_that_could_not_be_written_are_tried_again(tmp_path):
    path = tmp_path / "run"
    log = RunLog(RunDirectory.claim(path), Config(), {"model": {}}, 0, resumed=False)
    for folder in ("trees", "answers"):
        (path / folder).write_text("in the way")
    with pytest.raises(FileExistsError):
        log.trees(1, [], [], vocab_size=5, temperature=1.0, decode=str)
    with pytest.raises(FileExistsError):
        log.answers(1, [])
    with pytest.raises(FileExistsError):
        log.flush()
    (path / "trees").unlink()
    log.close("finished")
    assert json.loads((path / "trees" / "step_000001.json").read_text())["step"] == 1
    facts = read_facts(path)
    assert facts["status"] == "failed"
    assert "answers/step_000001.jsonl is not there" in facts["reason"]
    (path / "answers").unlink()
    log.flush()
    assert (path / "answers" / "step_000001.jsonl").exists()


def test_a_full_disk_is_named_with_the_file(tmp_path):
    log = new_log(tmp_path / "run")
    with full_disk(10):
        with pytest.raises(OSError, match=r"metrics.jsonl"):
            log.step({"step": 1, "text": "b" * 100})
        with pytest.raises(OSError, match=r"trees/step_000001.json"):
            log.trees(1, [], [], vocab_size=5, temperature=1.0, decode=str)
