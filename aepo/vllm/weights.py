"""New weights into running vLLM engines, as files: who drives an update of all replicas.

    trainer, once            every worker of every replica
    start_weight_update      forgets what an earlier update left, and makes a nonce
    (writes the files)
    update_weights           checks signature and files, and tries them on the shapes of its model, which stays as it is
    finish_weight_update     loads them, between two steps of the engine; tokens are stamped with the new version
    reset_prefix_cache       keys and values of the old weights go

No engine changes before all have accepted. What the workers do is in aepo/vllm/weight_files.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta, WeightSource
from vllm.engine.protocol import EngineClient

from aepo.files.tensors import is_finite
from aepo.files.weight_directory import PARTLY_LOADED, remove_abandoned, update_directory
from aepo.vllm.client import own_words
from aepo.vllm.manifest import FileUpdateInfo, process_secret, signed, signing_secret
from aepo.vllm.weight_files import BACKEND, DTYPES, FileInitInfo

__all__ = ["BACKEND", "WeightClient", "WeightSender", "WeightUpdateError", "process_secret", "signing_secret"]

SHARED_MEMORY = Path("/dev/shm")
FILE_BYTES = 1 << 30  # one file holds this much
CHUNK_BYTES = 1 << 24  # written and hashed at the same time
MIB = 1 << 20

Result = TypeVar("Result")


class WeightUpdateError(ConnectionError):
    """New weights did not reach every replica; the message says which ones, and what they run now.

    failures: the errors of those that failed, by name.
    """

    def __init__(self, message: str, failures: Mapping[str, Exception]) -> None:
        super().__init__(message)
        self.failures = dict(failures)


class WeightClient(Protocol):
    """What a replica must offer: the calls of vLLM's weight updates, its cache, a name for messages, and the secret
    that signs for it: `process_secret()` for an engine that this process has started, `signing_secret(key)` of a
    server's key."""

    name: str
    secret: str

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Before the first update: `FileInitInfo` as a dict. A server has told its engine by itself."""
        ...

    def start_weight_update(self) -> list[str]:
        """Returns what the workers' `aepo_nonce` does then, one per worker."""
        ...

    def update_weights(self, update_info: dict[str, Any]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    def reset_prefix_cache(self) -> bool:
        """False: unfinished requests hold on to it."""
        ...


async def finish_update(engine: EngineClient, version: str) -> None:
    """vLLM's `finish_weight_update`. Tokens are stamped PARTLY_LOADED until every worker has loaded all weights; also
    where it fails or is cancelled, unless it fails before any worker has begun."""
    before, loads = await engine.get_weight_version(), await engine.collective_rpc("aepo_loads")
    await engine.update_weight_version(PARTLY_LOADED)
    try:
        await engine.finish_weight_update(version)
    except Exception:
        if await engine.collective_rpc("aepo_loads") == loads:
            await engine.update_weight_version(before)
        raise


def stamped(version: int) -> str:
    """What engines call new weights. Nobody else does: another sender, or a second run, has the same step numbers."""
    return f"{version}@{secrets.token_hex(6)}"


def metadata(source: WeightSource) -> list[ParamMeta]:
    """A method in vLLM 0.32, a property in 0.33."""
    return source.metadata() if callable(source.metadata) else source.metadata


def tensors(source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    """All of them, whole: by iteration in vLLM 0.32, `iter_full` in 0.33."""
    return source.iter_full() if hasattr(source, "iter_full") else iter(source)


def write(directory: Path, source: WeightSource) -> FileUpdateInfo:
    """All tensors of the source, in safetensors files of about FILE_BYTES. One tensor is in memory at a time.

    ValueError: the source yields something else than its metadata says. WeightUpdateError: a tensor is not finite.
    """
    remaining = tensors(source)
    info = FileUpdateInfo(directory=directory.name)
    with ThreadPoolExecutor(1) as hasher:
        for part in _parts(metadata(source)):
            name = f"{len(info.files):05d}.safetensors"
            digest, size = hashlib.sha256(), 0
            handle = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                for data in itertools.chain([_header(part)], _contents(part, remaining)):
                    for start in range(0, len(data), CHUNK_BYTES):
                        chunk = data[start : start + CHUNK_BYTES]
                        hashed = hasher.submit(digest.update, chunk)
                        file.write(chunk)
                        hashed.result()
                    size += len(data)
            info.files.append({"name": name, "bytes": size, "sha256": digest.hexdigest()})
            info.tensors += len(part)
    if (more := next(remaining, None)) is not None:
        raise ValueError(f"the source yields {more[0]!r}, which its metadata does not have")
    return info


def _parts(metas: Iterable[ParamMeta]) -> Iterator[list[ParamMeta]]:
    part: list[ParamMeta] = []
    for meta in metas:
        part.append(meta)
        if sum(map(_bytes, part)) >= FILE_BYTES:
            yield part
            part = []
    if part:
        yield part


def _bytes(meta: ParamMeta) -> int:
    return torch.Size(meta.shape).numel() * meta.dtype.itemsize


def _header(part: Sequence[ParamMeta]) -> memoryview:
    """Of a safetensors file: its length in 8 bytes, then JSON, filled up to a multiple of 8 bytes."""
    entries, end = {}, 0
    for meta in part:
        if meta.dtype not in DTYPES:
            raise ValueError(f"{meta.name!r} is {meta.dtype}; expected one of {', '.join(map(str, DTYPES))}")
        start, end = end, end + _bytes(meta)
        entries[meta.name] = {"dtype": DTYPES[meta.dtype], "shape": [*meta.shape], "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _contents(part: Iterable[ParamMeta], remaining: Iterator[tuple[str, torch.Tensor]]) -> Iterator[memoryview]:
    for meta in part:
        name, tensor = next(remaining, ("nothing", torch.empty(0)))
        found, expected = (name, tensor.dtype, tuple(tensor.shape)), (meta.name, meta.dtype, tuple(meta.shape))
        if found != expected:
            raise ValueError(f"the source yields {found}, its metadata says {expected}")
        if not is_finite(tensor.detach(), tensor.dtype):
            # Not only this update would be lost: NaN in a block of an engine's cache outlives finite weights, because
            # zero times NaN is NaN where attention masks it.
            raise WeightUpdateError(f"weight {name!r} is not finite; every replica keeps the weights that it has", {})
        array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield memoryview(array)


def size(source: WeightSource) -> int:
    """Bytes of all its tensors."""
    return sum(map(_bytes, metadata(source)))


def check_room(directory: Path, source: WeightSource) -> None:
    needed, free = size(source), shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"{directory} has {free // MIB} MiB free, the weights need {needed // MIB} MiB")


def default_directory(source: WeightSource, otherwise: Path) -> Path:
    """Shared memory where it exists and has room for twice the weights, else `otherwise`."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= 2 * size(source):
        return SHARED_MEMORY
    return otherwise


class WeightSender:
    """Sends the weights of `source`, a module or vLLM's WeightSource, to all replicas; the files are written once.

    clients: one per replica, engines that were started with `weight_transfer_config={"backend": "aepo_file"}` and the
    worker extension of `aepo.vllm`. directory: on a file system that all of them see, for servers the one that they
    name; None: shared memory, or the directory for temporary files where that has no room.
    """

    def __init__(
        self,
        clients: Sequence[WeightClient],
        source: WeightSource | torch.nn.Module,
        directory: Path | None = None,
    ) -> None:
        if not clients:
            raise ValueError("clients: expected at least one replica")
        self._clients = list(clients)
        self._source = ModuleSource(source) if isinstance(source, torch.nn.Module) else source
        self.directory = (directory or default_directory(self._source, Path(tempfile.gettempdir()))).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._each(
            "init_weight_transfer_engine",
            lambda _, client: client.init_weight_transfer_engine(
                asdict(FileInitInfo([client.secret], str(self.directory)))
            ),
        )

    def send(self, version: int) -> str:
        """Returns when every replica runs the present weights and has an empty prefix cache: the text with which they
        stamp their tokens, "VERSION@RANDOM", another one for every call. Requests should have ended; one that has not
        goes on with the new weights.

        WeightUpdateError: a replica failed, or a weight is not finite. OSError: the files could not be
        written; no replica has changed.
        """
        try:
            stamp = stamped(version)
            self._send(stamp)
        except BaseException:
            # No replica waits for the end of the update, and none loads what it has accepted.
            for client in self._clients:
                _withdraw(client)
            raise
        self._each("reset_prefix_cache", lambda _, client: _reset(client), stamp)
        return stamp

    def _send(self, version: str) -> None:
        remove_abandoned(self.directory)
        check_room(self.directory, self._source)
        nonces = self._each("start_weight_update", lambda _, client: _start(client))
        with update_directory(self.directory) as directory:
            info = write(directory, self._source)
            info.version = version

            def update(index: int, client: WeightClient) -> None:
                client.update_weights(asdict(signed(info, nonces[index], client.secret)))

            self._each("update_weights", update)
            finish = "finish_weight_update"
            self._each(finish, lambda _, client: client.finish_weight_update(weight_version=version), version)

    def _each(self, what: str, call: Callable[[int, WeightClient], Result], version: object = None) -> list[Result]:
        """The results of all replicas, which work at the same time; all are heard before any failure is reported.

        version: those that do not fail have it from then on; None: they keep the one that they have.
        """

        def attempt(index: int, client: WeightClient) -> tuple[Result | None, Exception | None]:
            try:
                return call(index, client), None
            except Exception as error:
                return None, error

        if len(self._clients) == 1:  # an engine inside this process stays on its thread
            outcomes = [attempt(0, self._clients[0])]
        else:
            with ThreadPoolExecutor(len(self._clients)) as pool:
                outcomes = list(pool.map(attempt, range(len(self._clients)), self._clients))
        names = [client.name for client in self._clients]
        failures = {name: error for name, (_, error) in zip(names, outcomes, strict=True) if error is not None}
        if failures:
            others = ", ".join(name for name in names if name not in failures) or "no replica"
            now = "every replica keeps the weights that it has"
            if what == "finish_weight_update":
                now = f"{others} has version {version}: send again or restart"
            elif what == "reset_prefix_cache":
                now = f"all replicas have version {version}"
            raise WeightUpdateError(f"{what} failed on {_listed(failures)}; {now}", failures)
        return [result for result, _ in outcomes]  # type: ignore[misc]  # none failed


def _start(client: WeightClient) -> list[str]:
    try:
        return client.start_weight_update()
    except Exception:  # a trainer may have died in the middle of an update
        _withdraw(client)
        return client.start_weight_update()


def _reset(client: WeightClient) -> None:
    if not client.reset_prefix_cache():
        raise RuntimeError("unfinished requests hold keys and values of the old weights")


def _withdraw(client: WeightClient) -> None:
    with contextlib.suppress(Exception):  # it may be the one that failed, or that is gone
        client.update_weights(asdict(FileUpdateInfo(withdraw=True)))
    with contextlib.suppress(Exception):
        client.finish_weight_update()


def _listed(failures: Mapping[str, Exception]) -> str:
    return "; ".join(f"replica {name} ({type(error).__name__}: {own_words(error)})" for name, error in failures.items())
