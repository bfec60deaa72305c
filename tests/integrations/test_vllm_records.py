"""EntropyRecords by hand and against a plain model of it: no engine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aepo.vllm.records import EXPIRED, FIRST_SIZE, EntropyRecords, Regions

CPU = torch.device("cpu")


def admit(records, slot, key, capacity=4, position=0, owner="request", outputs=None):
    return records.admit(slot, key, capacity=capacity, temperature=1.0, position=position, owner=owner, outputs=outputs)


def write(records, slot, *values, position=0):
    record = records.slots[slot]
    records.pool[record.start + position : record.start + position + len(values)] = torch.tensor(values)


def read(records, **counts):
    values, problems = records.read(counts)
    assert not problems
    return values


def problem(records, key):
    return records.read({key: None})[1][key]


def test_what_is_written_is_read_and_dropped():
    records = EntropyRecords(CPU, 100)
    admit(records, 3, "a"), admit(records, 0, "b", capacity=7)
    write(records, 3, 0.5, 1.5)
    write(records, 0, 2.0, float("nan"), 0.0)
    values = read(records, a=None, b=2)
    assert values["a"] == [0.5, 1.5]
    assert values["b"] == [2.0, pytest.approx(float("nan"), nan_ok=True)]
    assert (len(records), records.tokens, records.live) == (2, 11, 2)
    assert records.drop(["a", "nobody"]) == 1
    assert (len(records), records.tokens, records.live) == (1, 7, 1)
    assert records.drop() == 1
    assert (len(records), records.tokens, records.live, records.slots) == (0, 0, 0, {})


def test_a_region_that_is_used_again_holds_nothing_old():
    records = EntropyRecords(CPU, 4)
    admit(records, 0, "a")
    write(records, 0, 1.0, 2.0, 3.0, 4.0)
    records.drop(["a"])
    admit(records, 0, "b")
    assert read(records, b=None) == {"b": []}


def test_too_few_and_gaps_are_problems():
    records = EntropyRecords(CPU, 100)
    admit(records, 0, "a"), admit(records, 1, "b")
    write(records, 0, 1.0)
    write(records, 1, 1.0, position=1)
    assert records.read({"a": 2, "b": None, "c": None}) == (
        {},
        {
            "a": "1 entropies are recorded, 2 were asked for",
            "b": "positions are missing between recorded ones",
            "c": "unknown: never run, forgotten, or fetched before",
        },
    )


def test_only_tokens_that_the_engine_has_count():
    """Where the engine keeps the list of output tokens, an element beyond it is of a prompt that is half read."""
    records, outputs = EntropyRecords(CPU, 100), []
    admit(records, 0, "a", outputs=outputs)
    assert records.place(0) == 0
    write(records, 0, 9.0)
    assert read(records, a=None) == {"a": []}
    write(records, 0, 1.0)
    outputs.append(17)
    assert records.place(0) == 1
    assert read(records, a=None) == {"a": [1.0]}
    outputs.extend([17] * 3)
    assert records.place(0) == -1  # the region ends here
    assert records.place(5) == -1


def test_coming_back_after_preemption():
    """With tokens the record goes on in the new slot; before the first token it starts anew. Neither is a duplicate."""
    records = EntropyRecords(CPU, 100)
    admit(records, 0, "a")
    admit(records, 2, "a")
    write(records, 2, 1.0, 2.0)
    records.changed.clear()
    admit(records, 5, "a", position=2)
    assert records.changed == {2, 5}
    write(records, 5, 3.0, position=2)
    records.seen_running([5])
    assert read(records, a=None) == {"a": [1.0, 2.0, 3.0]}
    assert (records.tokens, records.live) == (4, 1)
    assert [records.is_current(slot) for slot in (0, 2, 5)] == [False, False, True]


def test_coming_back_to_a_record_that_is_gone():
    records = EntropyRecords(CPU, 100)
    admit(records, 0, "a")
    records.drop(["a"])
    assert admit(records, 1, "a", position=2) is None
    assert records.slots == {}


def test_two_requests_with_one_key():
    records = EntropyRecords(CPU, 100)
    admit(records, 0, "a", owner="first")
    admit(records, 1, "a", owner="second")
    assert records.read({"a": None})[1] == {}  # the first may have ended
    records.seen_running([0, 1])
    assert problem(records, "a").startswith("duplicate")
    assert (records.place(0), records.live) == (-1, 1)

    records.drop()
    admit(records, 0, "b", owner="first")
    records.vacate(0)  # preempted with tokens, and
    admit(records, 1, "b", owner="second")  # while it waits
    admit(records, 2, "b", owner="first", position=3)
    assert problem(records, "b").startswith("duplicate")


@pytest.mark.parametrize("swap", [False, True])
def test_moves(swap):
    records = EntropyRecords(CPU, 100)
    admit(records, 0, "a"), admit(records, 1, "b")
    records.move(0, 1, swap=swap)
    assert records.slots[1].key == "a"
    assert (0 in records.slots) == swap
    assert [records.is_current(slot) for slot in (0, 1)] == [swap, True]
    records.move(1, 6, swap=True)
    assert (records.slots[6].key, records.is_current(6)) == ("a", True)
    records.move(8, 6, swap=False)  # an untracked request takes the place
    assert 6 not in records.slots


def test_the_pool_doubles_and_then_overflows():
    records = EntropyRecords(CPU, 3 * FIRST_SIZE)
    admit(records, 0, "a", capacity=FIRST_SIZE)
    write(records, 0, 1.0, 2.0)
    assert len(records.pool) == FIRST_SIZE
    admit(records, 1, "b", capacity=2 * FIRST_SIZE)
    assert len(records.pool) == 3 * FIRST_SIZE
    overflown = admit(records, 2, "c", capacity=1)
    assert problem(records, "c").startswith(f"overflow: no room for 1 tokens, {records.limit} of {records.limit}")
    assert (overflown.capacity, records.place(2)) == (0, -1)
    assert read(records, a=None, b=None) == {"a": [1.0, 2.0], "b": []}
    records.drop()
    assert records.tokens == 0
    with pytest.raises(ValueError, match="at least 1 token"):
        EntropyRecords(CPU, 0)


def test_the_oldest_that_have_ended_make_room():
    records = EntropyRecords(CPU, 10)
    for slot, key in enumerate("abc"):
        admit(records, slot, key, capacity=3)
    records.vacate(0), records.vacate(1)
    admit(records, 0, "d", capacity=5)  # where a and b were
    assert problem(records, "a") == problem(records, "b") == EXPIRED
    assert read(records, c=None, d=None) == {"c": [], "d": []}
    assert problem(records, "e").startswith("unknown")
    admit(records, 1, "f", capacity=3)  # all others run
    assert problem(records, "f").startswith("overflow")
    records.vacate(0)
    admit(records, 3, "g", capacity=11)  # will never fit: nothing goes for it
    assert problem(records, "g").startswith("overflow")
    assert read(records, d=None) == {"d": []}
    admit(records, 1, "a", capacity=3)  # a key may be used again
    assert read(records, a=None) == {"a": []}
    assert problem(records, "d") == EXPIRED
    records.drop(["b"])
    assert problem(records, "b").startswith("unknown")


def test_ended_requests_whose_slots_nobody_takes_make_room():
    """Where the engine does not say that a request has ended, those that were not in its last step have."""
    records = EntropyRecords(CPU, 9)
    records.running = set()
    for slot, key in enumerate("abc"):
        admit(records, slot, key, capacity=3)
    admit(records, 3, "d", capacity=3)
    assert problem(records, "d").startswith("overflow"), "none of them has run yet"
    records.running = {1, 2}
    admit(records, 3, "d", capacity=3)
    assert problem(records, "a") == EXPIRED
    assert read(records, b=None, c=None, d=None) == {"b": [], "c": [], "d": []}


def test_records_without_tokens_are_bounded_too(monkeypatch):
    monkeypatch.setattr("aepo.vllm.records.MOST_RECORDS", 3)
    records = EntropyRecords(CPU, 1)
    for number in range(20):
        admit(records, 0, f"k{number}", capacity=5)
    assert len(records) == 3
    assert problem(records, "k16") == EXPIRED
    assert problem(records, "k12").startswith("unknown"), "the oldest of the expired are not remembered"


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 9))))
def test_regions_never_overlap_and_come_back(steps):
    """Against a list of who owns each element."""
    regions, owners, taken = Regions(100), [0] * 100, []
    for number, (take, length, which) in enumerate(steps, 1):
        if take:
            start = regions.take(length)
            gaps = "".join("x" if owner else "." for owner in owners)
            assert (start is None) == ("." * length not in gaps)
            if start is not None:
                assert start == gaps.index("." * length)
                owners[start : start + length] = [number] * length
                taken.append((start, length))
        elif taken:
            start, length = taken.pop(which % len(taken))
            regions.give_back(start, length)
            owners[start : start + length] = [0] * length
        assert regions.used == sum(owner > 0 for owner in owners)
    for start, length in taken:
        regions.give_back(start, length)
    regions.grow(130)
    assert regions.take(130) == 0


ACTIONS = st.tuples(
    st.sampled_from(["admit", "token", "token", "preempt", "end", "fetch", "move"]),
    st.integers(0, 5),
    st.integers(0, 5),
)


@given(st.lists(ACTIONS, max_size=60))
def test_records_follow_their_requests(actions):
    """Random lives of 6 requests in 6 slots, against a dictionary of what each has written."""
    records, truth, slots, waiting, value = EntropyRecords(CPU, 30), {}, {}, set(), 0.0
    for action, which, slot in actions:
        key, at = f"k{which}", slots.get(f"k{which}")
        if action == "admit" and at is None and slot not in slots.values():
            position = len(truth.get(key, ())) if key in waiting else 0
            if admit(records, slot, key, capacity=8, position=position) is None:
                continue
            if position == 0:
                truth[key] = []
            slots[key] = slot
            waiting.discard(key)
        elif action == "token" and at is not None and len(truth.get(key, [0] * 8)) < 8 and records.is_current(at):
            if records.slots[at].capacity:
                write(records, at, value := value + 1.0, position=len(truth[key]))
                truth[key].append(value)
        elif action in ("preempt", "end") and at is not None:
            records.vacate(slots.pop(key))
            waiting |= {key} if action == "preempt" else set()
        elif action == "fetch" and not records.read({key: None})[1]:
            assert read(records, **{key: None}) == {key: truth.pop(key)}
            records.drop([key])
            slots.pop(key, None)
            waiting.discard(key)
        elif action == "move" and at is not None and slot not in slots.values():
            records.move(at, slot, swap=False)
            slots[key] = slot
        records.seen_running(slots.values())
    values, problems = records.read(dict.fromkeys(truth))
    assert values == {key: entropies for key, entropies in truth.items() if key not in problems}
    assert all(text.startswith(("overflow", "expired")) for text in problems.values())
    records.drop()
    assert (len(records), records.tokens, records.slots) == (0, 0, {})
