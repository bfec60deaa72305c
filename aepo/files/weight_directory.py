"""The directory of one weight update, and those whose writer is gone. Knows nothing of vLLM.

A writer holds a lock on a file in its directory, which the kernel releases however the writer ends, a SIGKILL included.
So whoever comes next, a sender or the guard of the engines, can tell and removes what was left. Process ids could not
tell: containers that share a directory have several processes of one id. flock must work there (NFS and /dev/shm do).
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

ALL = "aepo-weights-"
PREFIX = f"{ALL}{uuid.uuid4().hex[:12]}-"  # of those that this process makes, for a guard that outlives it
LOCK = "lock"
# Names that nobody else gives: somebody's own aepo-weights-final stays, and whatever else is in a directory keeps it.
OURS = re.compile(rf"{ALL}[0-9a-f]{{12}}-[a-z0-9_]{{8}}")  # PREFIX and what mkdtemp adds
CONTENT = re.compile(rf"{LOCK}(\.new)?|\d{{5,}}\.safetensors")
PARTLY_LOADED = "partly-loaded"  # what an engine calls its weights from the first that is loaded to the last
SETTLED = 60.0  # seconds: a writer makes its lock at once, so an older directory without one has lost its writer
SHARED_MEMORY = Path("/dev/shm")


def default_directory(nbytes: int) -> Path:
    """For weights of this size: shared memory where it exists and has room for them twice, else the directory for
    temporary files."""
    shared, otherwise = default_directories()
    return shared if shared.is_dir() and shutil.disk_usage(shared).free >= 2 * nbytes else otherwise


def default_directories() -> list[Path]:
    return [SHARED_MEMORY, Path(tempfile.gettempdir())]


def patterns(parents: Iterable[Path]) -> list[str]:
    """Of what this process may leave there if it is killed while new weights are on their way."""
    return [f"{glob.escape(str(parent.absolute()))}/{PREFIX}*" for parent in parents]


@contextlib.contextmanager
def update_directory(parent: Path) -> Iterator[Path]:
    """A new directory in `parent` that only this user can read, gone at the end."""
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (path / f"{LOCK}.new").open("x") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.rename(lock.name, path / LOCK)  # so that nobody finds it before it is held
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is abandoned


def remove_abandoned(parent: Path) -> None:
    """Remove this user's directories of updates whose writer is gone: by name and content nothing but those."""
    for path in parent.glob(f"{ALL}*"):
        with contextlib.suppress(OSError):  # it was removed meanwhile
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    found = path.lstat()
    if not (OURS.fullmatch(path.name) and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()):
        return False
    with os.scandir(path) as entries:
        if not all(CONTENT.fullmatch(entry.name) and entry.is_file(follow_symlinks=False) for entry in entries):
            return False
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return time.time() - found.st_mtime > SETTLED
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
