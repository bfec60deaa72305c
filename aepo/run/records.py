"""The records of a run, and whether they are those that a checkpoint of it came after."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from aepo.run.files import regular, whole_lines

RECORDS = ("metrics.jsonl", "evals.jsonl")

Record = dict[str, Any]  # dotted key -> number, None, or (rollout.branches_per_path) a list of numbers
Fingerprints = dict[str, list[Any]]
"""By file its size in bytes and the SHA-256 of its content, in hexadecimal digits."""


def finite(record: Record) -> Record:
    """With None in place of NaN and infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


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


def split_records(path: Path, step: int) -> tuple[bytes, bytes]:
    """The records of a file up to a step, and the rest: later ones, and a line that was cut off."""
    lines, tail = whole_lines(path)
    kept: list[bytes] = []
    later: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        at = json.loads(line).get("step")
        if type(at) is not int:
            raise ValueError(f"{path}, line {number}: expected a record with a step")
        (kept if at <= step else later).append(line)
    return b"".join(kept), b"".join(later) + tail


def _content(path: Path) -> bytes:
    try:
        return regular(path).read_bytes()
    except FileNotFoundError:
        return b""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
