"""New weights into running vLLM engines, as files: who drives an update of all replicas.

    trainer, once            every worker of every replica
    (writes the files)
    start_weight_update      forgets what an earlier update left, and makes a nonce
    update_weights           checks signature and files, and tries them on the shapes of its model, which stays as it is
    finish_weight_update     loads them, between two steps of the engine; tokens are stamped with the new version
    reset_prefix_cache       keys and values of the old weights go

No engine changes before all have accepted. What the workers do is in worker.py.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta, WeightSource
from vllm.engine.protocol import EngineClient

from aepo.files.weight_directory import PARTLY_LOADED, default_directory
from aepo.vllm.client import own_words
from aepo.vllm.weights.manifest import FileUpdateInfo, signed
from aepo.vllm.weights.worker import FileInitInfo
from aepo.vllm.weights.write import WeightUpdateError, written

Result = TypeVar("Result")


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


class FileSender:
    """Has all replicas take weights that are `written`.

    clients: one per replica, engines that were started with `weight_transfer_config={"backend": "aepo_file"}` and the
    worker extension of `aepo.vllm`. directory: where they are written, on a file system that all of them see.
    """

    def __init__(self, clients: Sequence[WeightClient], directory: Path) -> None:
        if not clients:
            raise ValueError("clients: expected at least one replica")
        self._clients = list(clients)
        self._each(
            "init_weight_transfer_engine",
            lambda _, client: client.init_weight_transfer_engine(
                asdict(FileInitInfo([client.secret], str(directory.absolute())))
            ),
        )

    def send(self, version: int, files: FileUpdateInfo) -> str:
        """Returns when every replica runs these weights and has an empty prefix cache: the text with which they stamp
        their tokens, "VERSION@RANDOM", another one for every call. Requests should have ended; one that has not
        goes on with the new weights.

        WeightUpdateError: a replica failed.
        """
        try:
            stamp = stamped(version)
            self._load(replace(files, version=stamp))
        except BaseException:
            # No replica waits for the end of the update, and none loads what it has accepted.
            for client in self._clients:
                _withdraw(client)
            raise
        self._each("reset_prefix_cache", lambda _, client: _reset(client), stamp)
        return stamp

    def _load(self, info: FileUpdateInfo) -> None:
        nonces = self._each("start_weight_update", lambda _, client: _start(client))

        def update(index: int, client: WeightClient) -> None:
            client.update_weights(asdict(signed(info, nonces[index], client.secret)))

        self._each("update_weights", update)
        finish, version = "finish_weight_update", info.version
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


class WeightSender:
    """Sends the weights of `source`, a module or vLLM's WeightSource, to all replicas; the files are written once.

    clients: as of `FileSender`. directory: on a file system that all of them see, for servers the one that they name;
    None: shared memory, or the directory for temporary files where that has no room for the weights twice.
    """

    def __init__(
        self,
        clients: Sequence[WeightClient],
        source: WeightSource | torch.nn.Module,
        directory: Path | None = None,
    ) -> None:
        self._source = ModuleSource(source) if isinstance(source, torch.nn.Module) else source
        nbytes = sum(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in metadata(self._source))
        self.directory = (directory or default_directory(nbytes)).absolute()
        self._sender = FileSender(clients, self.directory)

    def send(self, version: int) -> str:
        """`FileSender.send` of the present weights. WeightUpdateError: a replica failed, or a weight is not finite.
        OSError: the files could not be written; no replica has changed."""
        with written(self.directory, (((name,), tensor) for name, tensor in tensors(self._source))) as files:
            return self._sender.send(version, files)


def metadata(source: WeightSource) -> list[ParamMeta]:
    """A method in vLLM 0.32, a property in 0.33."""
    return source.metadata() if callable(source.metadata) else source.metadata


def tensors(source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    """All of them, whole: by iteration in vLLM 0.32, `iter_full` in 0.33."""
    return source.iter_full() if hasattr(source, "iter_full") else iter(source)
