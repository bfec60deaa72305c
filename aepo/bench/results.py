"""The JSON file of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aepo.bench.harness import Refusal
from aepo.run.files import write_file
from aepo.run.outputs import refuse_output


def check_json(path: Path) -> None:
    """ValueError if the file cannot be written: better before a measurement than after it."""
    with contextlib.suppress(OSError, ValueError):  # said below
        path.parent.mkdir(parents=True, exist_ok=True)
    refuse_output("--json", path)


def write_json(
    path: Path,
    here: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    rows: Sequence[Any],
    refused: Sequence[Refusal],
) -> None:
    """Machine, peers, rows (of one dataclass), and who got no row and why. ValueError: it cannot be written."""
    result = {
        "machine": here,
        "peers": compared,
        "rows": [dataclasses.asdict(row) for row in rows],
        "refused": [dataclasses.asdict(refusal) for refusal in refused],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:  # a disk that is full by now
        raise ValueError(f"--json {path}: {error.strerror or error}") from error
