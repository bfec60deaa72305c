"""Where the entropies of tracked requests are kept: one flat tensor on the engine's device, a region per request.

An entropy is written by output position, so it does not matter how often or in which order positions are computed.
Everything but the tensor lives on the host. Knows nothing of vLLM: a slot is whatever number the engine gives to a
request while it runs.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass

import torch

UNWRITTEN = -1.0  # no entropy is negative, and NaN must stay what a row with NaN logits gives
FIRST_SIZE = 1 << 16  # tokens, 256 KiB
DUPLICATE = "duplicate: two requests had this key at the same time"
EXPIRED = "expired: there was no room for newer records, and the oldest that nobody had fetched went first"
MOST_RECORDS = 1 << 16  # each costs some hundred bytes of the host, also where it has no tokens


@dataclass(eq=False)
class Record:
    """The entropies of one request: elements [start, start + capacity) of the pool, one per output position."""

    key: str
    owner: object  # tells requests with one key apart, by ==
    temperature: float
    start: int
    capacity: int  # tokens; 0 where the pool had no room
    slot: int  # where the request was last seen
    outputs: Sized | None  # the engine's list of output tokens, where it has one; else all written positions count
    problem: str | None = None  # why this record must not be used

    @property
    def readable(self) -> int:
        return self.capacity if self.outputs is None else min(self.capacity, len(self.outputs))


class Regions:
    """First-fit allocation of intervals of [0, size)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [(0, size)]  # sorted (start, length), never adjacent

    @property
    def used(self) -> int:
        return self.size - sum(length for _, length in self._free)

    def take(self, length: int) -> int | None:
        """Start of a new interval, or None where no gap is long enough."""
        for i, (start, gap) in enumerate(self._free):
            if gap >= length:
                self._free[i : i + 1] = [(start + length, gap - length)] if gap > length else []
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        if length == 0:
            return
        i = bisect.bisect(self._free, (start, length))
        if i < len(self._free) and self._free[i][0] == start + length:
            length += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == start:
            i -= 1
            start, before = self._free.pop(i)
            length += before
        self._free.insert(i, (start, length))

    def grow(self, size: int) -> None:
        self.size, added = size, (self.size, size - self.size)
        self.give_back(*added)


