"""Asynchronous generation by vLLM: one engine on this machine, or several `vllm serve` on others.

Every request is a segment by itself, given as token ids: an engine finds the prefix in its cache, and no path waits for
another one's tool. Exact entropies come from the processor that runs inside the engines (docs/vllm.md).

The replicas live on an event loop of their own, in a thread, because an `AsyncLLM` is bound to the loop that it was
started on, and a trainer runs one loop per rollout.
"""

from __future__ import annotations

import asyncio
import glob
import itertools
import logging
import math
import os
import reprlib
import tempfile
import threading
import uuid
import weakref
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from aepo.config import VLLMConfig
from aepo.files.weight_directory import PARTLY_LOADED, PREFIX
from aepo.interrupt import heard_by_main_thread
from aepo.rollout.engine import EngineCounters, Generation, GenerationRequest, check_request
from aepo.rollout.engines.vllm.orphans import OrphanGuard, temporary_directory
from aepo.types import TokenIds

if TYPE_CHECKING:
    import torch

    from aepo.vllm.weights import WeightClient, WeightSender

logger = logging.getLogger(__name__)
LOGPROBS_MODE = "processed_logprobs"  # of vLLM: at the request's temperature
# Of vLLM's processes, where the user has not said otherwise.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",  # 100 lines at a start, between those of the trainer
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is the command's, and may be JSON
}
END_SECONDS = 30.0  # for engines to shut down, and for coroutines to end after they were cancelled
SOCKET_BYTES = 107  # of the path of a socket, which vLLM names with 36 of them
ABORTS = 3  # of one request, by whoever else steers the engine, before the rollout is given up

FinishReason = Literal["stop", "eos", "length", "abort"]
Result = TypeVar("Result")


class ReplicaError(ConnectionError):
    """A replica refuses, answers what cannot be right, or has weights that are not ours."""


class ReplicaGoneError(ReplicaError):
    """A replica has died or cannot be reached. Others may go on with its requests."""


def partly_loaded(name: str) -> ReplicaError:
    """Of a replica that calls its weights so."""
    return ReplicaError(f"{name}: an update of its weights did not finish, a part may be old: send again or restart it")


