"""Entropies are read together, and nobody who asks for some waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from aepo.rollout.engines.vllm.entropy_reader import EntropyReader
from aepo.rollout.engines.vllm.replica import Recorded, ReplicaError

SECONDS = 20.0  # what waits for ever fails
Read = tuple[Sequence[float], str | None]


class Replica:
    """Answers in a while, with the length of every key; `fails`: the next call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.fails = False

    async def entropies(self, lengths: Mapping[str, int]) -> Recorded:
        self.calls.append(sorted(lengths))
        await asyncio.sleep(0.05)
        if self.fails:
            self.fails = False
            raise ReplicaError("no records")
        return Recorded({key: [float(length)] * length for key, length in lengths.items()}, "7")


async def asked(reader: EntropyReader, *keys: str) -> list[Read | BaseException]:
    """At once; the n-th key has n tokens."""
    reading = (reader.read(key, length) for length, key in enumerate(keys, start=1))
    return await asyncio.wait_for(asyncio.gather(*reading, return_exceptions=True), SECONDS)


def test_all_that_ask_while_a_call_is_under_way_are_answered_by_the_next() -> None:
    async def read(reader: EntropyReader) -> list[Read | BaseException]:
        first = asyncio.ensure_future(asked(reader, "a"))
        await asyncio.sleep(0.01)
        return [*await asked(reader, "b", "c"), *await first]

    replica = Replica()
    answers = asyncio.run(read(EntropyReader(replica)))  # type: ignore[arg-type]
    assert answers == [([1.0], "7"), ([2.0, 2.0], "7"), ([1.0], "7")]
    assert replica.calls == [["a"], ["b", "c"]]


@pytest.mark.parametrize("fails", [False, True])
def test_it_reads_again_after_a_while_without_questions(fails: bool) -> None:
    async def read(reader: EntropyReader) -> list[Read | BaseException]:
        return [*await asked(reader, "a", "b"), *await asked(reader, "c")]

    replica = Replica()
    replica.fails = fails
    *first, last = asyncio.run(read(EntropyReader(replica)))  # type: ignore[arg-type]
    assert [isinstance(one, ReplicaError) for one in first] == [fails] * 2, "all that asked are told"
    assert last == ([1.0], "7")
    assert replica.calls == [["a", "b"], ["c"]]
