"""Model directories that are made once and kept: whole under their name, or not there.

Several processes may make the same one at the same time: each works in a directory of its own, the first to finish
gives it the name, the others take what is there. Nobody waits, so a process that hangs holds up none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from aepo.files.sums import sha256_of
from aepo.registry import error_text

SUMS = "SHA256SUMS"


def cached(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, once `make` has filled it. What is damaged there is made again.

    ValueError, in one line: the cache directory cannot be written. `make` is called with an empty directory, after that
    is known; what it raises is raised, and leaves nothing.
    """
    if _whole(target):
        return target
    with _naming(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
        with _partial(target) as partial:
            make(partial)
            names = sorted(path.name for path in partial.iterdir())
            (partial / SUMS).write_text("".join(f"{sha256_of(partial / name)}  {name}\n" for name in names))
            if not _whole(target):
                if target.exists():
                    print(f"warning: {target} is not what was written, and is made again", file=sys.stderr)
                    if target.is_dir():
                        target.rename(partial.with_name(f"{partial.name}.damaged"))
                    else:
                        target.unlink()
                with contextlib.suppress(OSError):  # another process was faster
                    partial.rename(target)
                _remove_left(target)
            if not _whole(target):
                raise OSError(f"{target.name} is not what was written")
    return target


def _whole(target: Path) -> bool:
    try:
        sums = [line.partition("  ")[::2] for line in (target / SUMS).read_text().splitlines()]
        return bool(sums) and all(sha256_of(target / name) == checksum for checksum, name in sums)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new directory beside the target, locked while this process lives."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        descriptor = os.open(path, os.O_RDONLY)
        if _lock(descriptor) is not False and path.exists():
            break
        os.close(descriptor)  # another process took it for one that was left, before it was locked
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # not there, once it has its name
        os.close(descriptor)


def _remove_left(target: Path) -> None:
    """What processes that were killed have left beside the target: no living one holds its lock."""
    for path in target.parent.glob(f"{target.name}.*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or none of ours
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            if _lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def _naming(cache_dir: Path) -> Iterator[None]:
    from safetensors import SafetensorError  # not before a model is made: the kernels alone do without

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model.cache_dir = {str(cache_dir)!r}: expected a directory to write to: {error_text(error)}"
        ) from error
