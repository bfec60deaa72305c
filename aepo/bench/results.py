"""The JSON file of a run."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aepo.bench.harness import Refusal, Row


def check_json(path: Path) -> None:
    """ValueError if the file cannot be written: better before a measurement than after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        new = _new(path)
        new.touch()
        new.unlink()
    except OSError as error:
        raise ValueError(f"json must be a file that can be written; got {path} ({error.strerror})") from None


def _new(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def write_json(
    path: Path,
    here: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    refused: Sequence[Refusal],
) -> None:
    """Machine, peers, rows, and who got no row and why."""
    result = {
        "machine": here,
        "peers": compared,
        "rows": [dataclasses.asdict(row) for row in rows],
        "refused": [dataclasses.asdict(refusal) for refusal in refused],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _new(path)  # whoever is stopped while writing leaves the old file
    new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    new.replace(path)
