"""The text files of a run, read and written whole: run.json, and records, one JSON object per line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# Of run.json. 1 had no facts of an agent but the name and size of its task; 2 of tools only the names, and no code.
FORMAT = 3
REPLACED = "being replaced"  # the status of a run that --overwrite has begun to remove


def read_facts(directory: Path) -> dict[str, Any]:
    """run.json of a run. ValueError: it is not there, not readable, or of a newer version."""
    path = directory / "run.json"
    try:
        facts = json.loads(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory}: expected a run, whose run.json can be read: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: expected an object, got {type(facts).__name__}")
    version = facts.get("version")
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(f"{path}: expected version {FORMAT} or below, got {version}: a newer aepo wrote it")
    return facts


def read_run(directory: Path) -> dict[str, Any]:
    """As `read_facts`. ValueError: also if another program's run.json is there."""
    facts = read_facts(directory)
    if not (
        isinstance(facts.get("status"), str) and isinstance(facts.get("resumed"), list) and "wall_seconds" in facts
    ):
        raise ValueError(f"{directory / 'run.json'}: expected that of a run (status, resumed, wall_seconds)")
    return facts


def regular(path: Path) -> Path:
    """OSError: it is not there, or it is a pipe, from which reading never ends, or a device."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path}: expected a file, got a pipe, a socket or a device")
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    """Of a .jsonl file; none if it is not there.

    Every record was written with the newline behind it: what stands behind the last newline was cut off while being
    written, and is left out. ValueError, with file and line: anything else that is no record.
    """
    return [json.loads(line) for line in whole_lines(path)[0]]


def whole_lines(path: Path) -> tuple[list[bytes], bytes]:
    """The records of a .jsonl file as they are written, with their newlines, and what stands behind the last one.
    ValueError: as `read_records`."""
    try:
        content = regular(path).read_bytes()
    except FileNotFoundError:
        return [], b""
    *lines, tail = content.split(b"\n")  # not splitlines: U+2028 may stand in a JSON string
    for number, line in enumerate(lines, start=1):
        try:
            if not isinstance(json.loads(line), dict):
                raise ValueError("no object")
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a record (one JSON object per line)") from None
    return [line + b"\n" for line in lines], tail


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write at once: a reader, or a crash, finds the old content or the new. After an error, the old, and no rest.

    What is behind a link is written, not the link; and what is no file, as /dev/stdout, is written to, not replaced.
    """
    if path.exists() and not path.is_file():
        with _named(path), path.open("wb") as file:
            yield file
        return
    temporary = _temporary(path)
    try:
        with _named(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(os.path.realpath(path))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of a write, as on a full disk, does not say of which file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _temporary(path: Path) -> Path:
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real.with_name(f".{real.name}.writing")


def refuse_unwritable(name: str, path: Path) -> None:
    """ValueError, before the work and not after it: `whole_file` could not write there. name: of the argument."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists() or path.is_file():
            temporary = _temporary(path)
            temporary.touch()
            temporary.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name} {path}: expected a file that can be written: {reason}") from None


def write_file(path: Path, content: str | bytes) -> None:
    """As `whole_file`."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """To the disk itself; of a directory, its entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # file systems without it for directories
            raise
    finally:
        os.close(descriptor)


def append_lines(path: Path, lines: str, *, flush: bool = False) -> None:
    """All of them, or, after an error, none. flush: to the disk itself, also those that were there."""
    if not lines and not (flush and path.exists()):
        return
    with _named(path), path.open("ab", buffering=0) as file:  # a buffer would be written after all when it is closed
        size = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(lines.encode())
            while rest:
                rest = rest[file.write(rest) :]
            if flush:
                os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise
