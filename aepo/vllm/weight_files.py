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
import os
import secrets
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from aepo.vllm.manifest import FileUpdateInfo, check
from aepo.vllm.reload import check_fit, load

BACKEND = "aepo_file"
READERS = 8  # threads that compute checksums, a file each: 0.8 to 2 GB/s per core
CHUNK_BYTES = 1 << 22

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
    _staged: CheckpointFiles | None = None
    _withdrawn = False
    _accepted: Shapes | None = None  # those that fitted the model, so that they are tried once

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """ValueError: other secrets or another directory than the first time, or a secret that is none."""
        found = init_info.secrets
        if not isinstance(found, list) or not all(isinstance(secret, str) and secret for secret in found):
            raise ValueError("secrets must be a list of texts that are not empty")
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
        files = CheckpointFiles(Path(trusted.directory), update_info)
        if files.shapes != self._accepted:
            check_fit(self.model, self.model_config, files.shapes, self.parallel_config.tensor_parallel_size)
            self._accepted = files.shapes
        self._staged = files

    @property
    def staged_version(self) -> str | None:
        """Of the update that was accepted and is not loaded yet."""
        return None if self._staged is None else self._staged.version

    def finish_weight_update(self) -> None:
        """RuntimeError: there is nothing to load, or the weights are partly new, and must be sent again before anything
        is generated."""
        files, self._staged = self._staged, None
        if files is None:
            if self._withdrawn:
                return
            raise RuntimeError("no update was accepted: this engine keeps its weights")
        files.check_unchanged()
        try:
            load(self.model, self.model_config, files)
        except Exception as error:
            raise RuntimeError(f"this engine has a part of the new weights only: {error}") from error

    def shutdown(self) -> None:
        self._staged = None


class CheckpointFiles:
    """The files of an update, opened once and found to be those of its manifest. Tensors are read when asked for.

    ValueError: a file is not there, is not a plain file, or has other bytes.
    """

    def __init__(self, root: Path, info: FileUpdateInfo) -> None:
        self.version = info.version
        self._directory = root / str(info.directory)
        self._handles: list[tuple[io.FileIO, os.stat_result]] = []
        with contextlib.ExitStack() as directories:
            descriptor = None
            for path in (root, str(info.directory)):
                descriptor = self._open(str(path), os.O_DIRECTORY, descriptor)
                directories.callback(os.close, descriptor)
            for described in info.files:
                self._handles.append(self._regular(str(described["name"]), descriptor))
        with ThreadPoolExecutor(READERS) as pool:
            for problem in pool.map(_problem, (handle for handle, _ in self._handles), info.files):
                if problem:
                    raise ValueError(f"{self._directory}/{problem}")
        self._files: dict[str, Any] = {}  # tensor name -> the open file
        for (handle, _), described in zip(self._handles, info.files, strict=True):
            try:
                # By its descriptor: the file that was checked, whatever has that name by now.
                file = safe_open(f"/proc/self/fd/{handle.fileno()}", framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self._directory}/{described['name']} is damaged: {error}") from None
            self._files.update(dict.fromkeys(file.keys(), file))
        if len(self._files) != info.tensors:
            raise ValueError(f"{self._directory} holds {len(self._files)} tensors, expected {info.tensors}")
        self.shapes: Shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def check_unchanged(self) -> None:
        """RuntimeError: somebody has written to a file since its checksum was computed."""
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

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, file.get_tensor(name)) for name, file in self._files.items())

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


def _problem(handle: io.FileIO, described: dict[str, int | str]) -> str | None:
    """What is wrong with a file."""
    size = os.fstat(handle.fileno()).st_size
    if size != described["bytes"]:
        return f"{described['name']} has {size} bytes, expected {described['bytes']}"
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    while count := handle.readinto(buffer):
        digest.update(buffer[:count])
    if digest.hexdigest() != described["sha256"]:
        return f"{described['name']} is damaged: its SHA-256 is not that of the update"
    return None


# By name, so that a module that is imported twice registers once.
with contextlib.suppress(ValueError):
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, FileWeightTransferEngine.__name__)
