"""New weights into running vLLM engines, as files: a backend of vLLM's weight-transfer protocol, and who drives it.

    trainer, once            every worker of every replica
    start_weight_update      forgets what an earlier update left
    (writes the files)
    update_weights           opens the files and tries them on the shapes of its model, which stays as it is
    finish_weight_update     loads them, between two steps of the engine; tokens are stamped with the new version
    reset_prefix_cache       keys and values of the old weights go

vLLM's own backends begin to take the model apart in the first of these calls: if the second fails, the engine is left
without weights, and the next update mixes in what the failed one had buffered. Here no engine changes before all have
accepted, and an engine is whole between any two calls. Importing this module registers the backend `aepo_file`.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from aepo.vllm.reload import check_fit, load

BACKEND = "aepo_file"
SHARED_MEMORY = Path("/dev/shm")
PREFIX = f"aepo-weights-{uuid.uuid4().hex[:12]}-"  # of directories with new weights that this process makes
FILE_BYTES = 1 << 30  # one file holds this much: the writer needs that much memory, not a second copy of the model
MIB = 1 << 20

Shapes = dict[str, tuple[int, ...]]  # of the tensors of a checkpoint, by their names there


class WeightUpdateError(RuntimeError):
    """New weights did not reach every replica; the message says which ones, and what they run now.

    failures: the errors of those that failed, by name.
    """

    def __init__(self, message: str, failures: Mapping[str, Exception]) -> None:
        super().__init__(message)
        self.failures = dict(failures)


class WeightClient(VLLMWeightSyncClient, Protocol):
    """What a replica must offer: vLLM's four methods of a weight update, its cache and a name for messages."""

    name: str

    def reset_prefix_cache(self) -> bool:
        """False: unfinished requests hold on to it."""
        ...


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first update."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where the new weights are: `directory`/00000.safetensors and so on; None withdraws an update."""

    directory: str | None
    token: str = ""  # in the metadata of each file, so that the files of another update are not taken for these
    files: int = 0
    tensors: int = 0


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Receives files with the names and shapes of the model's checkpoint, in any floating-point dtype."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False  # vLLM refuses them by that name; no test here has a draft model

    _staged: CheckpointFiles | None = None
    _accepted: Shapes | None = None  # those that fitted the model, so that they are tried once

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Files need no connection."""

    def start_weight_update(self) -> None:
        self._staged = None

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """ValueError: the files are not those of this update, or do not fit. The model is as it was in any case."""
        self._staged = None
        if update_info.directory is None:
            return
        files = CheckpointFiles(update_info)
        if files.shapes != self._accepted:
            check_fit(self.model, self.model_config, files.shapes, self.parallel_config.tensor_parallel_size)
            self._accepted = files.shapes
        self._staged = files

    def finish_weight_update(self) -> None:
        """RuntimeError: the weights are partly new, and must be sent again before anything is generated."""
        files, self._staged = self._staged, None
        if files is None:
            return
        try:
            load(self.model, self.model_config, files)
        except Exception as error:
            raise RuntimeError(f"this engine has a part of the new weights only: {error}") from error

    def shutdown(self) -> None:
        self._staged = None


class CheckpointFiles:
    """The files of an update, opened and found to be whole. Tensors are read when asked for.

    ValueError: a file is not there, damaged, or of another update.
    """

    def __init__(self, info: FileUpdateInfo) -> None:
        self._files: dict[str, Any] = {}  # tensor name -> the open file
        for number in range(info.files):
            path = file_path(Path(str(info.directory)), number)
            try:
                file = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise ValueError(f"{path} is not there: trainer and engine must see the same directory") from None
            except SafetensorError as error:  # its header does not match its size, or is none
                raise ValueError(f"{path} is damaged: {error}") from None
            if (file.metadata() or {}).get("token") != info.token:
                raise ValueError(f"{path} belongs to another update")
            self._files.update(dict.fromkeys(file.keys(), file))
        if len(self._files) != info.tensors:
            raise ValueError(f"{info.directory} holds {len(self._files)} tensors, expected {info.tensors}")
        self.shapes: Shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, file.get_tensor(name)) for name, file in self._files.items())


@dataclass
class FileTrainerInitInfo(TrainerInitInfo):
    """directory: where the files of an update are, as long as it lasts."""

    backend: ClassVar[str] = BACKEND
    directory: Path


class FileTrainerWeightTransferEngine(TrainerWeightTransferEngine[FileTrainerInitInfo]):
    """Writes what `source` yields and has the engines load it. Ranks other than 0 only take part in gathering."""

    init_info_cls = FileTrainerInitInfo

    def __init__(self, *, client: VLLMWeightSyncClient, source: WeightSource, directory: Path, is_sender: bool) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self.weights, self.directory = source, directory

    @classmethod
    def trainer_init(
        cls,
        init_info: FileTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> FileTrainerWeightTransferEngine:
        if source is None:
            raise ValueError(f"backend {BACKEND} needs a source of weights")
        if init_info.is_sender:
            client.init_weight_transfer_engine(asdict(FileInitInfo()))
        return cls(client=client, source=source, directory=init_info.directory, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        """OSError: no room for the files, or the directory cannot be written."""
        if not self.is_sender:
            for _ in self.weights:
                pass
            return
        check_room(self.directory, self.weights)
        self.client.start_weight_update()
        # A new directory for every update, told to the engines when it is complete and gone when they have read it.
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=self.directory) as directory:
            info = write(Path(directory), self.weights)
            self.client.update_weights(asdict(info))
            self.client.finish_weight_update()


def file_path(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.safetensors"


def write(directory: Path, source: WeightSource) -> FileUpdateInfo:
    """All tensors of the source, in files of about FILE_BYTES."""
    info = FileUpdateInfo(str(directory), token=uuid.uuid4().hex)
    part: dict[str, torch.Tensor] = {}

    def save() -> None:
        safetensors.torch.save_file(part, file_path(directory, info.files), metadata={"token": info.token})
        info.files, info.tensors = info.files + 1, info.tensors + len(part)
        part.clear()

    for name, tensor in source:
        part[name] = tensor.detach().cpu().contiguous()
        if sum(one.nbytes for one in part.values()) >= FILE_BYTES:
            save()
    save()
    return info


def size(source: WeightSource) -> int:
    """Bytes of all its tensors."""
    return sum(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in source.metadata())


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
    worker extension of `aepo.vllm`. directory: on a file system that all of them see; None: shared memory, or the
    directory for temporary files where that has no room.
    """

    def __init__(
        self,
        clients: Sequence[WeightClient],
        source: WeightSource | torch.nn.Module,
        directory: Path | None = None,
    ) -> None:
        if not clients:
            raise ValueError("clients: expected at least one replica")
        source = ModuleSource(source) if isinstance(source, torch.nn.Module) else source
        directory = directory or default_directory(source, Path(tempfile.gettempdir()))
        directory.mkdir(parents=True, exist_ok=True)
        self._replicas = _Replicas(clients)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            FileTrainerInitInfo(directory=directory, rank=0), client=self._replicas, source=source
        )

    def send(self, version: int) -> None:
        """Returns when every replica runs the present weights, stamps its tokens with `version` and has an empty prefix
        cache. Requests should have ended; one that has not goes on with the new weights.

        WeightUpdateError: a replica failed. OSError: the files could not be written; no replica has changed.
        """
        self._replicas.version = str(version)
        try:
            self._engine.send_weights()
        except BaseException:
            self._replicas.withdraw()
            raise
        self._replicas.reset_prefix_cache()


