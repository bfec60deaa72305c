"""The directory of a run: held by one process, in which a run touches only what a run has written.

Ours are, by name: the files and folders of `aepo.run.log`, checkpoints, what a resumed run has set aside, `.lock`, and
the temporary names under which they are written. Everything else in there is left alone, whatever it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from aepo.run.files import REPLACED, read_facts, refuse_unwritable, regular, whole_lines, write_file
from aepo.run.lock import LOCK, DirectoryLock, in_use, is_foreign, is_held, last_holder
from aepo.run.records import RECORDS

FILES = ("config.yaml", *RECORDS, "report.html", "run.json")  # as they are removed: run.json, which explains them, last
ABANDONED = "abandoned"
SUMS = "SHA256SUMS"  # of a checkpoint: says which files a run wrote there
UNFINISHED = f"{ABANDONED}/.unfinished"  # what `set_aside` has moved so far

_NUMBER = "(?:[0-9]{6}|[1-9][0-9]{6,})"  # f"{step:06d}", and no other way to write a step
_STEP, _REPLACED = f"step_{_NUMBER}", rf"\.replaced_{_NUMBER}"
FOLDERS = {  # what of each is ours
    "checkpoints": re.compile(_STEP),
    "trees": re.compile(rf"{_STEP}\.json"),
    "answers": re.compile(rf"{_STEP}\.jsonl"),
    "tensorboard": re.compile(r"events\.out\.tfevents\..+"),
}
_TEMPORARY = {  # what of each is ours while it is being written
    ".": re.compile(r"\.(?:config\.yaml|run\.json|metrics\.jsonl|evals\.jsonl)\.writing|\.engine-\w{8,}"),
    "checkpoints": re.compile(rf"\.(?:writing|removing)_{_NUMBER}|{_REPLACED}"),
    "trees": re.compile(rf"\.{_STEP}\.json\.writing"),
    "answers": re.compile(rf"\.{_STEP}\.jsonl\.writing"),
}


class RunDirectory:
    """One that this process holds until `release`, or until it ends, however it ends."""

    def __init__(self, path: Path, lock: DirectoryLock, *, created: Sequence[Path]) -> None:
        self.path = path
        self._lock = lock
        self._created = created

    @classmethod
    def claim(cls, path: Path | str, *, resume: bool, overwrite: bool = False) -> RunDirectory:
        """Lock it, and create it, with its parents, for a new run. Nothing else is changed.

        BlockingIOError, in one line that names the holder: another process, or this one, holds it. FileExistsError: a
        new run, and there is one already, or files by the names of a run that no run.json explains. ValueError: a run
        is to be resumed, or replaced, that is none of ours or cannot be read, or a link stands where a run has a file,
        or what is to be removed has something in it that the run did not write, or the place is one where another run
        keeps its own files. Other OSErrors name run.dir: the directory cannot be made, locked or written.
        """
        path = Path(path)
        if is_held(path):
            raise in_use(path)
        _refuse(path, resume=resume, overwrite=overwrite)
        created = [one for one in (path, *path.parents) if not one.exists()]
        try:
            claimed = cls(path, DirectoryLock(path, create=not resume), created=created)
        except BlockingIOError:
            raise
        except OSError as error:
            _remove_created(created)
            raise _unusable(path, error) from None
        try:  # what another process did before this one had the lock
            _refuse(path, resume=resume, overwrite=overwrite)
            _require_writable(path)
        except BaseException:
            claimed.release()
            raise
        return claimed

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @staticmethod
    def check(path: Path | str, *, resume: bool, overwrite: bool = False) -> None:
        """The refusals of `claim`, before the work on a model. It is claimed and released, as only that tells."""
        RunDirectory.claim(path, resume=resume, overwrite=overwrite).release()

    def require(self) -> None:
        """OSError: the directory that is held is no longer there, by its name."""
        if not self._lock.held:
            raise FileNotFoundError(f"{self.path}: was removed, moved or replaced while this run was going on")

    def replace_old(self) -> None:
        """Remove what an earlier run has written, once all is known to be well with the new one.

        Until the last file is gone, run.json says what is happening: after a crash, the directory can be replaced
        again, and not resumed.
        """
        for root in (*_set_aside(self.path), self.path):
            _remove_temporaries(root)
        if not (self.path / "run.json").exists():
            return
        facts = read_facts(self.path)
        write_file(self.path / "run.json", json.dumps({**facts, "status": REPLACED}, indent=2) + "\n")
        for root in (*_set_aside(self.path), self.path):
            _remove_written(root, facts.get("wandb_id"))
        _remove_if_empty(self.path / ABANDONED)

    def set_aside(self, step: int) -> Path | None:
        """Move what is later than `step` to abandoned/1, 2, ...: checkpoints, records, trees and answers of a future
        that a resumed run does not continue. None: there is nothing.

        Checkpoints go first, the newest before the others: killed in between, the run is as if it had been killed
        after its newest checkpoint, and this can be repeated. ValueError: the records cannot be read; nothing is moved.
        """
        rests = {name: _split(self.path / name, step) for name in RECORDS}
        _remove_temporaries(self.path)
        later = [path for folder in ("trees", "answers") for path in _ours(self.path, folder) if step_of(path) > step]
        checkpoints = sorted(
            (path for path in _ours(self.path, "checkpoints") if step_of(path) > step), key=step_of, reverse=True
        )
        unfinished = self.path / UNFINISHED
        if not (unfinished.exists() or later or checkpoints or any(rest for _, rest in rests.values())):
            return None
        unfinished.mkdir(parents=True, exist_ok=True)
        for path in checkpoints:
            _move(path, unfinished)
        _flush(unfinished, unfinished / "checkpoints", self.path / "checkpoints")
        for name, (kept, rest) in rests.items():
            if rest:
                before = (unfinished / name).read_bytes() if (unfinished / name).exists() else b""
                write_file(unfinished / name, rest if rest.endswith(before) else rest + before)
                write_file(self.path / name, kept)
        for path in later:
            _move(path, unfinished)
        numbers = [int(path.name) for path in unfinished.parent.iterdir() if re.fullmatch("[0-9]+", path.name)]
        final = unfinished.with_name(str(max(numbers, default=0) + 1))
        unfinished.rename(final)
        _flush(final.parent)
        return final

    def release(self) -> None:
        """Somebody else may claim it. What could not be removed is tried once more, and a directory that was made
        for this run and has nothing in it goes, too, with its parents. A second call does nothing."""
        if self._lock.held:
            with contextlib.suppress(OSError):
                _remove_temporaries(self.path)
                if self._created and os.listdir(self.path) == [LOCK]:
                    (self.path / LOCK).unlink()
                    _remove_created(self._created)
        self._lock.release()


def step_of(path: Path) -> int:
    """Of a checkpoint, or a file of trees or answers, which is ours."""
    return int(path.name.removeprefix("step_").partition(".")[0])


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
    return first in (*FILES, LOCK, *FOLDERS, ABANDONED, "wandb") or bool(_TEMPORARY["."].fullmatch(first))


def _is_run(folder: Path) -> bool:
    if is_held(folder):
        return True
    try:
        _read_run(folder)
    except ValueError:  # damaged, and of a run all the same
        return (folder / "run.json").exists() and bool(last_holder(folder))
    return True


def refuse_removal(run: Path, needed: Iterable[tuple[str, Path]], resume_step: int | None) -> None:
    """ValueError: a setting names files that are removed as this run begins, or moved to abandoned/. needed: settings
    with what they name. resume_step: None: what is there is replaced."""
    if resume_step is None:
        gone, how = [*_written(run)], "--overwrite removes"
    else:
        ours = (one for folder in ("checkpoints", "trees", "answers") for one in _ours(run, folder))
        gone, how = [one for one in ours if step_of(one) > resume_step], f"going on from step {resume_step} moves"
    places = {Path(os.path.realpath(one)) for one in gone}
    for setting, path in needed:
        for one in (path, *_entries(path)):  # of a model directory, they may be links
            real = Path(os.path.realpath(one))
            if not places.isdisjoint((real, *real.parents)):
                raise ValueError(f"{setting}: expected files that stay, {how} {path}: copy it and name the copy")


def require_whole_settings(run: Path) -> None:
    """ValueError: config.yaml lacks settings that the newest checkpoint has. They would be read as their defaults."""
    checkpoints = sorted(_ours(run, "checkpoints"), key=step_of)
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


def _refuse(path: Path, *, resume: bool, overwrite: bool) -> None:
    try:
        if not stat.S_ISDIR(path.lstat().st_mode) and not path.is_dir():
            raise ValueError(f"run.dir = {path}: expected a directory, or nothing, got something else")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unusable(path, error) from None
    _refuse_other_kinds(path)
    _refuse_runs_in_temporaries(path)
    if not resume:
        refuse_run_files("run.dir =", path)
    if resume:
        facts = _read_run(path)
        if facts["status"] == REPLACED:
            raise ValueError(f"{path}: was being replaced by --overwrite, which did not end: repeat that")
        for name in RECORDS:
            _split(path / name, 0)
        require_whole_settings(path)
    elif (path / "run.json").exists():
        try:
            _read_run(path)
        except ValueError as error:
            raise ValueError(f"{error}: move it away, or choose another run.dir") from None
        if overwrite:
            _refuse_additions(path)
            _refuse_runs_aside(path)
        else:
            raise FileExistsError(
                f"{path} already holds a run: continue it with --resume {shlex.quote(str(path))}, replace it with "
                "--overwrite, or choose another run.dir"
            )
    elif found := [*_written(path)]:
        names = ", ".join(str(one.relative_to(path)) for one in found[:3]) + (", ..." if len(found) > 3 else "")
        raise FileExistsError(
            f"{path} has {names}, as a run writes them, and no run.json that says so: move them away, or choose "
            "another run.dir"
        )


def _read_run(path: Path) -> dict[str, Any]:
    """run.json, if it is ours."""
    facts = read_facts(path)
    if not (
        isinstance(facts.get("status"), str) and isinstance(facts.get("resumed"), list) and "wall_seconds" in facts
    ):
        raise ValueError(f"{path / 'run.json'}: expected that of a run (status, resumed, wall_seconds)")
    return facts


def _refuse_other_kinds(path: Path) -> None:
    """ValueError: a link, or a folder for a file, by a name of ours. To follow it, or to replace it, were wrong."""
    _refuse_unless(path / LOCK, folder=False)
    if is_foreign(path):
        raise ValueError(f"{path / LOCK}: expected that of a run: move it away, or choose another run.dir")
    for root in (path, *_set_aside(path)):
        for name in FILES:
            _refuse_unless(root / name, folder=False)
        for folder in FOLDERS:
            _refuse_unless(root / folder, folder=True)
            for one in _ours(root, folder):
                _refuse_unless(one, folder=folder == "checkpoints")
        for one in _temporaries(root):
            if one.is_symlink():
                _refuse_unless(one, folder=one.parent.name == "checkpoints")
    _refuse_unless(path / "wandb", folder=True)
    _refuse_unless(path / ABANDONED, folder=True)


def _refuse_additions(path: Path) -> None:
    """ValueError: a checkpoint, which is removed as a whole, has something in it that is not ours."""
    for root in (path, *_set_aside(path)):
        for one in _entries(root / "checkpoints"):
            if not re.fullmatch(rf"{_STEP}|{_REPLACED}", one.name) or one.is_symlink():
                continue
            for added in _additions(one):
                if (one / SUMS).exists():
                    raise ValueError(f"{added}: expected only what the run wrote in a checkpoint: move it away")
                raise ValueError(f"{one}: expected a checkpoint with a list of its files, {SUMS}: move it away")


def _refuse_runs_aside(path: Path) -> None:
    """ValueError: a folder in abandoned/ is another run, which has files there that none has that was set aside."""
    for root in _set_aside(path):
        for name in ("run.json", "config.yaml", LOCK):
            if os.path.lexists(root / name):
                raise ValueError(f"{root / name}: expected only what this run has set aside: move {root} away")


def _refuse_runs_in_temporaries(path: Path) -> None:
    """ValueError: another run is in a folder that is removed as what a killed run was writing."""
    for root in (path, *_set_aside(path)):
        for one in _temporaries(root):
            if not one.is_symlink() and (found := next(one.rglob(LOCK), None)):
                raise ValueError(f"{found.parent}: expected only what the run was writing, got a run: move it away")


def _additions(checkpoint: Path) -> list[Path]:
    """What is in a checkpoint and not in its list. Of one that was being replaced: nor in the new one, as it may have
    lost its list."""
    try:
        sums = regular(checkpoint / SUMS).read_text()
    except (OSError, UnicodeDecodeError):
        sums = ""
    listed = {checkpoint / name for name in (SUMS, *(line.partition("  ")[2] for line in sums.splitlines()))}
    listed |= {parent for path in listed for parent in path.parents}
    new = _final(checkpoint)
    return [
        path
        for path in sorted(checkpoint.rglob("*"))
        if path not in listed and (new == checkpoint or not os.path.lexists(new / path.relative_to(checkpoint)))
    ]


def _final(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name.replace(".replaced_", "step_"))


def _refuse_unless(path: Path, *, folder: bool) -> None:
    try:
        mode = path.lstat().st_mode  # one look: it may be given up meanwhile
    except OSError:
        return
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
        kind = kinds.get(stat.S_IFMT(mode), "a pipe, a socket or a device")
        raise ValueError(f"{path}: expected a {'folder' if folder else 'file'}, as a run has there, got {kind}")


def _entries(folder: Path) -> list[Path]:
    """Sorted; none of a folder that is not there, or of a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    with contextlib.suppress(FileNotFoundError):  # given up meanwhile
        return sorted(folder.iterdir())
    return []


