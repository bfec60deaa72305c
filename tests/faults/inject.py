"""Faults, put into real runs one at a time, and a table of how many were survived.

    python tests/faults/inject.py                          all of them, for ten minutes at most
    python tests/faults/inject.py --sample 60              60, of all kinds and in every function
    python tests/faults/inject.py --seed 7 --minutes 30    in another order, for longer
    python tests/faults/inject.py 'one/SIGINT@trainer.py:120#2'    this one (fault.py says what the words mean)

Which of several hundred thousand faults are tried, and in which order, is a function of the seed and the code.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process that has threads cannot be forked safely
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "aepo")]

import places  # noqa: E402

places.install()

import judge  # noqa: E402
import runs  # noqa: E402
import torch  # noqa: E402
from fault import Fault, Injector, grow_disk, mount_small_disk  # noqa: E402
from judge import Foreign  # noqa: E402
from plan import KINDS, planned  # noqa: E402
from runs import SCENARIOS, Ended, Prepared, command  # noqa: E402

COMMAND = "python tests/faults/inject.py"


@dataclass
class Result:
    fault: Fault
    problems: list[str]
    seconds: float
    output: str  # of the process that the fault was put into

    @property
    def survived(self) -> bool:
        return not self.problems


def attempt(fault: Fault, prepared: Prepared, work: Path) -> Result:
    """One try, in a directory of its own that is removed afterwards."""
    began = time.monotonic()
    work.mkdir()
    try:
        if fault.what.startswith("tmpfs="):
            problems, output = in_small_disk(fault, prepared, work)
        elif fault.kind == "two processes":
            problems, output = two_processes(fault, prepared, work)
        else:
            problems, output = one_process(fault, prepared, work, work / "run")
    except Exception as error:  # of ours that the checks call, on what the run has left
        problems, output = [f"while it was looked at: {type(error).__name__}: {error}"], traceback.format_exc()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Result(fault, problems, time.monotonic() - began, output)


def watched(fault: Fault, directory: Path, arguments: list[str], work: Path) -> Ended:
    """A program, whose signals come from outside, to its whole group as from a terminal, SIGKILL to it alone."""
    name, _, count = fault.where.partition("#")
    file = work / "logs" / "out" if name == "out" else directory / name
    process = runs.start(arguments, work / "logs", whole=True)
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if file.is_file() and file.read_bytes().count(b"\n") >= int(count):
            (work / "told").write_text(str(runs.records(directory)))
            for number in fault.signals:
                with contextlib.suppress(ProcessLookupError):
                    (os.kill if number == signal.SIGKILL else os.killpg)(process, number)
                time.sleep(0.001 * fault.gap)
            break
        time.sleep(0.001)
    return runs.wait(process, work / "logs")


def injector(fault: Fault, directory: Path, work: Path, foreign: Foreign) -> Injector:
    def tell() -> None:
        descriptor = os.open(work / "told", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, str(runs.records(directory)).encode())
        os.close(descriptor)

    return Injector(fault, directory, tell, (lambda: None) if fault.kind == "full disk" else foreign.plant_late)


def one_process(fault: Fault, prepared: Prepared, work: Path, directory: Path) -> tuple[list[str], str]:
    prepared.copy_to(directory)
    foreign = Foreign(directory, work / "outside")
    foreign.plant_early()
    before, arguments = runs.status(directory), command(directory, prepared.scenario.arguments)
    if prepared.scenario.whole:
        ended = watched(fault, directory, arguments, work)
    else:
        ended = runs.run(arguments, work / "logs", injector(fault, directory, work, foreign))
    if not (work / "told").exists():
        return ["never reached: not a try"], ended.err
    steps_then = int((work / "told").read_text())
    if ended.code is None:
        return [f"hangs for {runs.TRY_SECONDS:.0f} s"], ended.err
    problems = judge.ending_problems(fault, ended, directory, before, steps_then)
    problems += judge.checkpoint_problems(directory, prepared)
    problems += foreign.problems()
    if fault.what.startswith("tmpfs="):
        grow_disk(directory)
    if problems or ended.code != 0:
        failed = judge.recovery_problems(directory, prepared, work / "logs" / "after")
        problems += failed
        if failed:
            return problems, ended.err
    problems += judge.finished_problems(directory, prepared, foreign.names)
    problems += foreign.problems()
    return list(dict.fromkeys(problems)), ended.err


def in_small_disk(fault: Fault, prepared: Prepared, work: Path) -> tuple[list[str], str]:
    """In a process of its own, whose mount ends with it."""
    answer = work / "answer"
    directory = work / "run"
    directory.mkdir()
    child = os.fork()
    if not child:
        try:
            mount_small_disk(directory, int(fault.what.partition("=")[2]))
            problems, output = one_process(fault, prepared, work, directory)
            answer.write_text("\0".join([output, *problems]))
        except BaseException as error:
            answer.write_text(f"\0{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    output, *problems = answer.read_text().split("\0")
    return problems, output


def two_processes(fault: Fault, prepared: Prepared, work: Path) -> tuple[list[str], str]:
    """The second one is refused in a line, and the first one, which waited meanwhile, is undisturbed."""
    directory = work / "run"
    foreign = Foreign(directory, work / "outside")
    prepared.copy_to(directory)
    foreign.plant_early()
    reached, gone_on = os.pipe(), os.pipe()

    def wait() -> None:
        os.write(reached[1], b".")
        os.read(gone_on[0], 1)

    first = runs.start(
        command(directory, prepared.scenario.arguments),
        work / "logs",
        Injector(fault, directory, wait, foreign.plant_late),
    )
    os.close(reached[1])
    there = os.read(reached[0], 1)
    arguments = {
        "--resume": ("--resume", "RUN"),
        "--overwrite": (*prepared.scenario.arguments, "--overwrite"),
        "--new": prepared.scenario.arguments,
    }[fault.what]
    second = runs.run(command(directory, arguments), work / "logs" / "second")
    os.write(gone_on[1], b".")
    ended = runs.wait(first, work / "logs")
    for descriptor in (reached[0], *gone_on):
        os.close(descriptor)
    if not there:
        return ["never reached: not a try"], ended.err
    problems = []
    if second.code != 1 or "error: " not in second.err or "Traceback" in second.err:
        problems.append(f"the second process ended with {second.code}: {judge.last_line(second.err)}")
    if ended.code != 0:
        problems.append(f"the first process ended with {ended.code}: {judge.last_line(ended.err)}")
    problems += judge.checkpoint_problems(directory, prepared)
    problems += judge.finished_problems(directory, prepared, foreign.names)
    problems += foreign.problems()
    return problems, second.err


def all_tried(
    faults: Sequence[Fault], prepared: dict[str, Prepared], work: Path, jobs: int, deadline: float, tell: Callable
) -> None:
    """In `jobs` processes; those that the deadline leaves over are not begun."""
    workers = []
    for job in range(jobs):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            with os.fdopen(writer, "w") as file:
                for number, fault in enumerate(faults[job::jobs]):
                    if time.monotonic() > deadline:
                        break
                    result = attempt(fault, prepared[fault.scenario], work / f"try_{job}_{number}")
                    print(repr((str(fault), result.problems, result.seconds, result.output)), file=file, flush=True)
            os._exit(0)
        os.close(writer)
        workers.append((child, reader))
    collect(workers, tell)


def collect(workers: Sequence[tuple[int, int]], tell: Callable[[Result], None]) -> None:
    import ast
    import selectors

    with selectors.DefaultSelector() as waiting:
        for _, reader in workers:
            waiting.register(os.fdopen(reader), selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if not line:
                    waiting.unregister(key.fileobj)
                    continue
                text, problems, seconds, output = ast.literal_eval(line)
                tell(Result(Fault.read(text), problems, seconds, output))
    for child, _ in workers:
        os.waitpid(child, 0)


def table(results: Sequence[Result], possible: Counter[str], seed: int) -> str:
    lines = [f"{'kind':30} {'possible':>9} {'tried':>7} {'survived':>9}"]
    for kind in KINDS:
        these = [one for one in results if one.fault.kind == kind]
        survived = sum(one.survived for one in these)
        lines.append(f"{kind:30} {possible[kind]:9} {len(these):7} {survived:9}")
    survived = sum(one.survived for one in results)
    lines.append(f"{'all':30} {sum(possible.values()):9} {len(results):7} {survived:9}")
    return "\n".join([*lines, f"seed {seed}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "fault", nargs="*", help="As a failure names it; default: all, in an order that the seed makes."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="So many, of all kinds and functions, in forks.")
    parser.add_argument("--minutes", type=float, default=10.0, help="No fault is begun after this.")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kind", choices=KINDS, help="Only these.")
    parser.add_argument("--scenario", choices=[*SCENARIOS], help="Only this one.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    faults = [Fault.read(text) for text in chosen.fault]
    names = {fault.scenario for fault in faults} or {chosen.scenario} - {None}
    if not names:  # a program takes ten seconds
        names = {name for name, scenario in SCENARIOS.items() if chosen.sample is None or not scenario.whole}
    results: list[Result] = []

    def tell(result: Result) -> None:
        results.append(result)
        if result.problems or chosen.fault:
            print(f"{'failed' if result.problems else 'survived'}: {COMMAND} '{result.fault}'", flush=True)
            for problem in result.problems:
                print(f"    {problem}", flush=True)
            if chosen.fault:
                print(result.output)

    memory = Path("/dev/shm")  # where fsync costs nothing
    with tempfile.TemporaryDirectory(
        prefix="aepo_faults_", dir=memory if os.access(memory, os.W_OK) else None
    ) as folder:
        work = Path(folder)
        runs.warm_up(work)
        prepared = {name: runs.prepare(scenario, work) for name, scenario in SCENARIOS.items() if name in names}
        if not faults:
            faults = planned(prepared, work, chosen.seed)
        if chosen.kind:
            faults = [fault for fault in faults if fault.kind == chosen.kind]
        possible = Counter(fault.kind for fault in faults)
        ready = time.monotonic() - began
        all_tried(faults[: chosen.sample], prepared, work, chosen.jobs, began + 60 * chosen.minutes, tell)
    gc.unfreeze()
    print(table(results, possible, chosen.seed))
    took, processor = time.monotonic() - began, sum(os.times()[:4])  # with all forks
    print(f"{took:.0f} s, of which {ready:.0f} s before the first try; {processor:.0f} s of processor")
    return 0 if results and all(one.survived for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
