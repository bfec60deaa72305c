"""The lock of a directory: who holds it is never said wrongly, and nothing but the lock's own file is written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from disk_toys import full_disk

from aepo.run.directory import RunDirectory
from aepo.run.lock import DirectoryLock, _held, in_use, is_foreign, is_held, last_holder


def entry(pid: int) -> dict[str, Any]:
    return {"pid": pid, "host": socket.gethostname(), "since": "now", "command": "x" * 999}


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_longer_line_of_an_earlier_holder_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps(entry(1)) + "\n")
    DirectoryLock(tmp_path, create=False).release()
    assert last_holder(tmp_path)["pid"] == os.getpid()
    assert not is_foreign(tmp_path)


@pytest.mark.parametrize("before", ["", None])
def test_a_holder_that_has_not_yet_said_who_it_is_is_waited_for(tmp_path: Path, before: str | None) -> None:
    """None: there is the entry of an earlier one, which has ended."""
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps(entry(ended())) if before is None else before)
    now = json.dumps(entry(os.getpid()))
    script = "import sys, time; print(flush=True); time.sleep(0.1); open(sys.argv[1], 'w').write(sys.argv[2])"
    with subprocess.Popen([sys.executable, "-c", script, str(lock), now], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert f"in use by this process, {os.getpid()} on" in str(in_use(tmp_path))


def test_one_that_never_says_it_is_another_process(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    assert str(in_use(tmp_path)) == f"{tmp_path} is in use by another process"
    pid = ended()  # or one of another container
    (tmp_path / ".lock").write_text(json.dumps(entry(pid)))
    assert f"in use by process {pid} on" in str(in_use(tmp_path))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to("mine")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        DirectoryLock(tmp_path, create=True)
    assert is_held(tmp_path) is None
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("size", [0, 20])
def test_a_full_disk_is_named_and_leaves_no_half_line(tmp_path: Path, size: int) -> None:
    with full_disk(size), pytest.raises(OSError, match=r"run/\.lock"):
        DirectoryLock(tmp_path / "run", create=True)
    assert not is_held(tmp_path / "run")
    RunDirectory.claim(tmp_path / "run").release()


def test_a_file_system_without_locks_is_a_warning_and_any_other_error_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    number = 0
    for one in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        number = one
        RunDirectory.claim(tmp_path / "run").release()
        assert "run: this file system has no locks" in capsys.readouterr().err
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        RunDirectory.claim(tmp_path / "run")


def test_a_directory_that_is_given_up_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every look at it until it is claimed, it has just gone."""
    looks = 0

    def vanishing(function: Any) -> Any:
        def look(path: Any, *args: Any, **options: Any) -> Any:
            nonlocal looks
            if str(path).startswith(str(tmp_path / "run")) and not any(lock.release.alive for lock in _held):
                looks += 1
                if looks == at:
                    shutil.rmtree(tmp_path / "run", ignore_errors=True)
            return function(path, *args, **options)

        return look

    for at in range(1, 100):
        looks = 0
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").write_text(json.dumps(entry(1)))
        with monkeypatch.context() as patch:
            for name in ("open", "stat", "lstat", "listdir"):
                patch.setattr(os, name, vanishing(getattr(os, name)))
            held = RunDirectory.claim(tmp_path / "run")
        if looks < at:
            break
        held.require()
        held.release()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert at > 5


def test_a_directory_that_is_removed_between_opening_and_locking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a file that is gone keeps nobody out: it is taken again, on the file that is there."""
    flock, left = fcntl.flock, [1, 2]

    def late(descriptor: int, operation: int) -> None:
        if left:
            left.pop()
            shutil.rmtree(tmp_path / "run")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = DirectoryLock(tmp_path / "run", create=True)
    assert lock.held
    assert is_held(tmp_path / "run")
    assert not left
    lock.release()
