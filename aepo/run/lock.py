"""One process per directory: a lock of the kernel's (flock), which ends with the process, however it ends.

It is on a file in the directory, `.lock`, which says who holds it and stays there. Processes that are started meanwhile
do not inherit it.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from aepo.run.files import regular

LOCK = ".lock"
_CANNOT_LOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_PATIENCE = 0.5  # seconds, for those who only look whether it is free


class DirectoryLock:
    """Held until `release`, or until this object is gone.

    create: the directory is made if it is not there. BlockingIOError, in one line that names the holder: it is held
    already, by another process or this one. Where the file system has no locks, a warning says so and nothing is held.
    """

    def __init__(self, directory: Path, *, create: bool) -> None:
        self._path = directory / LOCK
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                if create:
                    directory.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except (FileNotFoundError, FileExistsError):
                if not create or time.monotonic() > deadline:
                    raise
                continue  # whoever made it has just given it up
            try:
                if self._lock(descriptor):
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise in_use(directory)
            time.sleep(0.02)
        self.release = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        _held.add(self)

    @property
    def held(self) -> bool:
        """Not released, and the file is still that of the directory: nobody has replaced or removed it."""
        return bool(self.release.alive) and self._is_ours(self._descriptor)

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise
            print(
                f"warning: {self._path.parent}: this file system has no locks ({error.strerror}): that no other "
                "process uses the directory is not checked",
                file=sys.stderr,
            )
            return True
        if not self._is_ours(descriptor):  # that of a directory which has just been removed
            return False
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entry = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "command": _command()}
        # In one write, over all of an older and longer one: who reads it meanwhile finds the one or the other.
        content = json.dumps(entry).ljust(os.fstat(descriptor).st_size - 1).encode() + b"\n"
        try:
            if os.pwrite(descriptor, content, 0) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(descriptor, 0)
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        return True

    def _is_ours(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def is_held(directory: Path) -> bool | None:
    """Whether a process holds the lock of a directory. None: it cannot be said here."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who only look do not meet each other
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def last_holder(directory: Path) -> dict[str, Any]:
    """Who holds the lock, or held it last: pid, host, since, command. Empty: it is not known."""
    try:
        return _entry(regular(directory / LOCK).read_bytes())
    except OSError:
        return {}


def is_foreign(directory: Path) -> bool:
    """Whether what is called `.lock` there has something else in it."""
    try:
        content = regular(directory / LOCK).read_bytes()
    except OSError:
        return False
    return bool(content) and not _entry(content)


def in_use(directory: Path) -> BlockingIOError:
    deadline = time.monotonic() + _PATIENCE
    while not (by := last_holder(directory)) or _has_ended(by):  # the holder has not yet written who it is
        if time.monotonic() > deadline:  # or it is in a container, where processes have other numbers
            break
        time.sleep(0.01)
    if not by:
        return BlockingIOError(f"{directory} is in use by another process")
    ours = (by["pid"], by["host"]) == (os.getpid(), socket.gethostname())
    who = f"{'this process, ' if ours else 'process '}{by['pid']}"
    return BlockingIOError(f"{directory} is in use by {who} on {by['host']} since {by['since']}: {by['command']}")


def _entry(content: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(content)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and entry.keys() >= {"pid", "host", "since", "command"} else {}


def _has_ended(by: dict[str, Any]) -> bool:
    if by["host"] != socket.gethostname() or type(by["pid"]) is not int:
        return False
    try:
        os.kill(by["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return False


def _command() -> str:
    return " ".join(shlex.join(sys.orig_argv).split())[:300]


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A lock belongs to all who have its file open: a child that outlives this process would hold it."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
