"""The directory of a run: held by one process, in which a run touches only what a run has written.

What that is, `aepo.run.layout` knows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from aepo.run.files import REPLACED, flush, read_facts, write_file
from aepo.run.layout import ABANDONED, UNFINISHED, folders_set_aside, ours, step_of
from aepo.run.lock import LOCK, DirectoryLock, in_use, is_held
from aepo.run.records import RECORDS, split_records
from aepo.run.refusals import refuse, refuse_removal, require_writable, unusable
from aepo.run.removal import remove_if_empty, remove_temporaries, remove_written


class RunDirectory:
    """One that this process holds until `release`, or until it ends, however it ends."""

    def __init__(self, path: Path, lock: DirectoryLock, *, created: Sequence[Path]) -> None:
        self.path = path
        self._lock = lock
        self._created = created

    @classmethod
    def claim(
        cls,
        path: Path | str,
        *,
        resume_step: int | None = None,
        overwrite: bool = False,
        needed: Iterable[tuple[str, Path]] = (),
    ) -> RunDirectory:
        """Lock it, and create it, with its parents, for a new run. Nothing else is changed.

        resume_step: a run is there, and goes on from this step. needed: settings with the files that they name, which
        have to stay.

        BlockingIOError, in one line that names the holder: another process, or this one, holds it. FileExistsError: a
        new run, and there is one already, or files by the names of a run that no run.json explains. ValueError: a run
        is to be resumed, or replaced, that is none of ours or cannot be read, or a link stands where a run has a file,
        or what is to be removed has something in it that the run did not write, or that is needed, or the place is one
        where another run keeps its own files. Other OSErrors name run.dir: the directory cannot be made, locked or
        written.
        """
        path, resume = Path(path), resume_step is not None
        if is_held(path):
            raise in_use(path)
        refuse(path, resume=resume, overwrite=overwrite)
        created = [one for one in (path, *path.parents) if not one.exists()]
        try:
            claimed = cls(path, DirectoryLock(path, create=not resume), created=created)
        except BlockingIOError:
            raise
        except OSError as error:
            _remove_created(created)
            raise unusable(path, error) from None
        try:  # what another process did before this one had the lock
            refuse(path, resume=resume, overwrite=overwrite)
            require_writable(path)
            refuse_removal(path, needed, resume_step)
        except BaseException:
            claimed.release()
            raise
        return claimed

    @classmethod
    def check(
        cls,
        path: Path | str,
        *,
        resume_step: int | None = None,
        overwrite: bool = False,
        needed: Iterable[tuple[str, Path]] = (),
    ) -> None:
        """The refusals of `claim`, before the work on a model. It is claimed and released, as only that tells."""
        cls.claim(path, resume_step=resume_step, overwrite=overwrite, needed=needed).release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def require(self) -> None:
        """OSError: the directory that is held is no longer there, by its name."""
        if not self._lock.held:
            raise FileNotFoundError(f"{self.path}: was removed, moved or replaced while this run was going on")

    def make_room(self, resume_step: int | None) -> Path | None:
        """Once all is known to be well with the run: `replace_old` for a new one, else `set_aside`, with its result."""
        if resume_step is not None:
            return self.set_aside(resume_step)
        self.replace_old()
        return None

    def replace_old(self) -> None:
        """Remove what an earlier run has written.

        Until the last file is gone, run.json says what is happening: after a crash, the directory can be replaced
        again, and not resumed.
        """
        for root in (*folders_set_aside(self.path), self.path):
            remove_temporaries(root)
        if not (self.path / "run.json").exists():
            return
        facts = read_facts(self.path)
        write_file(self.path / "run.json", json.dumps({**facts, "status": REPLACED}, indent=2) + "\n")
        for root in (*folders_set_aside(self.path), self.path):
            remove_written(root, facts.get("wandb_id"))
        remove_if_empty(self.path / ABANDONED)

    def set_aside(self, step: int) -> Path | None:
        """Move what is later than `step` to abandoned/1, 2, ...: checkpoints, records, trees and answers of a future
        that a resumed run does not continue. None: there is nothing.

        Checkpoints go first, the newest before the others: killed in between, the run is as if it had been killed
        after its newest checkpoint, and this can be repeated. ValueError: the records cannot be read; nothing is moved.
        """
        rests = {name: split_records(self.path / name, step) for name in RECORDS}
        remove_temporaries(self.path)
        later = [path for folder in ("trees", "answers") for path in ours(self.path, folder) if step_of(path) > step]
        checkpoints = sorted(
            (path for path in ours(self.path, "checkpoints") if step_of(path) > step), key=step_of, reverse=True
        )
        unfinished = self.path / UNFINISHED
        if not (unfinished.exists() or later or checkpoints or any(rest for _, rest in rests.values())):
            return None
        unfinished.mkdir(parents=True, exist_ok=True)
        for path in checkpoints:
            _move(path, unfinished)
        for folder in (unfinished, unfinished / "checkpoints", self.path / "checkpoints"):
            if folder.is_dir():
                flush(folder)
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
        flush(final.parent)
        return final

    def release(self) -> None:
        """Somebody else may claim it. What could not be removed is tried once more, and a directory that was made
        for this run and has nothing in it goes, too, with its parents. A second call does nothing."""
        if self._lock.held:
            with contextlib.suppress(OSError):
                remove_temporaries(self.path)
                if self._created and os.listdir(self.path) == [LOCK]:
                    (self.path / LOCK).unlink()
                    _remove_created(self._created)
        self._lock.release()


def _remove_created(folders: Sequence[Path]) -> None:
    """The innermost comes first; one that is no longer empty, and those around it, stay."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _move(path: Path, to: Path) -> None:
    folder = to / path.parent.name
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)
