"""What a run does not begin with, or go on from: said in one line, before anything is changed."""

from __future__ import annotations

import os
import shlex
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aepo.run.files import REPLACED, read_run, regular
from aepo.run.layout import (
    ABANDONED,
    FILES,
    FOLDERS,
    SUMS,
    WHOLE,
    additions,
    entries,
    folders_set_aside,
    ours,
    step_of,
    temporaries,
    written,
)
from aepo.run.lock import LOCK, is_foreign
from aepo.run.outputs import refuse_run_files
from aepo.run.records import RECORDS, split_records


def refuse(run: Path, *, resume: bool, overwrite: bool) -> None:
    """The errors of `RunDirectory.claim` that have to do with what is there."""
    try:
        if not stat.S_ISDIR(run.lstat().st_mode) and not run.is_dir():
            raise ValueError(f"run.dir = {run}: expected a directory, or nothing, got something else")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise unusable(run, error) from None
    _refuse_other_kinds(run)
    _refuse_runs_in_temporaries(run)
    if resume:
        _refuse_resuming(run)
    else:
        refuse_run_files("run.dir =", run)
        _refuse_beginning(run, overwrite=overwrite)


def refuse_removal(run: Path, needed: Iterable[tuple[str, Path]], resume_step: int | None) -> None:
    """ValueError: a setting names files that are removed as this run begins, or moved to abandoned/. needed: settings
    with what they name. resume_step: None: what is there is replaced."""
    if resume_step is None:
        gone, how = [*written(run)], "--overwrite removes"
    else:
        kept = (one for folder in ("checkpoints", "trees", "answers") for one in ours(run, folder))
        gone, how = [one for one in kept if step_of(one) > resume_step], f"going on from step {resume_step} moves"
    places = {Path(os.path.realpath(one)) for one in gone}
    for setting, path in needed:
        for one in (path, *entries(path)):  # of a model directory, they may be links
            real = Path(os.path.realpath(one))
            if not places.isdisjoint((real, *real.parents)):
                raise ValueError(f"{setting}: expected files that stay, {how} {path}: copy it and name the copy")


def require_whole_settings(run: Path) -> None:
    """ValueError: config.yaml lacks settings that the newest checkpoint has. They would be read as their defaults."""
    checkpoints = sorted(ours(run, "checkpoints"), key=step_of)
    copy, config = (checkpoints[-1] / "run.yaml" if checkpoints else None), regular(run / "config.yaml")
    if copy is None or not (copy.is_file() and config.is_file()):  # who reads them says it
        return
    whole, there = copy.read_bytes().strip(), config.read_bytes().strip()
    if whole == there:
        return
    if whole.startswith(there):
        raise ValueError(
            f"{config}: expected all settings of the run, is {'cut off' if there else 'empty'}; {copy} is whole"
        )
    names = _setting_names(config)
    missing = [name for name in _setting_names(copy) if name not in names] if names else []
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{config}: expected all settings of the run, lacks {some}; {copy} has them")


def require_writable(run: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=run).close()
    except OSError as error:
        raise unusable(run, error) from None


def unusable(run: Path, error: OSError) -> OSError:
    """The error of an operation there, which names run.dir."""
    where = f" ({error.filename})" if error.filename is not None and str(error.filename) != str(run) else ""
    expected = "expected a directory that can be made, locked and written"
    return type(error)(f"run.dir = {run}: {expected}: {error.strerror or error}{where}")


def _refuse_resuming(run: Path) -> None:
    if read_run(run)["status"] == REPLACED:
        raise ValueError(f"{run}: was being replaced by --overwrite, which did not end: repeat that")
    for name in RECORDS:
        split_records(run / name, 0)
    require_whole_settings(run)


def _refuse_beginning(run: Path, *, overwrite: bool) -> None:
    if not (run / "run.json").exists():
        if found := [*written(run)]:
            names = ", ".join(str(one.relative_to(run)) for one in found[:3]) + (", ..." if len(found) > 3 else "")
            raise FileExistsError(
                f"{run} has {names}, as a run writes them, and no run.json that says so: move them away, or choose "
                "another run.dir"
            )
        return
    try:
        read_run(run)
    except ValueError as error:
        raise ValueError(f"{error}: move it away, or choose another run.dir") from None
    if not overwrite:
        raise FileExistsError(
            f"{run} already holds a run: continue it with --resume {shlex.quote(str(run))}, replace it with "
            "--overwrite, or choose another run.dir"
        )
    _refuse_additions(run)
    _refuse_runs_aside(run)


def _refuse_other_kinds(run: Path) -> None:
    """ValueError: a link, or a folder for a file, by a name of ours. To follow it, or to replace it, were wrong."""
    _refuse_unless(run / LOCK, folder=False)
    if is_foreign(run):
        raise ValueError(f"{run / LOCK}: expected that of a run: move it away, or choose another run.dir")
    for root in (run, *folders_set_aside(run)):
        for name in FILES:
            _refuse_unless(root / name, folder=False)
        for folder in FOLDERS:
            _refuse_unless(root / folder, folder=True)
            for one in ours(root, folder):
                _refuse_unless(one, folder=folder == "checkpoints")
        for one in temporaries(root):
            if one.is_symlink():
                _refuse_unless(one, folder=one.parent.name == "checkpoints")
    _refuse_unless(run / "wandb", folder=True)
    _refuse_unless(run / ABANDONED, folder=True)


def _refuse_unless(path: Path, *, folder: bool) -> None:
    try:
        mode = path.lstat().st_mode  # one look: it may be given up meanwhile
    except OSError:
        return
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
        kind = kinds.get(stat.S_IFMT(mode), "a pipe, a socket or a device")
        raise ValueError(f"{path}: expected a {'folder' if folder else 'file'}, as a run has there, got {kind}")


def _refuse_additions(run: Path) -> None:
    """ValueError: a checkpoint, which is removed as a whole, has something in it that is not ours."""
    for root in (run, *folders_set_aside(run)):
        for one in entries(root / "checkpoints"):
            if not WHOLE.fullmatch(one.name) or one.is_symlink():
                continue
            for added in additions(one):
                if (one / SUMS).exists():
                    raise ValueError(f"{added}: expected only what the run wrote in a checkpoint: move it away")
                raise ValueError(f"{one}: expected a checkpoint with a list of its files, {SUMS}: move it away")


def _refuse_runs_aside(run: Path) -> None:
    """ValueError: a folder in abandoned/ is another run, which has files there that none has that was set aside."""
    for root in folders_set_aside(run):
        for name in ("run.json", "config.yaml", LOCK):
            if os.path.lexists(root / name):
                raise ValueError(f"{root / name}: expected only what this run has set aside: move {root} away")


def _refuse_runs_in_temporaries(run: Path) -> None:
    """ValueError: another run is in a folder that is removed as what a killed run was writing."""
    for root in (run, *folders_set_aside(run)):
        for one in temporaries(root):
            if not one.is_symlink() and (found := next(one.rglob(LOCK), None)):
                raise ValueError(f"{found.parent}: expected only what the run was writing, got a run: move it away")


def _setting_names(path: Path) -> list[str]:
    """section.setting of a YAML file; none where it cannot be read as such, which whoever loads it says better."""
    import yaml

    try:
        sections: Any = yaml.safe_load(path.read_bytes())
        return [f"{section}.{name}" for section, content in sections.items() for name in content]
    except Exception:  # of YAML, and of the values that it makes
        return []
