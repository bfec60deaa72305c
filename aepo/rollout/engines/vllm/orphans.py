"""Processes and files that end with this process, however it ends.

vLLM's engine processes (0.32) do not notice that their trainer was killed: they stay, with all their memory. Here a
small process waits for that and ends them. It runs this file as a script: nothing but the standard library is imported.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)
GRACE = 10.0  # seconds for processes to end by themselves after SIGTERM, which vLLM's ignore while they load a model
KILLED = 10.0  # seconds for the kernel to take away what was killed
POLL = 0.1
# The mark of a process. A child has it from its first moment, and hands it on to its own; so it is also found where
# nobody was told of it. It stays readable in /proc/*/environ for processes that are spawned, as vLLM's are here.
MARK = "TMPDIR"
# It ends by itself when the processes it serves have, and then removes their shared memory: 400 MB for one engine.
TRACKER = b"multiprocessing.resource_tracker"


class OrphanGuard:
    """Ends the processes that were started inside `environment`, and removes `directory`, when this process is gone.

    directory: made here, as the directory for temporary files of these processes; None: no processes. leftovers:
    patterns of files and directories that are to be removed only if this process was killed.
    """

    def __init__(self, directory: Path | None, leftovers: Sequence[str] = ()) -> None:
        self.directory = None if directory is None else directory.absolute()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(self.directory or ""), *leftovers],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != MARK},  # it is nobody's engine
            start_new_session=True,  # what a terminal sends is not for it
        )
        try:
            if self.directory is not None:
                self.directory.mkdir(mode=0o700)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> OrphanGuard:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    @contextmanager
    def environment(self, **more: str | None) -> Iterator[None]:
        """Processes that are spawned meanwhile are marked; they have the variables `more`, too, None: do not have."""
        assert self.directory is not None
        tempfile.gettempdir()  # is remembered: this process keeps its own
        start_tracker()
        changes = {MARK: str(self.directory), **more}
        before = {name: os.environ.get(name) for name in changes}
        set_variables(changes)
        try:
            yield
        finally:
            set_variables(before)

    def kill(self) -> None:
        """The marked processes, at once."""
        if self.directory is not None:
            left = end_processes(str(self.directory), 0.0)
            if left:
                logger.warning("processes %s do not end, though they were killed", ", ".join(map(str, left)))

    def end(self) -> None:
        """Do it now: kill what still runs, remove the directory, call the guard off. A second call does nothing."""
        self.kill()
        remove(self.directory)
        self._process.kill()
        self._process.wait()


def temporary_directory(parent: Path, prefix: str, leftovers: Sequence[str] = ()) -> OrphanGuard:
    """As tempfile.TemporaryDirectory, but removed also if this process is killed."""
    return OrphanGuard(parent / f"{prefix}{uuid.uuid4().hex[:12]}", leftovers)


def start_tracker() -> None:
    """The process that removes shared memory when all others have ended, deaf to what a terminal sends to them all.

    Python starts one where it is needed, which ignores SIGINT and SIGTERM only: a closed terminal left 420 MB in
    /dev/shm for good.
    """
    from multiprocessing import resource_tracker

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGQUIT})  # is handed on
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def marked(directory: str) -> list[int]:
    """Processes whose directory for temporary files this is, resource trackers left out."""
    mark = os.fsencode(f"{MARK}={directory}")
    found = []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc/self") else ()):
        with suppress(OSError):  # it has ended, or is somebody else's
            process = Path("/proc", name)
            is_marked = mark in (process / "environ").read_bytes().split(b"\0")
            if is_marked and TRACKER not in (process / "cmdline").read_bytes():
                found.append(int(name))
    return found


def end_processes(directory: str, grace: float) -> list[int]:
    """SIGTERM to the marked processes, SIGKILL after `grace` seconds; those are returned that outlive it.

    They are looked for again each time, so one that starts meanwhile ends too, and a number that has gone to another
    process is not used.
    """
    begin, told = time.monotonic(), set()
    while found := marked(directory):
        waited = time.monotonic() - begin
        if waited > grace + KILLED:
            return found
        for pid in found:
            with suppress(ProcessLookupError):
                if waited >= grace:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in told:
                    os.kill(pid, signal.SIGTERM)
        told.update(found)
        time.sleep(0.02)
    return []


def remove(directory: Path | None, leftovers: Sequence[str] = ()) -> None:
    for path in [*([] if directory is None else [directory]), *(Path(p) for one in leftovers for p in glob.glob(one))]:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()
        if path.exists():
            logger.warning("%s cannot be removed", path)


def main(parent: str, directory: str, *leftovers: str) -> None:
    while os.getppid() == int(parent):  # a pipe would stay open in every fork of the parent
        time.sleep(POLL)
    if directory:
        end_processes(directory, GRACE)
    remove(Path(directory) if directory else None, leftovers)


if __name__ == "__main__":
    main(*sys.argv[1:])