class _Replicas:
    """Several engines as one VLLMWeightSyncClient. It stamps updates with `version`: vLLM's trainer engines do not."""

    version: str | None = None

    def __init__(self, clients: Sequence[WeightClient]) -> None:
        self._clients = clients

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._each("init_weight_transfer_engine", lambda client: client.init_weight_transfer_engine(init_info))

    def start_weight_update(self) -> None:
        def start(client: WeightClient) -> None:
            try:
                client.start_weight_update()
            except Exception:  # a trainer may have died in the middle of an update
                _withdraw(client)
                client.start_weight_update()

        self._each("start_weight_update", start)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._each("update_weights", lambda client: client.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = weight_version or self.version
        self._each("finish_weight_update", lambda client: client.finish_weight_update(weight_version=version))

    def reset_prefix_cache(self) -> None:
        def reset(client: WeightClient) -> None:
            if not client.reset_prefix_cache():
                raise RuntimeError("unfinished requests hold keys and values of the old weights")

        self._each("reset_prefix_cache", reset)

    def withdraw(self) -> None:
        """After a failure: no replica waits for the end of the update, and none loads what it has accepted."""
        for client in self._clients:
            _withdraw(client)

    def _each(self, what: str, call: Callable[[WeightClient], None]) -> None:
        """All replicas at the same time; all are heard before any failure is reported."""
        if len(self._clients) == 1:  # an engine inside this process stays on its thread
            results = [_failure(call, self._clients[0])]
        else:
            with ThreadPoolExecutor(len(self._clients)) as pool:
                results = list(pool.map(lambda client: _failure(call, client), self._clients))
        outcomes = zip((client.name for client in self._clients), results, strict=True)
        failures = {name: error for name, error in outcomes if error is not None}
        if failures:
            message = f"{what} failed on {_listed(failures)}; {self._now_running(what, failures)}"
            raise WeightUpdateError(message, failures)

    def _now_running(self, what: str, failures: Mapping[str, Exception]) -> str:
        others = [client.name for client in self._clients if client.name not in failures]
        if what == "finish_weight_update":
            return f"{', '.join(others) or 'no replica'} has version {self.version}: send again or restart"
        if what == "reset_prefix_cache":
            return f"all replicas have version {self.version}"
        return "every replica keeps the weights that it has"


def _withdraw(client: WeightClient) -> None:
    with contextlib.suppress(Exception):  # it may be the one that failed, or that is gone
        client.update_weights(asdict(FileUpdateInfo(None)))
    with contextlib.suppress(Exception):
        client.finish_weight_update()


def _failure(call: Callable[[WeightClient], None], client: WeightClient) -> Exception | None:
    try:
        call(client)
    except Exception as error:
        return error
    return None


def _listed(failures: Mapping[str, Exception]) -> str:
    return "; ".join(f"replica {name} ({type(error).__name__}: {error})" for name, error in failures.items())


# By name, so that a module that is imported twice registers once.
with contextlib.suppress(ValueError):
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, FileWeightTransferEngine.__name__)
with contextlib.suppress(ValueError):
    WeightTransferTrainerFactory.register_engine(BACKEND, __name__, FileTrainerWeightTransferEngine.__name__)
