"""Every operation that changes a file below a directory, counted, so that the n-th of a kind can be made to fail.

Opening for writing, renaming, removing and making directories announce themselves to audit hooks. What does not is
replaced where Python calls it: writing to a file, os.fsync, and the two writers in Rust, safetensors and tokenizers. A
write that fails has written half of what it was given, as on a full disk.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

# Events with the positions of their paths and of the directory descriptors that these are relative to.
EVENTS = {
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
}


def watch(directory: Path, on_write: Callable[[str, Path], None]) -> None:
    """Call `on_write(operation, path)` before each operation of the main thread below `directory`; what it raises
    comes out of the operation. For the rest of this process: an audit hook cannot be taken away."""
    root = os.path.realpath(directory)
    main = threading.get_ident()
    inside = False

    def tell(operation: str, path: str) -> None:
        nonlocal inside
        if inside or threading.get_ident() != main:
            return
        inside = True
        try:
            on_write(operation, Path(path))
        finally:
            inside = False

    def below(path: Any, descriptor: Any = None) -> str | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if isinstance(descriptor, int) and descriptor >= 0 and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
        path = os.path.abspath(path)
        return path if path == root or path.startswith(root + os.sep) else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if inside:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes, os.PathLike)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                found = below(path)
                if found:
                    tell("open", found)
        elif event in EVENTS:
            for position, descriptor in EVENTS[event]:
                found = below(arguments[position], None if descriptor is None else arguments[descriptor])
                if found:
                    tell(event, found)
                    break

    class Text(io.TextIOWrapper):
        def write(self, text: str) -> int:
            path = below(self.name)
            if path:
                try:
                    tell("write", path)
                except BaseException:
                    super().write(text[: len(text) // 2])
                    self.flush()
                    raise
            return super().write(text)

    open_before = io.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        writes = set(mode) & set("wax+") and "b" not in mode
        if not writes or isinstance(file, int) or below(file) is None:
            return open_before(file, mode, buffering, *arguments, **options)
        names = ("encoding", "errors", "newline")
        given = {**dict(zip(names, arguments, strict=False)), **options}
        given.pop("closefd", None), given.pop("opener", None)
        text = Text(open_before(file, mode.replace("t", "") + "b"), line_buffering=buffering == 1, **given)
        text.mode = mode  # type: ignore[misc]
        return text

    io.open = builtins.open = opened  # type: ignore[assignment]

    fsync_before = os.fsync

    def fsync(file: Any) -> None:
        path = below(file if isinstance(file, int) else file.fileno())
        if path:
            tell("fsync", path)
        fsync_before(file)

    os.fsync = fsync

    serialize_before = safetensors.torch.serialize_file

    def serialize_file(tensors: Any, filename: Any, *arguments: Any, **options: Any) -> None:
        path = below(filename)
        try:
            if path:
                tell("safetensors", path)
        except OSError as error:
            serialize_before(tensors, filename, *arguments, **options)
            os.truncate(filename, os.path.getsize(filename) // 2)
            raise SafetensorError(f"Error while serializing: I/O error: {error}") from None
        serialize_before(tensors, filename, *arguments, **options)

    safetensors.torch.serialize_file = serialize_file

    save_before = PreTrainedTokenizerFast._save_pretrained

    def save(self: Any, save_directory: Any, *arguments: Any, **options: Any) -> Any:
        path = below(save_directory)
        done = save_before(self, save_directory, *arguments, **options)
        try:
            if path:
                tell("tokenizers", os.path.join(path, "tokenizer.json"))
        except OSError as error:
            os.truncate(os.path.join(path or "", "tokenizer.json"), 10)
            raise Exception(str(error)) from None  # the class that its Rust code raises
        return done

    PreTrainedTokenizerFast._save_pretrained = save
    sys.addaudithook(hook)
