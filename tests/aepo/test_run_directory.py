"""A run directory: one process holds it, and whatever is killed can be done again. The other processes are real ones,
and so are their deaths."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_toys import claiming, make_run, new_log

from aepo.run.directory import RunDirectory
from aepo.run.lock import DirectoryLock, is_held


def test_a_second_process_is_told_who_holds_the_directory(tmp_path):
    path = tmp_path / "run"
    first = claiming(path)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    expected = rf"run is in use by process {first.pid} on {re.escape(socket.gethostname())} since 20.+: .*python.* -c"
    for refuse in (RunDirectory.claim, RunDirectory.check):
        for options in ({}, {"resume_step": 0}, {"overwrite": True}):
            with pytest.raises(BlockingIOError, match=expected) as error:
                refuse(path, **options)
            assert "\n" not in str(error.value)
    second = claiming(path)
    assert second.communicate()[0].startswith(f"BlockingIOError: {path} is in use by process {first.pid} ")
    first.kill()
    first.wait()
    RunDirectory.claim(path).release()


def test_of_many_that_begin_at_once_one_holds_it(tmp_path):
    for turn in range(3):
        processes = [claiming(tmp_path / str(turn) / "run") for _ in range(5)]
        lines = [process.stdout.readline() for process in processes if process.stdout is not None]
        assert sorted(line == "held\n" for line in lines) == [False] * 4 + [True], lines
        holder = processes[lines.index("held\n")].pid
        assert all(f"in use by process {holder} " in line for line in lines if line != "held\n")
        for process in processes:
            process.kill()
            process.communicate()


def test_a_directory_that_is_given_up_is_not_held_by_the_next(tmp_path):
    """It is removed while others wait for it: what they hold must be there."""
    script = """
import sys, time
from aepo.run.directory import RunDirectory
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        held = RunDirectory.claim(sys.argv[1])
    except BlockingIOError:
        continue
    held.require()
    held.release()
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_what_happened_before_the_lock_was_had_counts(tmp_path, monkeypatch):
    def late(path: Path, **options: bool) -> DirectoryLock:
        make_run(path)  # another process began a run, and ended
        return DirectoryLock(path, **options)

    monkeypatch.setattr("aepo.run.directory.DirectoryLock", late)
    with pytest.raises(FileExistsError, match="already holds a run"):
        RunDirectory.claim(tmp_path / "run")
    assert not is_held(tmp_path / "run")


def test_the_children_of_a_killed_run_do_not_hold_it(tmp_path):
    more = """import subprocess
    one = subprocess.Popen(["sleep", "60"], close_fds=False)
    two = os.fork() or os.execvp("sleep", ["sleep", "60"])
    three = os.fork()
    while not three: sys.stdin.close(); import time; time.sleep(60)
    print(one.pid, two, three, flush=True)"""
    process = claiming(tmp_path / "run", more)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    children = [int(pid) for pid in process.stdout.readline().split()]
    with pytest.raises(BlockingIOError):
        RunDirectory.check(tmp_path / "run")
    process.kill()
    process.wait()
    try:
        assert all(Path(f"/proc/{pid}").exists() for pid in children)
        deadline = time.monotonic() + 30  # a child gives the lock up when it first runs
        while is_held(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.05)
        RunDirectory.claim(tmp_path / "run").release()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_those_who_look_do_not_keep_a_run_from_its_directory(tmp_path):
    """A live report asks again and again."""
    RunDirectory.claim(tmp_path).release()
    script = "import sys, pathlib; from aepo.run.lock import is_held\nwhile True: is_held(pathlib.Path(sys.argv[1]))"
    looking = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            RunDirectory.claim(tmp_path).release()
            assert not is_held(tmp_path), "nor each other"
    finally:
        for process in looking:
            process.kill()
            process.wait()


