"""No file that is written for a user lands on those that a run keeps for itself."""

from __future__ import annotations

import os
from pathlib import Path

from aepo.run.files import read_run, refuse_unwritable
from aepo.run.layout import ABANDONED, FILES, FOLDERS, TEMPORARY
from aepo.run.lock import LOCK, is_held, last_holder


def refuse_output(name: str, path: Path) -> None:
    """ValueError, before the work and not after it: the file is one of a run's own, or cannot be written. name: of the
    argument."""
    refuse_run_files(name, path)
    refuse_unwritable(name, path)


def refuse_run_files(name: str, path: Path) -> None:
    """ValueError, which begins with `name`: a run keeps its own files there, also by another way to that place. A page
    may have the name that a report gives it."""
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):  # who writes there says it
        return
    for run in real.parents:
        if _is_own(real.relative_to(run)) and _is_run(run):
            raise ValueError(f"{name} {path}: expected another place, {run} is a run and keeps its own files there")


def _is_own(inside: Path) -> bool:
    first, *others = inside.parts
    if inside.name == "report.html" and (not others or (first == ABANDONED and len(others) == 2)):
        return False
    return first in (*FILES, LOCK, *FOLDERS, ABANDONED, "wandb") or bool(TEMPORARY["."].fullmatch(first))


def _is_run(folder: Path) -> bool:
    if is_held(folder):
        return True
    try:
        read_run(folder)
    except ValueError:  # damaged, and of a run all the same
        return (folder / "run.json").exists() and bool(last_holder(folder))
    return True
