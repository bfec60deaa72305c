"""Output that goes away, in real processes: it ends a run as SIGTERM does, and is never an error of its own."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from forked_commands import CLOSED, Forks, fork_server

from aepo.run.checkpoint import list_checkpoints
from aepo.run.log import read_records

HERE = Path(__file__).parent
PATHS = f"{HERE}{os.pathsep}{HERE.parents[1]}"
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)  # would hide what is not flushed
ENVIRONMENT.pop("TRITON_INTERPRET", None)  # of the kernels' tests: NumPy's warnings come with it
TOY = """
import sys
from trainer_toys import ToyLanguageModel, toy_agent
from aepo import __main__, cli_shared
cli_shared.load = lambda config: (toy_agent(), ToyLanguageModel())
__main__.main()
"""
SMALL = ["train.questions=4", "rollout.paths=2", "rollout.max_tokens=6", "log.tensorboard=false", "eval.questions=2"]
ENDLESS = ["train.steps=100000", *SMALL]


def start(*words: str | Path, program: str = TOY, **streams: Any) -> subprocess.Popen[bytes]:
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, **streams}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)], **given)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with fork_server(ENVIRONMENT) as server:
        yield server


def outcome(forks: Forks, *words: object, **streams: Any) -> tuple[int, str]:
    """Exit code, and what was said on standard error."""
    with tempfile.TemporaryFile() as said:
        forks.start(*words, **{"stderr": said.fileno(), **streams})
        code = forks.wait()
        said.seek(0)
        return code, said.read().decode()


def closed_pipe() -> int:
    """To a reader that has left."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def first_line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    return stream.readline()


def state(run: Path) -> tuple[str, int, int]:
    """How it ended, its last step, its last checkpoint."""
    status = json.loads((run / "run.json").read_text())["status"]
    return status, read_records(run / "metrics.jsonl")[-1]["step"], list_checkpoints(run / "checkpoints")[-1].step


def assert_interrupted(run: Path) -> None:
    status, step, saved = state(run)
    assert (status, saved) == ("interrupted", step)


def test_a_reader_that_leaves_ends_a_run(tmp_path: Path) -> None:
    process = start("train", *ENDLESS, f"run.dir={tmp_path / 'run'}")
    assert first_line(process.stdout)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(300) == 130
    assert process.stderr is not None
    assert process.stderr.read() == b"interrupted\n"
    assert_interrupted(tmp_path / "run")


@pytest.mark.slow
def test_both_streams_into_one_pipe(forks: Forks, tmp_path: Path) -> None:
    """`aepo train 2>&1 | head -1`: nothing can be said any more. The run can go on."""
    run = tmp_path / "run"
    reading, writing = os.pipe()
    forks.start("train", *ENDLESS, f"run.dir={run}", stdout=writing, stderr=writing)
    os.close(writing)
    with open(reading, "rb") as stream:
        assert first_line(stream)
    assert forks.wait() == 130
    assert_interrupted(run)
    assert outcome(forks, "train", "--resume", run, f"train.steps={state(run)[1] + 1}") == (0, "")