@dataclass(frozen=True, slots=True)
class Completion:
    """What a replica wrote; its entropies are fetched by key."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]  # under the sampling distribution
    finish_reason: FinishReason
    prefilled: int  # tokens of the prefix that no cache had
    version: str | None  # of the weights, where the replica stamps it on the tokens


@dataclass(frozen=True, slots=True)
class Recorded:
    """Entropies by key, and the version of the weights when they were read, where the replica tells it."""

    entropies: Mapping[str, Sequence[float]]
    version: str | None


class Replica(Protocol):
    """One vLLM engine. Each method raises `ReplicaGoneError` if it is not there any more."""

    name: str
    max_positions: int

    async def complete(self, request: GenerationRequest, key: str) -> Completion:
        """Generate one segment, its entropies recorded under `key`. Cancelling aborts it in the engine."""
        ...

    async def entropies(self, lengths: Mapping[str, int]) -> Recorded:
        """Hand out and drop what was recorded under these keys: so many tokens each."""
        ...

    async def forget(self, keys: Sequence[str]) -> None:
        """Drop what was recorded under those of these keys that exist."""
        ...

    def weight_client(self, loop: LoopThread) -> WeightClient:
        """What a `WeightSender` steers, from any thread but the loop's."""
        ...

    async def close(self) -> None: ...


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="aepo-vllm", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start it there; cancelling the future cancels the work. RuntimeError: closed."""
        if self._closed:
            work.close()
            raise RuntimeError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Result], timeout: float | None = None) -> Result:
        """Wait for it, in this thread; it is cancelled if that ends early. TimeoutError: after `timeout` seconds."""
        future = self.submit(work)
        try:
            with heard_by_main_thread():
                return future.result(timeout)
        except FutureTimeoutError:  # its own name before Python 3.11
            future.cancel()
            raise TimeoutError from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, wait for it, and end the thread. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(END_SECONDS)  # one that blocks the loop stays behind, as a daemon

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(asyncio.sleep(0))  # what was submitted just before becomes a task
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=END_SECONDS))
        finally:
            self._loop.close()


class VLLMEngine:
    """`Engine` over vLLM replicas that hold the same weights. Made by `launch` or `connect`, ended by `close`.

    Requests of a group go to one replica, whose prefix cache then serves what they share; groups are spread evenly.
    When a replica is gone the others take over its requests, from their tokens and seeds. Versions are stamped by the
    engines and checked: a segment under other weights than the last refresh is an error.
    """

    lockstep = False

    def __init__(
        self,
        replicas: Sequence[Replica],
        loop: LoopThread,
        *,
        vocab_size: int,
        version: int,
        model: torch.nn.Module | None,
        weights_dir: str | None,
        stamp: str | None = None,
        guard: OrphanGuard | None = None,
    ) -> None:
        """stamp: what the replicas call their weights, None where `refresh` is to give them a name.
        guard: ends with the engine, and ends what is left of it then."""
        self.version = version
        self.counters = EngineCounters()
        self.max_positions = min(replica.max_positions for replica in replicas)
        self._stamp = stamp
        self._vocab_size = vocab_size
        self._loop = loop
        self._replicas = list(replicas)
        self._readers = {replica.name: EntropyReader(replica) for replica in replicas}
        self._gone: dict[str, ReplicaGoneError] = {}
        self._homes: dict[str, Replica] = {}  # of groups, until release
        self._open: dict[str, Replica] = {}  # keys whose entropies have not been fetched
        self._running: set[asyncio.Task[Any]] = set()
        self._session = uuid.uuid4().hex[:12]  # replicas may serve others too
        self._counter = itertools.count()
        self._model = model
        self._weights_dir = None if weights_dir is None else Path(weights_dir)
        self._guard: OrphanGuard | None = None
        if guard is not None:
            self._end_with(guard)
        self._sender: WeightSender | None = None  # to the replicas that are there; made when it is needed

    def _end_with(self, guard: OrphanGuard) -> None:
        """It also ends where this is collected without `close`; at Python's end it is the guard itself that does it."""
        self._guard = guard
        weakref.finalize(self, guard.end).atexit = False

    @classmethod
    def launch(
        cls,
        model_dir: Path,
        *,
        eos_ids: Sequence[int],
        vocab_size: int,
        model: torch.nn.Module | None,
        settings: VLLMConfig,
        version: int,
        seed: int,
    ) -> VLLMEngine:
        """Start `settings.replicas` engines on this machine, each in processes of its own.

        model_dir: weights, configuration and tokenizer, as transformers saves them. model: the one being trained, whose
        weights `refresh` sends; None: they never change. ModuleNotFoundError: vLLM is not installed. ValueError: vLLM
        refuses the settings. If it fails or is interrupted, no process is left.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from aepo.rollout.engines.vllm.local import start_replicas
        from aepo.vllm.weights import stamped

        place = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
        if len(os.fsencode(place)) > SOCKET_BYTES - len("/aepo-vllm-/") - 12 - 36:
            place = "/tmp"
        guard = temporary_directory(Path(place), "aepo-vllm-", weight_files(settings.weights_dir))
        loop, stamp = LoopThread(), stamped(version)
        try:
            replicas = loop.run(
                start_replicas(model_dir, eos_ids=eos_ids, settings=settings, version=stamp, seed=seed, guard=guard)
            )
            return cls(
                replicas,
                loop,
                vocab_size=vocab_size,
                version=version,
                model=model,
                weights_dir=settings.weights_dir,
                stamp=stamp,
                guard=guard,
            )
        except BaseException:
            loop.close()
            guard.end()
            raise

    @classmethod
    def connect(
        cls,
        *,
        eos_ids: Sequence[int],
        vocab_size: int,
        model: torch.nn.Module | None,
        settings: VLLMConfig,
        version: int,
    ) -> VLLMEngine:
        """Use the running `vllm serve` of `settings.endpoints`; their flags are in docs/vllm.md.

        ConnectionError: one of them does not answer, or names a directory for new weights that cannot be written here.
        ValueError: one of them lacks what we need, or serves another vocabulary. The weights of `model` are sent to
        them at once, since nobody knows which ones they have.
        """
        from aepo.rollout.engines.vllm.remote import RemoteReplica

        loop = LoopThread()

        async def connected() -> list[RemoteReplica]:
            replicas: list[RemoteReplica] = []
            try:
                for url in settings.endpoints:
                    replicas.append(
                        await RemoteReplica.connect(
                            url, eos_ids, vocab_size, updatable=model is not None, longest=settings.request_timeout
                        )
                    )
            except BaseException:
                for replica in replicas:
                    await replica.close()
                raise
            return replicas

        try:
            replicas = loop.run(connected())
        except BaseException:
            loop.close()
            raise
        engine = cls(
            replicas, loop, vocab_size=vocab_size, version=version, model=model, weights_dir=settings.weights_dir
        )
        try:
            if model is not None:
                if engine._weights_dir is None:
                    engine._weights_dir = Path(replicas[0].shared_directory())
                engine._end_with(OrphanGuard(None, weight_files(str(engine._weights_dir))))
                engine.refresh(version)
        except BaseException:
            engine.close()
            raise
        return engine

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One result per request, in order. Temperature 0 takes the likeliest token and reports the distribution at
        temperature 1.

        ValueError: a request that cannot be served. ReplicaGoneError: no replica is left. ReplicaError: one of
        them answers what cannot be right, or has other weights. FloatingPointError: the model's logits are not
        finite.
        """
        for index, request in enumerate(requests):
            check_request(index, request, self.max_positions, self._vocab_size)
        return await asyncio.wrap_future(self._loop.submit(self._generate(requests)))

    async def _generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        work = [asyncio.ensure_future(self._segment(request)) for request in requests]
        for task in work:
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        try:
            return await asyncio.gather(*work)
        finally:
            for task in work:
                task.cancel()

    async def _segment(self, request: GenerationRequest) -> Generation:
        aborts = 0
        while True:
            replica = self._home(request.group)
            key = f"{self._session}-{next(self._counter)}"
            self._open[key] = replica
            try:
                completion = await replica.complete(request, key)
                self.counters.asked += len(request.token_ids)
                self.counters.prefilled += completion.prefilled
                self.counters.generated += len(completion.token_ids)
                if completion.finish_reason == "abort":
                    aborts += 1
                    if aborts == ABORTS:
                        raise ReplicaError(f"{replica.name}: a request was aborted {ABORTS} times, not by this engine")
                    continue
                entropies, version = await self._readers[replica.name].read(key, len(completion.token_ids))
                del self._open[key]
            except ReplicaGoneError as error:
                self._lose(replica, error)
                continue
            self._check_version(replica, completion.version or version)
            return self._checked(replica, completion, entropies)

    def _check_version(self, replica: Replica, version: str | None) -> None:
        """A replica whose weights are not ours to change may call them what it likes, if it has all of them."""
        if version == PARTLY_LOADED:
            raise partly_loaded(replica.name)
        if self._model is not None and version != self._stamp:
            raise ReplicaError(
                f"{replica.name}: a segment was sampled with weights version {version}, expected {self._stamp}: they "
                "were changed by somebody else"
            )

    def _checked(self, replica: Replica, completion: Completion, entropies: Sequence[float]) -> Generation:
        values = zip(completion.logprobs, entropies, strict=True)
        broken = [i for i, pair in enumerate(values) if not all(map(math.isfinite, pair))]
        if broken:
            raise FloatingPointError(
                f"{replica.name}: the model's logits are not finite at output position {broken[0]} "
                f"(weights version {self.version})"
            )
        assert completion.finish_reason != "abort"
        return Generation(
            completion.token_ids, completion.logprobs, tuple(entropies), completion.finish_reason, self.version
        )

    @property
    def _alive(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.name not in self._gone]

    def _lose(self, replica: Replica, error: ReplicaGoneError) -> None:
        """For good: its weights would be old ones if it came back."""
        if replica.name not in self._gone:
            self._gone[replica.name] = error
            self._sender = None
            logger.warning("%s; %d of %d replicas are left", error, len(self._alive), len(self._replicas))

    def _home(self, group: str) -> Replica:
        """The replica of the group, or for a new group the one with the fewest."""
        alive = self._alive
        if not alive:
            last = list(self._gone.values())[-1]
            raise ReplicaGoneError(f"no vLLM replica is left of {', '.join(self._gone)}; the last error: {last}")
        home = self._homes.get(group)
        if home is None or home.name in self._gone:
            load = Counter(replica.name for replica in self._homes.values())
            home = self._homes[group] = min(alive, key=lambda replica: load[replica.name])
        return home

    def release(self) -> None:
        """The rollout batch is over: nothing of it is left in the engines but cached prefixes, which they manage."""
        if self._replicas:
            self._loop.run(self._release())

    async def _release(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for replica in self._replicas:
            keys = [key for key, holder in self._open.items() if holder is replica]
            if keys and replica.name not in self._gone:
                try:
                    await replica.forget(keys)
                except ReplicaGoneError as error:
                    self._lose(replica, error)
                except ReplicaError as error:  # must not hide what the rollout ends with
                    logger.warning("records stay until there is no room for newer ones: %s", error)
        self._open.clear()
        self._homes.clear()

    def refresh(self, version: int) -> None:
        """Send the model's weights to all replicas that are left, which drop what they have cached under the old ones.

        A replica that turns out to be gone is left out from then on, as in a rollout. RuntimeError: the engine was made
        without a model. WeightUpdateError: a replica failed to take the weights, or they are not finite. Where it was
        left with a part of them, or this was interrupted then, `generate` raises ReplicaError until a refresh succeeds.
        """
        if not self._replicas:
            raise RuntimeError("the engine is closed")
        if self._model is None:
            raise RuntimeError("this engine was made with model=None: there are no weights to send")
        from aepo.vllm.weights import WeightSender, WeightUpdateError

        while True:
            try:
                if self._sender is None:
                    clients = [replica.weight_client(self._loop) for replica in self._alive]
                    self._sender = WeightSender(clients, self._model, self._weights_dir)
                    self._weights_dir = self._sender.directory  # engines keep to the first one
                self._stamp = self._sender.send(version)
                break
            except WeightUpdateError as error:
                gone = {name: e for name, e in error.failures.items() if isinstance(e, ReplicaGoneError)}
                if not gone or len(gone) == len(self._alive):
                    raise
                for replica in self._alive:
                    if replica.name in gone:
                        self._lose(replica, gone[replica.name])
        self.version = version

    def close(self) -> None:
        """End the engines that were launched here, and their processes, whatever they are doing; what still runs is
        cancelled. Takes END_SECONDS at most where vLLM hangs. A second call does nothing."""
        replicas, self._replicas = self._replicas, []
        if not replicas:
            return

        async def close_all() -> None:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*(replica.close() for replica in replicas))

        try:
            self._loop.run(close_all(), END_SECONDS)
        except TimeoutError:
            logger.warning("vLLM did not shut down within %g s: its processes are killed", END_SECONDS)
        finally:
            if self._guard is not None:
                self._guard.end()
            self._loop.close()
            self._readers, self._sender = {}, None