def _ours(root: Path, folder: str) -> list[Path]:
    """Of a run's folder, what has the name of something that a run writes there."""
    return [path for path in _entries(root / folder) if FOLDERS[folder].fullmatch(path.name)]


def _set_aside(path: Path) -> list[Path]:
    """abandoned/1, 2, ..., and one that was not finished."""
    there = _entries(path / ABANDONED)
    return [
        one
        for one in there
        if one.is_dir() and not one.is_symlink() and (one == path / UNFINISHED or re.fullmatch("[1-9][0-9]*", one.name))
    ]


def _written(path: Path) -> Iterator[Path]:
    """All that has the name of something that a run writes."""
    for root in (path, *_set_aside(path)):
        yield from (root / name for name in FILES if (root / name).exists())
        for folder in FOLDERS:
            yield from _ours(root, folder)


def _remove_written(root: Path, wandb_id: str | None) -> None:
    for folder in FOLDERS:
        for path in _ours(root, folder):
            if folder == "checkpoints":
                path = path.rename(path.with_name(path.name.replace("step_", ".removing_")))  # half of one is none
            _remove(path)
        _remove_if_empty(root / folder)
    _remove_wandb(root / "wandb", wandb_id)
    for name in FILES:
        (root / name).unlink(missing_ok=True)
    if root.parent.name == ABANDONED:
        _remove_if_empty(root)


