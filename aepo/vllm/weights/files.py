"""The files of a weight update, checked before an engine believes them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aepo.files.tensors import DTYPES, is_finite
from aepo.vllm.weights.manifest import FileUpdateInfo, shown

READERS = 8  # threads that read and compute checksums, a file each: 0.8 to 2 GB/s per core
CHUNK_BYTES = 1 << 22
HEADER_BYTES = 100_000_000  # of a safetensors file; the limit of its library
# Far above what models have. Without them a header of 1.7 MB, 80,000 dimensions, took 26 s to multiply, and torch
# overflows where a tensor is empty, [0, 2**62, 2**62].
DIMENSIONS, ELEMENTS, NAME_CHARACTERS = 8, 1 << 48, 512
TYPES = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}

Shapes = dict[str, tuple[int, ...]]  # of the tensors of a checkpoint, by their names there


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in an open file, and what its bytes summed up to when they were checked."""

    file: io.FileIO
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    sum: int

    def read(self) -> torch.Tensor:
        """ValueError: its bytes are not those that were checked."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        _fill(self.file, self.start, tensor)
        if _sum(tensor) != self.sum:
            raise ValueError("a file was changed after its check")
        return tensor


class CheckpointFiles:
    """The files of an update for an engine that computes in `dtype`, opened once and found to be those of its manifest.

    Tensors are read when they are asked for, into memory of their own: mapped, a file that was cut ended the engine
    (SIGBUS). All of them in memory between check and load would be a copy per worker, 1.1 TB for 70B in bfloat16 on 8.

    ValueError: a file is not there, is not a plain file, or has other bytes; a tensor has a type that is not in TYPES,
    or values that are not finite in `dtype`.
    """

    def __init__(self, root: Path, info: FileUpdateInfo, dtype: torch.dtype) -> None:
        self.version = info.version
        self._directory = root / str(info.directory)
        self._handles: list[tuple[io.FileIO, os.stat_result]] = []
        with contextlib.ExitStack() as directories:
            descriptor = None
            for part in (str(root), str(info.directory)):
                descriptor = self._open(part, os.O_DIRECTORY, descriptor)
                directories.callback(os.close, descriptor)
            for described in info.files:
                self._handles.append(self._regular(str(described["name"]), descriptor))
        self._tensors: dict[str, StoredTensor] = {}
        with ThreadPoolExecutor(READERS) as pool:
            for found in pool.map(lambda one, it: self._checked(one[0], it, dtype), self._handles, info.files):
                self._tensors.update(found)
        if len(self._tensors) != info.tensors:
            raise ValueError(f"{self._directory} holds {len(self._tensors)} tensors, expected {info.tensors}")

    @property
    def shapes(self) -> Shapes:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """ValueError: the bytes of a tensor are not those that were checked."""
        return ((name, tensor.read()) for name, tensor in self._tensors.items())

    def check_unchanged(self) -> None:
        """RuntimeError: a file has been written to since it was checked, so far as its times tell. (On tmpfs they do
        not tell what is written through a map.)"""
        for handle, before in self._handles:
            now = os.fstat(handle.fileno())
            if (now.st_size, now.st_mtime_ns, now.st_ctime_ns) != (
                before.st_size,
                before.st_mtime_ns,
                before.st_ctime_ns,
            ):
                raise RuntimeError(
                    f"a file of {self._directory} was changed after its check: this engine keeps its weights"
                )

    def _open(self, name: str, flags: int, directory: int | None) -> int:
        # The directory that the server names may be a link, nothing in it may. A FIFO must not block.
        flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if directory is None else os.O_NOFOLLOW)
        try:
            return os.open(name, flags, dir_fd=directory)
        except FileNotFoundError:
            raise ValueError(
                f"{name} is not there, of {self._directory}: trainer and engine must see the same directory"
            ) from None
        except OSError as error:
            problem = f"{error.strerror}; links are refused"
            raise ValueError(f"{name}, of {self._directory}, cannot be read: {problem}") from None

    def _regular(self, name: str, directory: int | None) -> tuple[io.FileIO, os.stat_result]:
        handle = io.FileIO(self._open(name, 0, directory))
        found = os.fstat(handle.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            handle.close()
            raise ValueError(f"{self._directory}/{name} is not a regular file with one name")
        return handle, found

    def _checked(self, file: io.FileIO, described: Mapping[str, Any], dtype: torch.dtype) -> dict[str, StoredTensor]:
        path, size = self._directory / described["name"], os.fstat(file.fileno()).st_size
        if size != described["bytes"]:
            raise ValueError(f"{path} has {size} bytes, expected {described['bytes']}")
        digest = hashlib.sha256()
        try:
            tensors, unfit = _checked_tensors(file, size, dtype, digest)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if digest.hexdigest() != described["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of the update")
        if unfit is not None:
            raise ValueError(f"weight {unfit!r} is not finite in {dtype}, the type of this engine")
        return tensors


def _checked_tensors(
    file: io.FileIO, size: int, dtype: torch.dtype, digest: hashlib._Hash
) -> tuple[dict[str, StoredTensor], str | None]:
    """Of a safetensors file, which is read to its end, tensor by tensor, and hashed; and the name of one that is not
    finite in `dtype`. Its entries cover it without a gap, as the format wants it, so no more is allocated than it has.

    ValueError: it is no such file.
    """
    prefix = torch.empty(min(8, size), dtype=torch.uint8)
    _fill(file, 0, prefix, digest)
    length = int.from_bytes(prefix.numpy().tobytes(), "little")
    if not 8 + length <= min(size, HEADER_BYTES):
        raise ValueError(f"it has a header of {length} bytes")
    header = torch.empty(length, dtype=torch.uint8)
    _fill(file, 8, header, digest)
    tensors, unfit, start = {}, None, 8 + length
    for name, kind, shape in _entries(header.numpy().tobytes(), size - start):
        tensor = torch.empty(shape, dtype=kind, device="cpu")
        _fill(file, start, tensor, digest)
        if not is_finite(tensor, dtype):
            unfit = name
        tensors[name] = StoredTensor(file, start, kind, shape, _sum(tensor))
        start += tensor.nbytes
    return tensors, unfit


def _fill(file: io.FileIO, start: int, tensor: torch.Tensor, digest: hashlib._Hash | None = None) -> None:
    """ValueError: the file ends before the tensor does."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    rest = memoryview(array)
    while rest:
        part = rest[:CHUNK_BYTES]
        count = os.preadv(file.fileno(), [part], start)
        if not count:
            raise ValueError("it ends early")
        if digest is not None:
            digest.update(part[:count])
        rest, start = rest[count:], start + count


