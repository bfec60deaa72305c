"""Directories of weight updates, with writers that are really killed."""

import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from aepo.files import weight_directory
from aepo.files.weight_directory import ALL, PREFIX, SETTLED, patterns, remove_abandoned, update_directory

MADE = f"{ALL}0123456789ab-"  # of another process, and 8 characters of mkdtemp

WRITER = """
import sys, time
from pathlib import Path
from aepo.files.weight_directory import update_directory
with update_directory(Path(sys.argv[1])) as directory:
    (directory / "00000.safetensors").write_bytes(b"weights")
    print(directory, flush=True)
    time.sleep(60)
"""


def start_writer(parent: Path) -> tuple[subprocess.Popen, Path]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, parent], stdout=subprocess.PIPE, text=True)
    return writer, Path(writer.stdout.readline().strip())


@pytest.mark.parametrize(("nbytes", "is_there", "shared"), [(500, True, True), (501, True, False), (1, False, False)])
def test_shared_memory_is_taken_where_weights_fit_twice(tmp_path, monkeypatch, nbytes, is_there, shared):
    memory = tmp_path / "shm"
    if is_there:
        memory.mkdir()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(weight_directory, "SHARED_MEMORY", memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert weight_directory.default_directory(nbytes) == (memory if shared else Path(tempfile.gettempdir()))


def test_a_guard_finds_what_this_process_leaves_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parent = Path("new [weights]")
    parent.mkdir()
    (parent / f"{MADE}abcdefgh").mkdir()
    with update_directory(parent) as directory:
        (pattern,) = patterns([parent])
        assert [Path(name) for name in glob.glob(pattern)] == [tmp_path / directory]


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
    (parent / f"{MADE}a_link_8").symlink_to(others)
    (parent / f"{MADE}new_made").mkdir()  # a writer that has not made its lock yet
    (parent / f"{MADE}old_made").mkdir()
    long_ago = time.time() - SETTLED - 1
    os.utime(parent / f"{MADE}old_made", (long_ago, long_ago))
    before = {path.name for path in parent.iterdir()}
    with update_directory(parent):
        pass
    assert {path.name for path in parent.iterdir()} == before, "who makes one removes none"
    remove_abandoned(parent)
    assert {path.name for path in parent.iterdir()} == before - {f"{MADE}old_made"}
    assert others.exists()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("final", ["model.safetensors"]),
        ("final", []),
        ("final", ["lock"]),
        ("0123456789AB-abcdefgh", ["lock", "00000.safetensors"]),
        ("0123456789ab-abcdefg", ["lock"]),
        ("0123456789ab-abcdefghi", ["lock"]),
        ("0123456789ab-abcdefgh-copy", ["lock"]),
        ("0123456789ab-abcdefgh", ["lock", "model.safetensors"]),
        ("0123456789ab-abcdefgh", ["lock", "00000.safetensors", "notes"]),
        ("0123456789ab-abcdefgh", ["lock", "kept/00000.safetensors"]),
        ("0123456789ab-abcdefgh", ["lock/00000.safetensors"]),
        ("0123456789ab-abcdefgh", ["00000.safetensors.bak"]),
    ],
)
def test_what_people_call_alike_stays_with_all_that_is_in_it(tmp_path, name, files):
    path = tmp_path / f"{ALL}{name}"
    path.mkdir()
    for file in files:
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text("precious")
    os.utime(path, (1e9, 1e9))
    before = sorted(tmp_path.rglob("*"))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("files", [["lock"], ["lock", "00000.safetensors", "123456.safetensors"], ["lock.new"], []])
def test_what_a_writer_leaves_at_any_moment_goes(tmp_path, files):
    path = tmp_path / f"{MADE}abc_efg9"
    path.mkdir()
    for file in files:
        (path / file).touch()
    os.utime(path, (1e9, 1e9))
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of two users")
def test_directories_of_other_users_stay(tmp_path):
    (tmp_path / f"{MADE}of_other").mkdir()
    (tmp_path / f"{MADE}of_other" / "lock").touch()
    os.chown(tmp_path / f"{MADE}of_other", 12345, 12345)
    remove_abandoned(tmp_path)
    assert (tmp_path / f"{MADE}of_other").exists()


def test_a_lock_that_leads_elsewhere_is_none(tmp_path):
    (tmp_path / f"{MADE}linked_8").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / f"{MADE}linked_8" / "lock").symlink_to(tmp_path / "file")
    remove_abandoned(tmp_path)
    assert (tmp_path / f"{MADE}linked_8").exists()