def test_released_is_free_and_a_start_that_failed_leaves_nothing(tmp_path):
    held = RunDirectory.claim(tmp_path / "runs" / "new")
    with pytest.raises(BlockingIOError, match=rf"in use by this process, {os.getpid()} on"):
        RunDirectory.claim(tmp_path / "runs" / "new")
    held.release()
    held.release()
    assert not (tmp_path / "runs" / "new").exists()
    held = RunDirectory.claim(tmp_path / "runs" / "new")
    (held.path / "notes").write_text("mine")
    (held.path / ".run.json.writing").write_text("")
    (held.path / ".evals.jsonl.writing").symlink_to("notes")
    held.release()
    assert sorted(os.listdir(held.path)) == [".evals.jsonl.writing", ".lock", "notes"]
    (held.path / ".evals.jsonl.writing").unlink()
    (tmp_path / "empty").mkdir()
    RunDirectory.claim(tmp_path / "empty").release()
    assert (tmp_path / "empty").is_dir(), "it was there before"
    link = tmp_path / "link"
    link.symlink_to("runs/new")
    held = RunDirectory.claim(link)
    with pytest.raises(BlockingIOError):
        RunDirectory.claim(tmp_path / "runs" / "new")
    held.release()


def test_a_run_whose_directory_was_replaced_writes_nothing_into_the_other(tmp_path):
    path = tmp_path / "run"
    log = new_log(path)
    shutil.rmtree(path)
    other = RunDirectory.claim(path)
    for write in (lambda: log.step({"step": 1}), log.flush, lambda: log.close("finished")):
        with pytest.raises(FileNotFoundError, match="run: was removed, moved or replaced while this run was going on"):
            write()
    (path / ".run.json.writing").write_text("the other writes this now")
    log.directory.release()
    assert sorted(os.listdir(path)) == [".lock", ".run.json.writing"]
    assert is_held(path)
    other.release()


@pytest.mark.parametrize("name", ["/proc/x/y", "file/run", "file/deep/run", "x" * 300, "loop/run"])
def test_a_directory_that_cannot_be_made_is_said_before_the_work(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"^run.dir = .*: expected a directory that can be made, locked and written: \w"):
        RunDirectory.check(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


READ_ONLY = """
import os, sys
from aepo.run.directory import RunDirectory
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
for path, step in ((sys.argv[1], 0), (sys.argv[2], None)):
    try:
        RunDirectory.check(path, resume_step=step)
        print("accepted")
    except PermissionError as error:
        print(error)
"""


@pytest.mark.parametrize("what", ["directory", ".lock"])
def test_a_directory_that_cannot_be_written_is_said_before_the_work(what, tmp_path):
    path = tmp_path / "run"
    make_run(path)
    RunDirectory.claim(path, resume_step=0).release()
    for parent in tmp_path.parents:  # of pytest, for its user alone
        if parent.stat().st_uid == os.geteuid() and "pytest" in parent.name:
            parent.chmod(0o755)
    tmp_path.chmod(0o555)
    path.chmod(0o555 if what == "directory" else 0o777)
    (path / ".lock").chmod(0o666 if what == "directory" else 0o444)
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(path), str(tmp_path / "new" / "run")], capture_output=True, text=True
        )
    finally:
        tmp_path.chmod(0o755)
        path.chmod(0o755)
    expected = rf"run.dir = {path}: expected a directory that can be made, locked and written: Permission denied.*\n"
    expected += rf"run.dir = {tmp_path}/new/run: expected .* and written: Permission denied.*\n"
    assert re.fullmatch(expected, done.stdout), done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["run"]


def test_a_start_that_failed_leaves_no_parents_that_it_made(tmp_path):
    RunDirectory.check(tmp_path / "a" / "b" / "run")
    held = RunDirectory.claim(tmp_path / "a" / "b" / "run")
    (tmp_path / "a" / "notes").touch()
    held.release()
    assert os.listdir(tmp_path / "a") == ["notes"]
