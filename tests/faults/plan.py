"""Which faults there are, and the order in which they are tried: a function of the seed and the code."""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import places
import runs
import writes
from fault import CALLS, ERRORS, Fault, mount_small_disk, name_of, wrap_call
from judge import Foreign
from runs import STEPS, Prepared, command

KINDS = (
    "one signal",
    "several signals",
    "kill -9",
    "failing write",
    "failing writes, from then on",
    "error in a call",
    "full disk",
    "output",
    "two processes",
)
IN_CODE = KINDS[:3]
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
SEVERAL = (
    "SIGINT,SIGINT+1",
    "SIGINT,SIGTERM+2",
    "SIGTERM,SIGINT+3",
    "SIGHUP,SIGTERM+7",
    "SIGINT,SIGINT+20",
    "SIGINT*10",
)
ERRNOS = ("ENOSPC", "EIO", "EACCES")
SECONDS = ("--resume", "--overwrite", "--new")
# While these run, the directory is the first process's own.
ITS_OWN = (
    "Trainer.train_step",
    "Learner.update",
    "Saver.save",
    "Checkpoints.save",
    "Checkpoints._place",
    "Trainer._evaluate_if_due",
    "StepRecorder.recording",
)


@functools.cache
def small_disks_can_be_mounted() -> bool:
    """Not without user namespaces, which some machines and containers forbid."""
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if not child:
            code = 1
            try:
                mount_small_disk(Path(folder), 40)
                code = 0
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1] == 0


def record(prepared: Prepared, work: Path) -> list[str]:
    """Where faults can happen in this scenario, in the order of an undisturbed run, each with its number."""
    directory, trace = work / "recorded", work / "trace"
    prepared.copy_to(directory)
    foreign = Foreign(directory, work / "recorded_outside")  # as in the tries: places are counted while it is looked at
    foreign.plant_early()
    counts: Counter[str] = Counter()

    def set_up() -> None:
        descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def note(where: str) -> None:
            os.write(descriptor, f"{where}\n".encode())

        planting = False

        def note_place(place: str) -> None:
            nonlocal planting
            planting = True
            foreign.plant_late()
            planting = False
            note(place)

        def note_write(operation: str, path: Path) -> None:
            if not planting:
                note(f"{operation}:{name_of(path, directory)}")

        places.on_place = note_place
        writes.watch(directory, note_write)
        for name in CALLS:
            wrap_call(name, lambda name, half, whole: (note(name), whole())[1])

    ended = runs.run(command(directory, prepared.scenario.arguments), work / "logs", set_up)
    assert ended.code == 0, ended
    shutil.rmtree(directory)
    shutil.rmtree(work / "recorded_outside")
    found = []
    for where in trace.read_text().splitlines():
        counts[where] += 1
        found.append(f"{where}#{counts[where]}")
    return found


def of_program(draw: random.Random) -> dict[str, list[Fault]]:
    """A program is told from outside: when its output, or a file of its, has so many lines."""
    wheres = ["out#1", "run.json#1", "evals.jsonl#1", *(f"metrics.jsonl#{step}" for step in range(1, STEPS + 1))]
    whats = {"one signal": SIGNALS, "several signals": SEVERAL, "kill -9": ("SIGKILL",)}
    found = {
        kind: [Fault("program", what, where) for what in these for where in wheres] for kind, these in whats.items()
    }
    for faults in found.values():
        draw.shuffle(faults)
    return found


def candidates(scenario: str, wheres: Sequence[str], draw: random.Random) -> dict[str, list[Fault]]:
    """All faults of a scenario by kind, in a random order in which every function comes before any comes again."""
    in_code = [where for where in wheres if ".py:" in where]
    in_calls = [where for where in wheres if where.partition("#")[0] in CALLS]
    elsewhere = {*in_code, *in_calls}
    in_writes = [where for where in wheres if where not in elsewhere]

    def spread(these: Iterable[str], whats: Sequence[str]) -> list[Fault]:
        groups = defaultdict(list)
        for where in these:
            place = where.partition("#")[0]
            groups[places.FUNCTIONS.get(place, place)] += [Fault(scenario, what, where) for what in whats]
        for group in groups.values():
            draw.shuffle(group)
        order = list(groups.values())
        draw.shuffle(order)
        longest = max(map(len, order), default=0)
        return [group[i] for i in range(longest) for group in order if i < len(group)]

    found = {
        "one signal": spread(in_code, SIGNALS),
        "several signals": spread(in_code, SEVERAL),
        "kill -9": spread([*in_code, *in_writes], ("SIGKILL",)),
        "failing write": spread(in_writes, ERRNOS),
        "failing writes, from then on": spread(in_writes, [f"{name}.." for name in ERRNOS]),
        "error in a call": spread(in_calls, ERRORS)
        + spread([where for where in in_calls if where.partition("#")[0] in ("step", "backward")], ("nan",)),
    }
    if scenario in ("one", "several"):
        found["full disk"] = [
            Fault(scenario, f"{what}={kib}", "disk#1")
            for kib in (40, 90, 150, 200, 260, 350, 480, 700)
            for what in ("limit", *(("tmpfs",) if small_disks_can_be_mounted() else ()))
        ]
        found["output"] = [Fault(scenario, what, "stdout#1") for what in ("full", "closed")]
        draw.shuffle(found["full disk"])
    if scenario == "one":
        own = [where for where in in_code if places.FUNCTIONS[where.partition("#")[0]].endswith(ITS_OWN)]
        found["two processes"] = spread(own, SECONDS)
    return found


def interleaved(lists: Sequence[list[Fault]]) -> list[Fault]:
    """One of each list, then the next of each."""
    longest = max(map(len, lists), default=0)
    return [faults[i] for i in range(longest) for faults in lists if i < len(faults)]


def planned(prepared: dict[str, Prepared], work: Path, seed: int) -> list[Fault]:
    """Every fault of every scenario. Of any beginning of the list three in four are in our code, where no function
    comes twice before all have come; the others are of all other kinds."""
    draw = random.Random(seed)
    by_kind: dict[str, list[list[Fault]]] = {kind: [] for kind in KINDS}
    for name, one in prepared.items():
        found = of_program(draw) if one.scenario.whole else candidates(name, record(one, work), draw)
        for kind, faults in found.items():
            by_kind[kind].append(faults)
    lists = {kind: interleaved(lists) for kind, lists in by_kind.items()}
    in_code = _new_functions_first(interleaved([lists[kind] for kind in IN_CODE]))
    others = interleaved([lists[kind] for kind in KINDS if kind not in IN_CODE])
    return interleaved([in_code[0::3], in_code[1::3], in_code[2::3], others])


def _new_functions_first(faults: list[Fault]) -> list[Fault]:
    seen, first, later = set(), [], []
    for fault in faults:
        place = fault.where.partition("#")[0]
        function = places.FUNCTIONS.get(place, place)
        (later if function in seen else first).append(fault)
        seen.add(function)
    return first + later
