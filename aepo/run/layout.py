"""What in the directory of a run is the run's, which goes by exact names. Everything else in there is left alone,
whatever it is.

Ours are the files and folders of `aepo.run.log`, checkpoints, what a resumed run has set aside, `.lock`, and the
temporary names under which they are written.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from aepo.run.files import regular
from aepo.run.records import RECORDS

FILES = ("config.yaml", *RECORDS, "report.html", "run.json")  # as they are removed: run.json, which explains them, last
ABANDONED = "abandoned"
UNFINISHED = f"{ABANDONED}/.unfinished"  # what a resumed run has moved so far
SUMS = "SHA256SUMS"  # of a checkpoint: says which files a run wrote there

_NUMBER = "(?:[0-9]{6}|[1-9][0-9]{6,})"  # f"{step:06d}", and no other way to write a step
_STEP, _REPLACED = f"step_{_NUMBER}", rf"\.replaced_{_NUMBER}"
FOLDERS = {  # what of each is ours
    "checkpoints": re.compile(_STEP),
    "trees": re.compile(rf"{_STEP}\.json"),
    "answers": re.compile(rf"{_STEP}\.jsonl"),
    "tensorboard": re.compile(r"events\.out\.tfevents\..+"),
}
# Of a checkpoint: .writing is not whole yet, .replaced is whole and of the step that is just written anew, .removing is
# no longer whole.
WHOLE = re.compile(f"{_STEP}|{_REPLACED}")
TEMPORARY = {  # what of each is ours while it is being written
    ".": re.compile(r"\.(?:config\.yaml|run\.json|metrics\.jsonl|evals\.jsonl)\.writing|\.engine-\w{8,}"),
    "checkpoints": re.compile(rf"\.(?:writing|removing)_{_NUMBER}|{_REPLACED}"),
    "trees": re.compile(rf"\.{_STEP}\.json\.writing"),
    "answers": re.compile(rf"\.{_STEP}\.jsonl\.writing"),
}


def step_path(folder: Path, kind: str, step: int) -> Path:
    """kind: step, or .writing, .replaced, .removing of a checkpoint."""
    return folder / f"{kind}_{step:06d}"


def step_of(path: Path) -> int:
    """Of a checkpoint, or a file of trees or answers, which is ours."""
    return int(path.name.rpartition("_")[2].partition(".")[0])


def entries(folder: Path) -> list[Path]:
    """Sorted; none of a folder that is not there, or of a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    with contextlib.suppress(FileNotFoundError):  # given up meanwhile
        return sorted(folder.iterdir())
    return []


def ours(root: Path, folder: str) -> list[Path]:
    """Of a run's folder, what has the name of something that a run writes there."""
    return [path for path in entries(root / folder) if FOLDERS[folder].fullmatch(path.name)]


def temporaries(root: Path) -> list[Path]:
    """What a run is writing, or was when it was killed."""
    return [one for folder in TEMPORARY for one in temporaries_in(root / folder, folder)]


def temporaries_in(folder: Path, kind: str) -> list[Path]:
    """kind: which of a run's folders it is."""
    return [one for one in entries(folder) if TEMPORARY[kind].fullmatch(one.name)]


def folders_set_aside(run: Path) -> list[Path]:
    """abandoned/1, 2, ..., and one that was not finished."""
    return [
        one
        for one in entries(run / ABANDONED)
        if one.is_dir() and not one.is_symlink() and (one == run / UNFINISHED or re.fullmatch("[1-9][0-9]*", one.name))
    ]


def written(run: Path) -> Iterator[Path]:
    """All that has the name of something that a run writes."""
    for root in (run, *folders_set_aside(run)):
        yield from (root / name for name in FILES if (root / name).exists())
        for folder in FOLDERS:
            yield from ours(root, folder)


def replacing(checkpoint: Path) -> Path:
    """The one that takes its place; itself, unless it is .replaced."""
    return checkpoint.with_name(checkpoint.name.replace(".replaced_", "step_"))


def listed_files(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of each file that a run wrote there, by its path in it. OSError, UnicodeDecodeError: there is no such
    list."""
    lines = regular(checkpoint / SUMS).read_text().splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def additions(checkpoint: Path) -> list[Path]:
    """What is in a checkpoint and not in its list. Of one that was being replaced: nor in the new one, as it may have
    lost its list."""
    try:
        names = listed_files(checkpoint)
    except (OSError, UnicodeDecodeError):
        names = {}
    listed = {checkpoint / name for name in (SUMS, *names)}
    listed |= {parent for path in listed for parent in path.parents}
    new = replacing(checkpoint)
    return [
        path
        for path in sorted(checkpoint.rglob("*"))
        if path not in listed and (new == checkpoint or not os.path.lexists(new / path.relative_to(checkpoint)))
    ]
