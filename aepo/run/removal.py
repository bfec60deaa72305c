"""Taking away what a run has written, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from aepo.run.layout import (
    ABANDONED,
    FILES,
    FOLDERS,
    additions,
    entries,
    ours,
    replacing,
    step_of,
    step_path,
    temporaries,
)


def remove_written(root: Path, wandb_id: str | None) -> None:
    """All that the run of this id has in its directory, or in one that was set aside."""
    for folder in FOLDERS:
        for path in ours(root, folder):
            remove_checkpoint(path) if folder == "checkpoints" else _remove(path)
        remove_if_empty(root / folder)
    _remove_wandb(root / "wandb", wandb_id)
    for name in FILES:
        (root / name).unlink(missing_ok=True)
    if root.parent.name == ABANDONED:
        remove_if_empty(root)


def remove_checkpoint(path: Path) -> None:
    """At once: half a checkpoint is none."""
    _remove(path.rename(step_path(path.parent, ".removing", step_of(path))))


def remove_temporaries(root: Path) -> None:
    """What a killed run was writing."""
    for one in temporaries(root):
        remove_temporary(one)


def remove_temporary(one: Path) -> None:
    """A checkpoint that was being replaced, by one that is not there, is put back; what somebody else has put into one
    goes to the new one. A link stays."""
    if one.is_symlink():
        return
    final = replacing(one)
    if final != one and not final.exists():
        one.rename(final)
        return
    for added in additions(one) if final != one else ():
        if os.path.lexists(added):  # not moved with the folder that it is in
            added.rename(final / added.relative_to(one))
    _remove(one)


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_wandb(folder: Path, wandb_id: str | None) -> None:
    """The files of this run's id, and the links to them."""
    if wandb_id is None:
        return
    # With a number behind it where a run was resumed within a second of its start
    own = re.compile(rf"(offline-)?run-.+-{re.escape(wandb_id)}(-\d+)?")
    for path in entries(folder):
        parts = Path(os.readlink(path)).parts if path.is_symlink() else (path.name,)
        if any(own.fullmatch(part) for part in parts):
            _remove(path)
    remove_if_empty(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
