"""Disks that are full, and what has reached them."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files end there: the kernel writes what still fits, then nothing. For no longer than the code under test, as
    pytest may write to a file, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flushed(path: Path) -> str:
    """The event of a flush of the file or directory as it is now."""
    return f"flush {path.name}" if path.is_dir() else f"flush {path.name} {path.stat().st_size}"


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed from now on, in this order: "flush NAME SIZE", "rename OLD NEW". A directory has no
    SIZE; that of a file says whether its content had left the buffers of Python by then."""
    events: list[str] = []
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        events.append(flushed(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def renaming(real: Any) -> Any:
        def rename(old: Path, new: Path | str) -> Path:
            events.append(f"rename {old.name} {Path(new).name}")
            return real(old, new)

        return rename

    monkeypatch.setattr(os, "fsync", flush)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, renaming(getattr(Path, name)))
    return events