def _sum(tensor: torch.Tensor) -> int:
    """Of its bytes, in words of 64 bits where there are eight of them: finds what somebody has written in between, 10
    times as fast as a SHA-256. Not who does it on purpose, with the rights of the trainer."""
    data = tensor.reshape(-1).view(torch.uint8)
    words = data.numel() // 8 * 8
    return int(data[:words].view(torch.int64).sum()) + int(data[words:].sum())


class Unfit(ValueError):
    """Of a tensor that a header describes."""


def _described(name: str, dtype: Any, shape: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    if len(name) > NAME_CHARACTERS or not name.isprintable():
        raise Unfit(f"weight {shown(name)}: expected a name of at most {NAME_CHARACTERS} printable characters")
    if dtype not in TYPES:
        raise Unfit(f"weight {name!r} is {shown(dtype)}; expected one of {', '.join(TYPES)}")
    lengths = isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)
    if not lengths or len(shape) > DIMENSIONS or math.prod(max(length, 1) for length in shape) >= ELEMENTS:
        raise Unfit(
            f"weight {name!r} has the shape {shown(shape)}; expected at most {DIMENSIONS} lengths, of less than "
            f"{ELEMENTS} elements"
        )
    return TYPES[dtype], tuple(shape)


def _entries(header: bytes, size: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, type and shape of the tensors, in the order of their bytes, of which there are `size`."""
    entries, end = [], 0
    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        ordered = sorted(described.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in ordered:
            dtype, shape = _described(name, entry["dtype"], entry["shape"])
            start, end = end, end + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [start, end]:
                raise Unfit(f"weight {name!r} has other bytes than its shape says")
            entries.append((name, dtype, shape))
    except Unfit:
        raise
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError):
        raise ValueError("its header is not that of safetensors") from None
    if end != size:
        raise ValueError(f"it has {size} bytes of tensors, its header describes {end}")
    return entries
