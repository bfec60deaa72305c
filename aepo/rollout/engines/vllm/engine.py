"""Asynchronous generation by vLLM: one engine on this machine, or several `vllm serve` on others.

Every request is a segment by itself, given as token ids: an engine finds the prefix in its cache, and no path waits for
another one's tool. Exact entropies come from the processor that runs inside the engines (docs/vllm.md).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import uuid
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aepo.files.weight_directory import PARTLY_LOADED
from aepo.parallel import Weights
from aepo.rollout.engine import EngineCounters, Generation, GenerationRequest, check_request
from aepo.rollout.engines.vllm.entropy_reader import EntropyReader
from aepo.rollout.engines.vllm.loop_thread import END_SECONDS, LoopThread
from aepo.rollout.engines.vllm.orphans import OrphanGuard
from aepo.rollout.engines.vllm.replica import Completion, Replica, ReplicaError, ReplicaGoneError, partly_loaded

if TYPE_CHECKING:
    from aepo.vllm.weights import FileSender, FileUpdateInfo

logger = logging.getLogger(__name__)
ABORTS = 3  # of one request, by whoever else steers the engine, before the rollout is given up


class VLLMEngine:
    """`Engine` over vLLM replicas that hold the same weights. Made by `launch` or `connect`
    (aepo/rollout/engines/vllm/start.py), ended by `close`.

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
        weights_dir: Path | None,
        stamp: str | None = None,
        guard: OrphanGuard | None = None,
    ) -> None:
        """weights_dir: where `refresh` writes new weights; None: they are not ours to change. stamp: what the replicas
        call those that they have, None where `refresh` is to give them a name. guard: ends with the engine, and ends
        what is left of it then; also where this is collected without `close`."""
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
        self._weights_dir = None if weights_dir is None else weights_dir.absolute()
        self._sender: FileSender | None = None  # to the replicas that are there; made when it is needed
        self._guard = guard
        if guard is not None:
            weakref.finalize(self, guard.end).atexit = False  # at Python's end it is the guard itself that does it

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
        if self._weights_dir is not None and version != self._stamp:
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

    def refresh(self, version: int, weights: Weights) -> None:
        """Send these to all replicas that are left, which drop what they have cached under the old ones.

        A replica that turns out to be gone is left out from then on, as in a rollout. RuntimeError: the weights are not
        ours to change. WeightUpdateError: a replica failed to take the weights, or they are not finite. Where it was
        left with a part of them, or this was interrupted then, `generate` raises ReplicaError until a refresh succeeds.
        """
        if not self._replicas:
            raise RuntimeError("the engine is closed")
        if self._weights_dir is None:
            raise RuntimeError("this engine was made without weights to send: those of its servers stay")
        from aepo.vllm.weights import written

        with written(self._weights_dir, weights) as files:
            self._stamp = self._send(version, files)
        self.version = version

    def _send(self, version: int, files: FileUpdateInfo) -> str:
        """To those that are there; written once, weights go out again where some of them are not."""
        from aepo.vllm.weights import FileSender, WeightUpdateError

        assert self._weights_dir is not None
        while True:
            try:
                if self._sender is None:
                    clients = [replica.weight_client(self._loop) for replica in self._alive]
                    self._sender = FileSender(clients, self._weights_dir)
                return self._sender.send(version, files)
            except WeightUpdateError as error:
                gone = {name: e for name, e in error.failures.items() if isinstance(e, ReplicaGoneError)}
                if not gone or len(gone) == len(self._alive):
                    raise
                for replica in self._alive:
                    if replica.name in gone:
                        self._lose(replica, gone[replica.name])

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
