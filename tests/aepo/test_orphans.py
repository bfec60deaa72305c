"""Processes and files of a trainer that was killed go, at whatever moment that was; its own end takes them at once.

Children are spawned by multiprocessing, as vLLM's engines are: their parent is told nothing about them.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from aepo.rollout.engines.vllm import orphans
from aepo.rollout.engines.vllm.orphans import OrphanGuard, marked, temporary_directory

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")

PARENT = """
import multiprocessing, os, signal, sys, time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from orphans import OrphanGuard  # without aepo, which would bring torch to every child

def engine(ignores, depth):
    if ignores:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if depth:
        multiprocessing.get_context("spawn").Process(target=engine, args=(ignores, depth - 1)).start()
        memory = SharedMemory(create=True, size=1000)
        Path(os.environ["TMPDIR"], "memory").write_text(memory.name)
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    directory, moment, child = sys.argv[1:]
    guard = OrphanGuard(Path(directory, "private"), [directory + "/weights-1*"])
    for name in ("weights-1", "weights-2"):
        Path(directory, name).mkdir()
        Path(directory, name, "file").touch()
    Path(directory, "weights-1.tmp").touch()
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    with guard.environment():
        process = multiprocessing.get_context("spawn").Process(target=engine, args=(child == "ignores", 1))
        process.start()
        if moment == "spawned":
            os.kill(os.getpid(), signal.SIGKILL)
    if moment == "guard dies":
        guard._process.kill()
    if moment == "end":
        sys.stdin.readline()
        guard.end()
        process.join(5)
        print("ended", process.exitcode, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "parent.py"
    path.write_text(PARENT)
    return path


def start(script: Path, moment: str, child: str = "ends") -> subprocess.Popen[str]:
    (script.parent / "run").mkdir()
    arguments = [sys.executable, str(script), str(script.parent / "run"), moment, child]
    environment = {**os.environ, "PYTHONPATH": str(Path(orphans.__file__).parent)}
    return subprocess.Popen(
        arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left(script: Path) -> list[str]:
    return sorted(path.name for path in (script.parent / "run").iterdir())


@pytest.mark.parametrize("moment", ["before", "spawned"])
def test_killed_before_the_engine_is_there(script, moment):
    parent = start(script, moment)
    parent.wait(20)
    private = str(script.parent / "run" / "private")
    assert wait_until(lambda: left(script) == ["weights-2"]), left(script)
    assert not marked(private)


@pytest.mark.parametrize("child", ["ends", pytest.param("ignores", marks=pytest.mark.slow)])
def test_an_engine_and_its_worker_end_with_their_trainer(script, child):
    """Ones that ignore SIGTERM are killed after the grace of 10 s. Then multiprocessing's tracker, which is spared,
    takes their shared memory away."""
    parent = start(script, "later", child)
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    private = script.parent / "run" / "private"
    assert wait_until((private / "memory").exists)
    memory = Path("/dev/shm", (private / "memory").read_text())
    assert memory.exists()
    try:
        assert sorted(marked(str(private))) == sorted(pids)
        parent.kill()
        killed = time.monotonic()
        parent.wait(10)
        assert wait_until(lambda: not any(map(alive, pids)), 20)
        assert (time.monotonic() - killed > orphans.GRACE) == (child == "ignores")
        assert wait_until(lambda: left(script) == ["weights-2"]), left(script)
        assert wait_until(lambda: not memory.exists())
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_what_a_terminal_sends_to_all_of_them_leaves_no_shared_memory(script, number):
    """It is the tracker that removes it, which gets the signal, too."""
    parent = start(script, "later")
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    private = script.parent / "run" / "private"
    assert wait_until((private / "memory").exists)
    memory = Path("/dev/shm", (private / "memory").read_text())
    try:
        os.killpg(parent.pid, number)
        parent.wait(10)
        assert wait_until(lambda: not any(map(alive, pids)), 20)
        assert wait_until(lambda: not memory.exists())
        assert wait_until(lambda: left(script) == ["weights-2"]), left(script)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_end_kills_at_once_and_leaves_weights_alone(script):
    """They may be those of another engine of this process."""
    parent = start(script, "end", "ignores")
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    begin = time.monotonic()
    parent.stdin.write("\n")
    parent.stdin.flush()
    try:
        assert parent.stdout.readline() == f"ended {-signal.SIGKILL}\n"
        assert time.monotonic() - begin < orphans.GRACE / 2
        assert wait_until(lambda: not any(map(alive, pids)))
        assert left(script) == ["weights-1", "weights-1.tmp", "weights-2"]
    finally:
        parent.kill()


def test_a_killed_guard_leaves_the_engines_to_their_trainer(script):
    parent = start(script, "guard dies")
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    try:
        assert not wait_until(lambda: not all(map(alive, pids)), 0.5)
    finally:
        parent.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_a_process_that_took_over_a_number_is_left_alone(tmp_path, monkeypatch):
    """Here by force: what was found once is looked for again before SIGKILL, and has no mark then."""
    sent: list[tuple[int, int]] = []
    found = iter([[1], []])
    monkeypatch.setattr(orphans, "marked", lambda directory: next(found))
    monkeypatch.setattr(os, "kill", lambda *signalled: sent.append(signalled))
    assert orphans.end_processes(str(tmp_path), 0.01) == []
    assert sent == [(1, signal.SIGTERM)]


def test_a_directory_goes_and_its_guard_with_it(tmp_path):
    with temporary_directory(tmp_path, ".engine-") as guard:
        (guard.directory / "file").touch()
        process = guard._process
        assert process.poll() is None
    assert not list(tmp_path.iterdir())
    assert process.returncode == -signal.SIGKILL
    guard.end()
    with pytest.raises(FileNotFoundError):
        OrphanGuard(tmp_path / "missing" / "directory")
    assert not os.environ.get("TMPDIR", "").startswith(str(tmp_path))


def test_the_environment_of_this_process_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OTHER", "before")
    monkeypatch.setenv("GONE", "before")
    monkeypatch.delenv("NEW", raising=False)
    with temporary_directory(tmp_path, "private-") as guard, guard.environment(OTHER="new", NEW="new", GONE=None):
        assert os.environ["TMPDIR"] == str(guard.directory)
        assert os.environ["OTHER"] == os.environ["NEW"] == "new"
        assert "GONE" not in os.environ
        assert tempfile.gettempdir() == str(tmp_path)
    assert os.environ["TMPDIR"] == str(tmp_path)
    assert os.environ["OTHER"] == os.environ["GONE"] == "before"
    assert "NEW" not in os.environ


def test_a_guard_is_on_its_own(tmp_path, monkeypatch):
    """Neither the signals of a terminal nor the guard of a process above it end it before its work is done."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with temporary_directory(tmp_path, "private-") as guard:
        assert os.getsid(guard._process.pid) == guard._process.pid
        assert marked(str(tmp_path)) == []
        assert guard.directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_stays_the_same_where_the_process_goes_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    guard = OrphanGuard(Path("private"))
    monkeypatch.chdir("elsewhere")
    with guard, guard.environment():
        assert os.environ["TMPDIR"] == str(tmp_path / "private")
    assert not (tmp_path / "private").exists()
