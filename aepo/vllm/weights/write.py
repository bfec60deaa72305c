"""New weights as files, which go away when the update is over."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aepo.files.tensors import is_finite, write_tensors
from aepo.files.weight_directory import remove_abandoned, update_directory
from aepo.parallel import Weights
from aepo.vllm.weights.manifest import FileUpdateInfo

FILE_BYTES = 1 << 28  # one file holds this much, and so much is copied at most; 8 of them are read at the same time
ALIGNED = 8  # bytes, of the widest type
MIB = 1 << 20


class WeightUpdateError(ConnectionError):
    """New weights did not reach every replica; the message says which ones, and what they run now.

    failures: the errors of those that failed, by name.
    """

    def __init__(self, message: str, failures: Mapping[str, Exception]) -> None:
        super().__init__(message)
        self.failures = dict(failures)


@contextlib.contextmanager
def written(parent: Path, weights: Weights) -> Iterator[FileUpdateInfo]:
    """All of them, in a new directory in `parent`, which is gone at the end.

    OSError: they could not be written. WeightUpdateError: a tensor is not finite.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent)
    with update_directory(parent) as directory:
        yield write(directory, weights)


def write(directory: Path, weights: Weights) -> FileUpdateInfo:
    """In safetensors files of about FILE_BYTES, in the order in which they come."""
    info = FileUpdateInfo(directory=directory.name)
    for part in _parts(weights):
        _check_room(directory, part)
        path = directory / f"{len(info.files):05d}.safetensors"
        digest = write_tensors(path, part.items, finite=(), mode=0o600)
        info.files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
        info.tensors += len(part)
    return info


def _parts(weights: Weights) -> Iterator[dict[str, Tensor]]:
    """What goes into a file. Each tensor may be gone when the next one comes, so all but the last of a file are copied,
    for every file into the same memory."""
    room = torch.empty(FILE_BYTES, dtype=torch.uint8)
    part: dict[str, Tensor] = {}
    used = 0
    for (name, *_), tensor in weights:
        if not is_finite(tensor.detach()):
            # Not only this update would be lost: NaN in a block of an engine's cache outlives finite weights, because
            # zero times NaN is NaN where attention masks it.
            raise WeightUpdateError(f"weight {name!r} is not finite; every replica keeps the weights that it has", {})
        start = -(-used // ALIGNED) * ALIGNED
        used = start + tensor.nbytes
        if used < FILE_BYTES:
            part[name] = room[start:used].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        else:
            yield {**part, name: tensor}
            part, used = {}, 0
    if part:
        yield part


def _bytes(part: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in part.values())


def _check_room(directory: Path, part: Mapping[str, Tensor]) -> None:
    needed, free = _bytes(part), shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory.parent} has {free // MIB} MiB free, the next file of the weights needs {needed // MIB} MiB"
        )
