"""Reading files that may be unfinished, damaged or missing: what can be read, and a line for what cannot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aepo.run.files import regular


def read_part(file: Path, reader: Callable[[Path], Any], problems: list[str]) -> Any:
    """What `reader` makes of a file; None, and a line in `problems`, if it cannot."""
    try:
        return reader(regular(file))
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except Exception as error:  # a damaged file, in as many ways as its reader has; the page says so and goes on
        problems.append(f"{file.name} cannot be read: {(str(error).splitlines() or [repr(error)])[0]}")
    return None


def read_json(file: Path) -> dict[str, Any]:
    """Numbers that JSON does not have, NaN and infinity, are None."""
    return _mapping(json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda name: None))


def read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    return _mapping(yaml.safe_load(file.read_text(encoding="utf-8")))


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"expected keys and values, got {type(content).__name__}")
    return content


def read_lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a line that is not a record with a step is left out and listed."""
    text = file.read_bytes().decode("utf-8", errors="replace")
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a JSON string
        if not line:
            continue
        # The writer ends every record with a newline: a tail without one was cut off when the process died.
        cut = number == text.count("\n") + 1
        try:
            record = json.loads(line)
            if cut or not isinstance(record["step"], int):
                raise ValueError
            records.append(record)
        except (ValueError, TypeError, KeyError):
            problems.append(f"{file.name}, line {number}: {'cut off' if cut else 'not a record'}, left out")
    return records


def rounded(value: float | None, digits: int) -> float | None:
    """To so many significant digits; None where there is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def fitting(sizes: Sequence[int], limit: int) -> list[int]:
    """As many indices, evenly spread, as have a sum of sizes within `limit`; always the last one."""
    if not sizes:
        return []
    keep = max(1, min(len(sizes), limit // max(1, min(sizes))))  # more cannot fit
    while keep > 1 and sum(sizes[i] for i in _spread(len(sizes), keep)) > limit:
        keep -= 1
    return _spread(len(sizes), keep)


def _spread(total: int, keep: int) -> list[int]:
    """`keep` of the indices 0 .. total - 1, evenly spread, the last one always among them."""
    return [total - 1 - (i * (total - 1)) // max(keep - 1, 1) for i in reversed(range(keep))]