def _remove_wandb(folder: Path, wandb_id: str | None) -> None:
    """The files of this run's id, and the links to them."""
    if wandb_id is None:
        return
    # With a number behind it where a run was resumed within a second of its start
    own = re.compile(rf"(offline-)?run-.+-{re.escape(wandb_id)}(-\d+)?")
    for path in _entries(folder):
        parts = Path(os.readlink(path)).parts if path.is_symlink() else (path.name,)
        if any(own.fullmatch(part) for part in parts):
            _remove(path)
    _remove_if_empty(folder)


def _remove_temporaries(path: Path) -> None:
    """What a killed run was writing. A checkpoint that was being replaced, by one that is not there, is put back."""
    for one in _temporaries(path):
        if one.is_symlink():
            continue
        final = _final(one)
        if final != one and not final.exists():
            one.rename(final)
            continue
        for added in _additions(one) if final != one else ():
            if os.path.lexists(added):  # not moved with the folder that it is in
                added.rename(final / added.relative_to(one))
        _remove(one)


def _temporaries(root: Path) -> list[Path]:
    return [
        one for folder, pattern in _TEMPORARY.items() for one in _entries(root / folder) if pattern.fullmatch(one.name)
    ]


def _require_writable(path: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> OSError:
    where = f" ({error.filename})" if error.filename is not None and str(error.filename) != str(path) else ""
    expected = "expected a directory that can be made, locked and written"
    return type(error)(f"run.dir = {path}: {expected}: {error.strerror or error}{where}")


def _remove_created(folders: Sequence[Path]) -> None:
    """The innermost comes first; one that is no longer empty, and those around it, stay."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _move(path: Path, to: Path) -> None:
    folder = to / path.parent.name
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)


def _flush(*folders: Path) -> None:
    """The entries of folders to the disk itself, where they are there."""
    for folder in folders:
        if folder.is_dir():
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _split(path: Path, step: int) -> tuple[bytes, bytes]:
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


def _setting_names(path: Path) -> list[str]:
    """section.setting of a YAML file; none where it cannot be read as such, which whoever loads it says better."""
    import yaml

    try:
        sections: Any = yaml.safe_load(path.read_bytes())
        return [f"{section}.{name}" for section, content in sections.items() for name in content]
    except Exception:  # of YAML, and of the values that it makes
        return []
