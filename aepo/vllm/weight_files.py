"""The worker's side of a weight update: a backend of vLLM's weight-transfer protocol that reads signed files.

vLLM's own backends begin to take the model apart when an update starts: if a later call fails, the engine is left
without weights, and the next update mixes in what the failed one had buffered. Here an engine is whole between any two
calls. What is checked is checked here, in the worker, so it holds whichever way an update comes: routes of ours, those
of vLLM's development mode, or collective_rpc.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import json
import math
import os
import reprlib
import secrets
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from aepo.vllm.manifest import FileUpdateInfo, check
from aepo.vllm.reload import check_fit, clean_caches, load

BACKEND = "aepo_file"
READERS = 8  # threads that read and compute checksums, a file each: 0.8 to 2 GB/s per core
CHUNK_BYTES = 1 << 22
HEADER_BYTES = 100_000_000  # of a safetensors file; the limit of its library
DTYPES = {  # in the names of safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
TYPES = {name: dtype for dtype, name in DTYPES.items()}

Shapes = dict[str, tuple[int, ...]]  # of the tensors of a checkpoint, by their names there


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Whose updates an engine takes (none: nobody's), and the directory that has them. The first one counts: later ones
    must be the same."""

    secrets: list[str] = field(default_factory=list, repr=False)
    directory: str | None = None


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Receives files with the names and shapes of the model's checkpoint, in any floating-point dtype."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False  # vLLM refuses them by that name; no test here has a draft model

    nonce: str | None = None  # of the update that has been started; good for one
    _trusted: FileInitInfo | None = None
    _staged: Checkpoint | None = None
    _withdrawn = False
    _accepted: Shapes | None = None  # those that fitted the model, so that they are tried once

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """ValueError: other secrets or another directory than the first time, or a secret that is none."""
        found = init_info.secrets
        if not isinstance(found, list) or not all(isinstance(secret, str) and secret for secret in found):
            raise ValueError("secrets must be a list of texts that are not empty")
        if not isinstance(init_info.directory, str | None):
            raise ValueError(f"directory must be a path or None; got {reprlib.repr(init_info.directory)}")
        if self._trusted is None:
            self._trusted = init_info
        elif not hmac.compare_digest(*(json.dumps(info.secrets).encode() for info in (init_info, self._trusted))):
            raise ValueError("this engine takes weights from somebody else, and that cannot be changed")
        elif init_info.directory != self._trusted.directory:
            raise ValueError("this engine reads weights from another directory, and that cannot be changed")

    def start_weight_update(self) -> None:
        self._staged, self._withdrawn, self.nonce = None, False, secrets.token_hex(16)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """ValueError: the update is not signed for this engine, the files are not those of the update, or do not fit.
        The model is as it was in any case."""
        nonce, self.nonce, self._staged = self.nonce, None, None
        if update_info.withdraw is True:
            self._withdrawn = True
            return
        trusted = self._trusted or FileInitInfo()
        check(update_info, nonce, trusted.secrets)
        if trusted.directory is None:
            raise ValueError("this engine takes no weights: it was started without AEPO_WEIGHTS_DIR")
        checkpoint = read(Path(trusted.directory), update_info, self.model_config.dtype)
        if checkpoint.shapes != self._accepted:
            check_fit(self.model, self.model_config, checkpoint.shapes, self.parallel_config.tensor_parallel_size)
            self._accepted = checkpoint.shapes
        self._staged = checkpoint

    @property
    def staged_version(self) -> str | None:
        """Of the update that was accepted and is not loaded yet."""
        return None if self._staged is None else self._staged.version

    def finish_weight_update(self) -> None:
        """RuntimeError: there is nothing to load, or the weights are partly new, and must be sent again before anything
        is generated."""
        checkpoint, self._staged = self._staged, None
        if checkpoint is None:
            if self._withdrawn:
                return
            raise RuntimeError("no update was accepted: this engine keeps its weights")
        try:
            load(self.model, self.model_config, checkpoint.taken())
        except Exception as error:
            raise RuntimeError(f"this engine has a part of the new weights only: {error}") from error
        clean_caches(self.model)

    def shutdown(self) -> None:
        self._staged = None