def weight_files(weights_dir: str | None) -> list[str]:
    """Patterns of what this process may leave of new weights that are on their way when it is killed."""
    from aepo.vllm.weights import SHARED_MEMORY

    places = [SHARED_MEMORY, tempfile.gettempdir()] if weights_dir is None else [Path(weights_dir).absolute()]
    return [f"{glob.escape(str(place))}/{PREFIX}*" for place in places]


class EntropyReader:
    """Reads records of one replica. All that ask while a call is under way are answered by the next one: a call to a
    busy engine waits for its step, 7 ms where 16 requests were decoding."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._waiting: dict[str, tuple[int, asyncio.Future[tuple[Sequence[float], str | None]]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def read(self, key: str, length: int) -> tuple[Sequence[float], str | None]:
        """The entropies of the `length` tokens recorded under `key`, and the version of the weights."""
        answer: asyncio.Future[tuple[Sequence[float], str | None]] = asyncio.get_running_loop().create_future()
        self._waiting[key] = (length, answer)
        if self._task is None:
            self._task = asyncio.ensure_future(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, {}
            try:
                found = await self._replica.entropies({key: length for key, (length, _) in asked.items()})
                answers = {key: (found.entropies[key], found.version) for key in asked}
            except Exception as error:  # whatever it is, nobody must wait for ever
                for _, answer in asked.values():
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for key, (_, answer) in asked.items():
                    if not answer.done():
                        answer.set_result(answers[key])
        self._task = None


def sampling_settings(request: GenerationRequest, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Of one segment, in the names that vLLM's SamplingParams and its completions share."""
    return {
        "temperature": request.temperature,
        "max_tokens": request.max_new_tokens,
        "seed": request.seed >> 1,  # vLLM's are signed
        "stop": list(request.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # tags may be special tokens
        "spaces_between_special_tokens": False,
        "ignore_eos": True,  # exactly these end a text:
        "stop_token_ids": list(eos_ids),
        "logprobs": 0,  # of the sampled token alone
    }


def finish_reason(reason: str | None, stopped_by: int | str | None) -> FinishReason:
    """vLLM's words in ours: a stop string is "stop", a token that ends a text "eos"."""
    if reason == "stop":
        return "stop" if isinstance(stopped_by, str) else "eos"
    if reason in ("length", "abort"):
        return reason  # type: ignore[return-value]  # mypy does not narrow to the literals
    found = reprlib.repr(reason)  # a server's may be long
    raise RuntimeError(f"vLLM ended a request with finish_reason = {found}, expected stop, length or abort")
