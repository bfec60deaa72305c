"""Rows of data files: JSON lines, Parquet, and what `datasets` saves with save_to_disk."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aepo.files.user_paths import user_path
from aepo.install import pip_install

Split = Literal["train", "heldout"]
SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "heldout": ("test", "validation")}
"""Of a directory with several: the first of these names that is there."""
KINDS = "a .jsonl or .parquet file, a pattern of such files, or a directory saved by `datasets`"


@dataclass(frozen=True, slots=True)
class Source:
    """One file, or the files of one saved data set."""

    name: str  # as people see it: the last parts of the path that tell it from the others
    files: tuple[Path, ...]

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Number, from 1 (of JSON lines the line), and row; in place of one that cannot be read, a `BadRow`."""
        before = number = 0
        for file in self.files:
            for number, row in _READERS[file.suffix](file):
                yield before + number, row
            before += number

    def sha256(self) -> str:
        """Of what the files hold."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class BadRow:
    problem: str


def find_sources(given: Any, split: Split) -> list[Source]:
    """The files that a setting names. ValueError: there are none, or they are of another kind."""
    names = _names(given)
    setting = f"task.{split}"
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, (str, Path)) for name in names):
        raise ValueError(f"{setting} = {given!r}: expected {KINDS}, or a list of these")
    found = [file for name in names for file in _files(str(name), setting, split)]
    if twice := next((paths for index, paths in enumerate(found) if paths in found[:index]), None):
        raise ValueError(f"{setting}: expected every file once, got {twice[0]} twice")
    return [Source(name, files) for name, files in zip(_short_names(found), found, strict=True)]


def saved_splits(given: Any, split: Split) -> list[Path]:
    """That split of each directory with several that is given and has it."""
    found = (_saved_split(user_path(f"task.{split}", name), split) for name in _names(given))
    return [path for path in found if path is not None]


def _names(given: Any) -> Any:
    return [given] if isinstance(given, (str, Path)) else given


def _saved_split(path: Path, split: Split) -> Path | None:
    if not (path / "dataset_dict.json").is_file():
        return None
    return next((path / name for name in SPLITS[split] if (path / name / "state.json").is_file()), None)


def _files(name: str, setting: str, split: Split) -> list[tuple[Path, ...]]:
    path = user_path(setting, name)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            inner = _saved_split(path, split)
            if inner is None:
                raise ValueError(f"{setting} = {name!r}: expected a split {' or '.join(SPLITS[split])} in it")
            path = inner
        return [_saved_files(path, f"{setting} = {name!r}")]
    paths = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not paths:
        raise ValueError(f"{setting} = {name!r}: there is no such file, in {Path.cwd()}")
    if wrong := next((path for path in paths if path.suffix not in (".jsonl", ".parquet")), None):
        raise ValueError(f"{setting} = {name!r}: expected {KINDS}, got {wrong.name}")
    return [(path,) for path in paths]


def _saved_files(path: Path, asked: str) -> tuple[Path, ...]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = tuple(path / entry["filename"] for entry in state["_data_files"])
    except FileNotFoundError:
        raise ValueError(f"{asked}: expected {KINDS}; this directory has no state.json") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{asked}: its state.json is not one that `datasets` wrote") from None
    if missing := next((file for file in files if not file.is_file()), None):
        raise ValueError(f"{asked}: {missing.name} is missing")
    return files


def _short_names(found: Sequence[tuple[Path, ...]]) -> list[str]:
    """The file's name (of a saved data set, the directory's), with as many parents as tell all apart."""
    paths = [files[0] if files[0].suffix != ".arrow" else files[0].parent for files in found]
    deepest = max(len(path.parts) for path in paths)
    for parts in range(1, deepest + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                yield number, _json(text)


def _json(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"expected text in UTF-8, got the byte 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return BadRow(f"expected JSON on one line, got {error.msg} at character {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"expected JSON on one line, got {error}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    return _batches(path, lambda: _pyarrow().parquet.ParquetFile(path).iter_batches(1000))


def _arrow(path: Path) -> Iterator[tuple[int, Any]]:
    return _batches(path, lambda: _pyarrow().ipc.open_stream(_pyarrow().memory_map(str(path))))


def _batches(path: Path, open_batches: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
    errors = (_pyarrow().ArrowException, OSError, ValueError)
    try:
        rows = (row for batch in open_batches() for row in _batch_rows(batch))
        yield from enumerate(rows, start=1)
    except errors as error:
        problem = str(error).partition("\n")[0]
        raise ValueError(f"{path}: cannot be read as {path.suffix.removeprefix('.')}: {problem}") from None


def _batch_rows(batch: Any) -> list[Any]:
    """ValueError: two columns have one name, of which a row would keep the last."""
    names = batch.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"expected every column once, got {twice!r} twice")
    rows: list[Any] = batch.to_pylist()
    return rows


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"task.train, task.heldout: Parquet and saved data sets need {error.name}: {pip_install('data')}"
        ) from None
    return pyarrow


_READERS = {".jsonl": _json_lines, ".parquet": _parquet, ".arrow": _arrow}
