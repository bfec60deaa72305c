"""The entropies of segments that have ended, read from a replica together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aepo.rollout.engines.vllm.replica import Replica


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
