"""Directories of weight updates, with writers that are really killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aepo.rollout.engines.weight_directory import ALL, PREFIX, SETTLED, remove_abandoned, update_directory

WRITER = """
import sys, time
from pathlib import Path
from aepo.rollout.engines.weight_directory import update_directory
with update_directory(Path(sys.argv[1])) as directory:
    (directory / "00000.safetensors").write_bytes(b"weights")
    print(directory, flush=True)
    time.sleep(60)
"""


def start_writer(parent: Path) -> tuple[subprocess.Popen, Path]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, parent], stdout=subprocess.PIPE, text=True)
    return writer, Path(writer.stdout.readline().strip())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, end):
    writer, left = start_writer(tmp_path)
    with update_directory(tmp_path) as directory:
        assert (left / "00000.safetensors").exists(), "its writer is alive"
        assert directory.stat().st_mode & 0o777 == 0o700
        assert directory.name.startswith(PREFIX)
        assert left.name.startswith(ALL)
        assert not left.name.startswith(PREFIX)
        writer.send_signal(end)
        writer.wait()
        writer.stdout.close()
        assert left.exists()
        remove_abandoned(tmp_path)
        assert list(tmp_path.iterdir()) == [directory]
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), update_directory(tmp_path) as directory:
        (directory / "no directory" / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_an_abandoned_update_stays(tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "data").mkdir()
    (parent / f"{ALL}notes.txt").touch()
    (parent / f"{ALL}link").symlink_to(others)
    (parent / f"{ALL}new").mkdir()  # a writer that has not made its lock yet
    (parent / f"{ALL}old").mkdir()
    long_ago = time.time() - SETTLED - 1
    os.utime(parent / f"{ALL}old", (long_ago, long_ago))
    with update_directory(parent):
        pass
    assert {path.name for path in parent.iterdir()} == {
        "data",
        *(ALL + name for name in ("notes.txt", "link", "new")),
    }
    assert others.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of two users")
def test_directories_of_other_users_stay(tmp_path):
    (tmp_path / f"{ALL}theirs").mkdir()
    (tmp_path / f"{ALL}theirs" / "lock").touch()
    os.chown(tmp_path / f"{ALL}theirs", 12345, 12345)
    remove_abandoned(tmp_path)
    assert (tmp_path / f"{ALL}theirs").exists()


def test_a_lock_that_leads_elsewhere_is_none(tmp_path):
    (tmp_path / f"{ALL}linked").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / f"{ALL}linked" / "lock").symlink_to(tmp_path / "file")
    remove_abandoned(tmp_path)
    assert (tmp_path / f"{ALL}linked").exists()