class EntropyRecords:
    """Records by key, and which slot writes to which.

    `limit` [tokens] bounds the pool, which starts small and doubles. When it is full, the oldest records make room
    whose request is not running: it has ended and nobody has fetched them, or it waits, preempted. A request that finds
    no room even so runs on without a record, and its key has a problem to report. `running`: the slots of the last
    step, and those that were taken since, where the engine does not say when a request ends; None: it says so.
    `changed` collects the slots that write to other elements than before, or to none; who copies that to a device
    clears it.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1 token; got {limit}")
        self.limit = limit
        self.pool = torch.full((min(limit, FIRST_SIZE),), UNWRITTEN, device=device)
        self.slots: dict[int, Record] = {}
        self.changed: set[int] = set()
        self.running: set[int] | None = None
        self._regions = Regions(len(self.pool))
        self._by_key: dict[str, Record] = {}  # oldest first
        self._expired: dict[str, None] = {}  # keys, oldest first

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def tokens(self) -> int:
        """Elements of the pool in use."""
        return self._regions.used

    @property
    def live(self) -> int:
        """Slots whose request still writes, or has ended without the slot being used again."""
        return sum(self.is_current(slot) for slot in self.slots)

    def admit(
        self,
        slot: int,
        key: str,
        *,
        capacity: int,
        temperature: float,
        position: int,
        owner: object,
        outputs: Sized | None = None,
    ) -> Record | None:
        """A request enters `slot`, its next token being output number `position`; None: it is not tracked.

        At position 0 the record starts anew. Later the request comes back (after preemption), and its record goes on,
        if nobody has fetched or forgotten it.
        """
        self.vacate(slot)
        if self.running is not None:
            self.running.add(slot)
        record = self._by_key.get(key)
        if record is not None:
            self.changed.add(record.slot)
        if position == 0:
            self._release([] if record is None else [record])
            self._expired.pop(key, None)
            record = self._by_key[key] = self._allocate(key, capacity, temperature, slot, owner)
        elif record is None:
            return None
        elif record.owner != owner:
            record.problem = DUPLICATE
        record.slot, record.outputs = slot, outputs
        self.slots[slot] = record
        self.changed.add(slot)
        return record

    def vacate(self, slot: int) -> None:
        if self.slots.pop(slot, None) is not None:
            self.changed.add(slot)

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """The request of `source` goes on in `target`, in place of the one there or (swap) in exchange with it."""
        moved, other = self.slots.pop(source, None), self.slots.pop(target, None)
        for slot, record in ((target, moved), (source, other if swap else None)):
            if record is not None:
                self.slots[slot] = record
                if record.slot in (source, target):
                    record.slot = slot
        self.changed.update((source, target))

    def is_current(self, slot: int) -> bool:
        """Whether the request in this slot is the one that its key stands for; not so after a second one took it."""
        record = self.slots.get(slot)
        return record is not None and self._by_key.get(record.key) is record and record.slot == slot

    def seen_running(self, slots: Iterable[int]) -> None:
        """These slots are running now: where a later request took the key of one, both live at the same time."""
        for slot in slots:
            if slot in self.slots and not self.is_current(slot):
                self._by_key[self.slots[slot].key].problem = DUPLICATE

    def place(self, slot: int) -> int:
        """Element of the pool for the next token of this slot's request, -1 where there is none."""
        if not self.is_current(slot):
            return -1
        record = self.slots[slot]
        position = 0 if record.outputs is None else len(record.outputs)
        return record.start + position if position < record.capacity else -1

    def first(self, limits: Mapping[str, int | None]) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Entropies [nats] recorded so far by key, the first `limit` of them (None: all), and what is wrong with the
        other keys. One copy from the device."""
        problems = {key: problem for key in limits if (problem := self._problem(key))}
        good = {key: self._by_key[key] for key in limits if key not in problems}
        regions = []
        for key, record in good.items():
            limit = limits[key]
            length = record.readable if limit is None else min(limit, record.readable)
            regions.append(self.pool[record.start : record.start + length])
        copies = torch.cat(regions).cpu().split([len(region) for region in regions]) if regions else []
        values = {}
        for key, copy in zip(good, copies, strict=True):
            written = copy != UNWRITTEN
            number = int(written.sum())
            if written[:number].all():
                values[key] = copy[:number].tolist()
            else:
                problems[key] = "positions are missing between recorded ones"
        return values, problems

    def read(self, counts: Mapping[str, int | None]) -> tuple[dict[str, list[float]], dict[str, str]]:
        """As `first`, but fewer than a count are a problem. Nothing is removed."""
        values, problems = self.first(counts)
        for key, count in counts.items():
            if count is not None and key in values and len(values[key]) < count:
                problems[key] = f"{len(values.pop(key))} entropies are recorded, {count} were asked for"
        return values, problems

    def drop(self, keys: Collection[str] | None = None) -> int:
        """Forget these records (None: all) and return how many there were. Requests that still run go on untracked."""
        gone = set(self._by_key) if keys is None else self._by_key.keys() & set(keys)
        for key in list(self._expired) if keys is None else keys:
            self._expired.pop(key, None)
        self._release([self._by_key[key] for key in gone])
        for slot in [slot for slot, record in self.slots.items() if record.key in gone]:
            self.vacate(slot)
        return len(gone)

    def _allocate(self, key: str, capacity: int, temperature: float, slot: int, owner: object) -> Record:
        if len(self._by_key) >= MOST_RECORDS:
            self._expire_oldest()
        start = self._regions.take(capacity)
        size = len(self.pool)
        while start is None and size < self.limit:
            size = min(2 * size, self.limit)
            if size - self._regions.used >= capacity:
                grown = self.pool.new_full((size,), UNWRITTEN)
                grown[: len(self.pool)] = self.pool
                self.pool = grown
                self._regions.grow(size)
                start = self._regions.take(capacity)
        while start is None and capacity <= self.limit and self._expire_oldest():
            start = self._regions.take(capacity)
        if start is None:
            full = f"overflow: no room for {capacity} tokens, {self.tokens} of {self.limit} are in use"
            return Record(key, owner, temperature, 0, 0, slot, None, f"{full}; fetch or forget, or raise the capacity")
        self.pool[start : start + capacity] = UNWRITTEN
        return Record(key, owner, temperature, start, capacity, slot, None)

    def _expire_oldest(self) -> bool:
        """False: every record is that of a request that may be running."""
        for record in self._by_key.values():
            waits = self.running is not None and record.slot not in self.running
            if waits or self.slots.get(record.slot) is not record:
                self._release([record])
                self._expired[record.key] = None
                for key in list(itertools.islice(self._expired, max(0, len(self._expired) - MOST_RECORDS))):
                    del self._expired[key]
                return True
        return False

    def _release(self, records: Sequence[Record]) -> None:
        for record in records:
            del self._by_key[record.key]
            self._regions.give_back(record.start, record.capacity)

    def _problem(self, key: str) -> str | None:
        if key in self._by_key:
            return self._by_key[key].problem
        return EXPIRED if key in self._expired else "unknown: never run, forgotten, or fetched before"