@dataclass
class Checkpoint:
    """New weights in memory of this process."""

    version: str
    tensors: dict[str, torch.Tensor]

    @property
    def shapes(self) -> Shapes:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def taken(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them; none is held on to."""
        while self.tensors:
            name = next(iter(self.tensors))
            yield name, self.tensors.pop(name)


def read(root: Path, info: FileUpdateInfo, dtype: torch.dtype) -> Checkpoint:
    """The tensors of an update, for an engine that computes in `dtype`. A file is read once, into memory that nobody
    else has: what was checked is what will be loaded, whoever writes to the file or cuts it. Mapped, a file that was
    written to through another mapping was loaded unseen, and one that was cut ended the engine (SIGBUS).

    ValueError: a file is not there, is not a plain file, or has other bytes; a tensor has a type that is not in DTYPES,
    or values that are not finite in `dtype`.
    """
    path = root / str(info.directory)
    tensors: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as directories:
        directory = None
        for part in (str(root), str(info.directory)):
            directory = _open(path, part, os.O_DIRECTORY, directory)
            directories.callback(os.close, directory)
        with ThreadPoolExecutor(READERS) as pool:
            for found in pool.map(lambda described: _file_tensors(path, described, directory), info.files):
                tensors.update(found)
    if len(tensors) != info.tensors:
        raise ValueError(f"{path} holds {len(tensors)} tensors, expected {info.tensors}")
    for name, tensor in tensors.items():
        if not is_finite(tensor, dtype):
            raise ValueError(f"weight {name!r} is not finite in {dtype}, the type of this engine")
    return Checkpoint(info.version, tensors)


def is_finite(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are, also as `dtype`: smallest and largest are where all is, 16 times as fast as isfinite() of
    float32 on a CPU."""
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return bool(torch.stack(tensor.aminmax()).to(dtype).double().isfinite().all())


def _open(path: Path, name: str, flags: int, directory: int | None) -> int:
    # The directory that the server names may be a link, nothing in it may. A FIFO must not block.
    flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if directory is None else os.O_NOFOLLOW)
    try:
        return os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        raise ValueError(f"{name} is not there, of {path}: trainer and engine must see the same directory") from None
    except OSError as error:
        problem = f"{error.strerror}; links are refused"
        raise ValueError(f"{name}, of {path}, cannot be read: {problem}") from None


def _file_tensors(path: Path, described: Mapping[str, Any], directory: int | None) -> dict[str, torch.Tensor]:
    name, size = described["name"], described["bytes"]
    with io.FileIO(_open(path, name, 0, directory)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise ValueError(f"{path}/{name} is not a regular file with one name")
        if found.st_size != size:
            raise ValueError(f"{path}/{name} has {found.st_size} bytes, expected {size}")
        digest = hashlib.sha256()
        try:
            tensors = _read_tensors(file, size, digest)
        except ValueError as error:
            raise ValueError(f"{path}/{name} is damaged: {error}") from None
    if digest.hexdigest() != described["sha256"]:
        raise ValueError(f"{path}/{name} is damaged: its SHA-256 is not that of the update")
    return tensors


def _read_tensors(file: io.FileIO, size: int, digest: hashlib._Hash) -> dict[str, torch.Tensor]:
    """Of a safetensors file, which is read to its end and hashed. Its entries cover it without a gap, as the format
    wants it, so no more is allocated than it has."""

    def fill(memory: memoryview) -> memoryview:
        rest = memory
        while rest:
            count = file.readinto(rest[:CHUNK_BYTES])
            if not count:
                raise ValueError("it ends early")
            digest.update(rest[:count])
            rest = rest[count:]
        return memory

    length = int.from_bytes(fill(memoryview(bytearray(min(8, size)))), "little")
    if not 8 + length <= min(size, HEADER_BYTES):
        raise ValueError(f"it has a header of {length} bytes")
    tensors = {}
    for name, dtype, shape in _entries(bytes(fill(memoryview(bytearray(length)))), size - 8 - length):
        tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
        array: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        fill(memoryview(array))
    return tensors


def _entries(header: bytes, size: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, type and shape of the tensors, in the order of their bytes, of which there are `size`."""
    entries, end = [], 0
    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        for name, entry in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in TYPES:
                raise ValueError(f"weight {name!r} is {entry['dtype']}; expected one of {', '.join(TYPES)}")
            dtype, shape, (start, stop) = TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(length) is int and length >= 0 for length in shape):
                raise ValueError(f"weight {name!r} has the shape {[*shape]}")
            if (start, stop) != (end, end + math.prod(shape) * dtype.itemsize):
                raise ValueError(f"weight {name!r} has other bytes than its shape says")
            entries.append((name, dtype, shape))
            end = stop
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError):
        raise ValueError("its header is not that of safetensors") from None
    if end != size:
        raise ValueError(f"it has {size} bytes of tensors, its header describes {end}")
    return entries


# By name, so that a module that is imported twice registers once.
with contextlib.suppress(ValueError):
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, FileWeightTransferEngine.__name__)
