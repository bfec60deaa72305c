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


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed from now on, in this order: "flush NAME", "rename OLD NEW"."""
    events: list[str] = []
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def renaming(real: Any) -> Any:
        def rename(old: Path, new: Path | str) -> Path:
            events.append(f"rename {old.name} {Path(new).name}")
            return real(old, new)

        return rename

    monkeypatch.setattr(os, "fsync", flush)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, renaming(getattr(Path, name)))
    return events
