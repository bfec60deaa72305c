"""Whether the records of a run are those that a checkpoint of it came after."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from aepo.run.files import regular

RECORDS = ("metrics.jsonl", "evals.jsonl")

Fingerprints = dict[str, list[Any]]
"""By file its size in bytes and the SHA-256 of its content, in hexadecimal digits."""


def fingerprints(run: Path) -> Fingerprints:
    """Of the records as they are now; what follows them later does not matter."""
    return {name: [len(content := _content(run / name)), _sha256(content)] for name in RECORDS}


def require_records(run: Path, written: Fingerprints, checkpoint: Path) -> None:
    """ValueError: a file does not begin as it was when the checkpoint was written: it was cut off or changed, or the
    checkpoint is of another run. written: what the checkpoint has; nothing in those of earlier versions."""
    for name, (size, digest) in written.items():
        content = _content(run / name)
        if _sha256(content[:size]) != digest:
            problem = f"has {len(content)} bytes, expected {size} or more" if len(content) < size else "was changed"
            raise ValueError(
                f"{run / name}: {problem}, or {checkpoint} is of another run: a run goes on from a checkpoint with the "
                "records that came before it; an older one may fit them (--from-step)"
            )


def _content(path: Path) -> bytes:
    try:
        return regular(path).read_bytes()
    except FileNotFoundError:
        return b""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