@pytest.mark.slow
def test_a_full_disk_behind_standard_output(forks: Forks, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        code, said = outcome(forks, "train", *ENDLESS, f"run.dir={tmp_path / 'run'}", stdout=full.fileno())
    assert (code, said) == (130, "error: standard output: No space left on device\ninterrupted\n")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("controlling", [True, False])
def test_a_terminal_that_goes_away(forks: Forks, controlling: bool, tmp_path: Path) -> None:
    """With SIGHUP, where it is the terminal of the session; then every write to it fails with EIO."""
    ours, theirs = pty.openpty()
    streams: dict[str, Any] = {
        "stdin": theirs,
        "stdout": theirs,
        "stderr": theirs,
        "session": True,
        "controlling": controlling,
    }
    forks.start("train", *ENDLESS, f"run.dir={tmp_path / 'run'}", **streams)
    os.close(theirs)
    while b"reward" not in os.read(ours, 4096):  # the first step
        pass
    os.close(ours)
    assert forks.wait() == 130
    assert_interrupted(tmp_path / "run")


@pytest.mark.slow
def test_nohup_outlives_its_terminal(forks: Forks, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "session": True, "nohup": True}
    forks.start("train", "train.steps=3", *SMALL, f"run.dir={tmp_path / 'run'}", **streams)
    os.close(theirs)
    os.close(ours)
    assert forks.wait() == 0
    assert state(tmp_path / "run") == ("finished", 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["closed", "full"])
def test_streams_that_nobody_wants(forks: Forks, which: str, tmp_path: Path) -> None:
    """Closed before the start, or standard error alone: the run goes on. No file gets the number of a closed one."""
    with open("/dev/full", "wb") as full:
        closed: dict[str, Any] = {"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED}
        forks.start(
            *("train", "train.steps=2", *SMALL, f"run.dir={tmp_path / 'run'}"),
            **(closed if which == "closed" else {"stderr": full.fileno()}),
        )
        assert forks.wait() == 0
    assert state(tmp_path / "run") == ("finished", 2, 2)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    """Or it would hold what libraries and child processes print."""
    program = (
        "from aepo.output import guard_output; guard_output(); import os, subprocess, sys\n"
        "file = open(sys.argv[1], 'w'); print('a'); print('b', file=sys.stderr)\n"
        "os.write(1, b'c'); os.write(2, b'd'); subprocess.run(['echo'])"
    )
    line = f'exec "{sys.executable}" -c "$1" "$2" {closed}'
    done = subprocess.run(
        ["bash", "-c", line, "bash", program, tmp_path / "file"], env=ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all(tmp_path: Path) -> None:
    """So terminals are left behind by some programs, and a print would raise BlockingIOError."""
    program = "from aepo.output import guard_output; guard_output(); print('x' * 300_000); print('end')"
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = start(program=program, stdout=writing)
    os.close(writing)
    time.sleep(0.5)
    with open(reading, "rb") as stream:
        assert stream.read() == b"x" * 300_000 + b"\nend\n"
    assert process.wait(60) == 0


def test_a_character_that_the_encoding_lacks(tmp_path: Path) -> None:
    program = "from aepo.output import guard_output; guard_output(); print('\\u00e9')"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"\\xe9\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_printed_comes_in_order_and_at_once(unbuffered: str) -> None:
    program = (
        "print('a'); from aepo.output import guard_output; guard_output(); print('b'); import time; time.sleep(60)"
    )
    process = start(program=program, env={**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered})
    try:
        assert first_line(process.stdout) == b"a\n"
        if unbuffered:
            assert first_line(process.stdout) == b"b\n"
    finally:
        process.kill()
        process.wait()


COUNT = "import os, signal, sys\nfrom aepo.output import guard_output, guarded_output\n"


def test_standard_error_that_is_lost_ends_nothing() -> None:
    """Nor does it cost a descriptor."""
    program = COUNT + (
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(3)); guard_output(); before = os.listdir('/dev/fd')\n"
        "print('lost', file=sys.stderr); sys.stderr.flush()\n"
        "print(sys.stderr.buffer.raw.lost.strerror, os.listdir('/dev/fd') == before)"
    )
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=full, text=True
        )
    assert (done.returncode, done.stdout) == (0, "No space left on device True\n")


def test_a_terminal_gets_every_line_at_once() -> None:
    ours, theirs = pty.openpty()
    process = start(program=COUNT + "guard_output(); print('a'); sys.stdin.read()", stdin=theirs, stdout=theirs)
    os.close(theirs)
    try:
        assert select.select([ours], [], [], 20)[0]
        assert os.read(ours, 1) == b"a"
    finally:
        process.kill()
        process.communicate()
        os.close(ours)


def test_a_stream_of_another_program_is_left_alone(tmp_path: Path) -> None:
    program = (
        COUNT + "file = sys.stdout = open(sys.argv[1], 'w'); guard_output(); print('a'); assert sys.stdout is file"
    )
    done = start(tmp_path / "file", program=program)
    assert (done.communicate(timeout=60), done.returncode) == ((b"", b""), 0)
    assert (tmp_path / "file").read_text() == "a\n"


def test_what_a_block_prints_comes_before_what_follows_it() -> None:
    program = COUNT + "with guarded_output(): kept = sys.stdout; print('a')\nprint('b')"  # as loggers keep a stream
    done = start(program=program)
    assert (done.communicate(timeout=60), done.returncode) == ((b"a\nb\n", b""), 0)


@pytest.mark.parametrize("command", [["keys"], ["keys", "model"], ["--help"], ["doctor", "--json"]])
def test_commands_that_only_print(command: list[str]) -> None:
    """As SIGPIPE would end them; a disk that is full is said."""
    program = "from aepo.__main__ import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*command, program=program, stdout=writing)
    os.close(writing)
    assert process.wait(300) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    if command[0] == "doctor":  # it imports torch
        return
    with open("/dev/full", "wb") as full:
        process = start(*command, program=program, stdout=full)
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (1, b"error: standard output: No space left on device\n")


def test_nohup_expects_no_full_disk() -> None:
    """Only the terminal's end: what is printed behind `nohup aepo .. > file` is wanted."""
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from aepo.__main__ import main; main()"
    with open("/dev/full", "wb") as full:
        process = start("keys", program=program, stdout=full)
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (1, b"error: standard output: No space left on device\n")


@pytest.mark.slow
def test_evaluations_rollouts_and_reports(forks: Forks, tmp_path: Path) -> None:
    """What they write to files is written; numbers that were to go to standard output are missed by the exit code."""
    run = tmp_path / "run"
    assert outcome(forks, "train", "train.steps=1", *SMALL, f"run.dir={run}") == (0, "")
    with open("/dev/full", "wb") as full:
        report = outcome(forks, "report", run, stdout=full.fileno())
        assert report == (1, "error: standard output: No space left on device\n")
        assert (run / "report.html").stat().st_size > 10_000
        code, said = outcome(forks, "eval", run, "--json", "-", stdout=full.fileno())
    assert code != 0
    assert "error: standard output: No space left on device\n" in said
    assert "Traceback" not in said
    for command in (["eval", run, "--answers", tmp_path / "a.jsonl"], ["rollout", run, "--out", tmp_path / "out"]):
        code, said = outcome(forks, *command, stdout=(writing := closed_pipe()))
        os.close(writing)
        assert "Traceback" not in said
        assert "Exception" not in said
        assert code in (130, 141), said
