"""The first minutes on a GPU, in one call of under 9 minutes: ceilings, kernels, losses, peers, tests, a sweep.

python -m benchmarks.gpu_session                # gpu_session.tar.gz and summary.json in $OUT or benchmarks/results/gpu
python -m benchmarks.gpu_session --second       # on the same machine: what did not pass, a profiler, a memory checker
python -m benchmarks.gpu_session --device cpu --quick   # the same code path without a GPU, a few small cases

It installs nothing and uses the Python that runs it, with whatever torch and triton that has. The extension is built in
the background from the first second; only what needs it waits. Every step is a process of its own with its own time
limit, and a step that fails, hangs or lacks a package never stops the others. Steps write into --work; all of it goes
into the archive after every step, so that whatever ends the call, a signal included, leaves what was measured.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
TOTAL_LIMIT_S = 530.0
"""For everything, so that the call ends before 9 minutes have passed."""
PACKING_S = 10.0
"""Of these, for ending the last step and packing."""
BUILD_LIMIT_S = 200.0
LOG_BYTES = 2**20
"""Of each log the archive has the end."""

# % of the ceiling of the same run, the bytes at the measured copy rate or the bare products: docs/gpu.md.
GOALS = {"token-stats": 95, "gradient": 95, "policy-loss": 92, "linear": 93, "decode": 71}


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit_s: float
    needs: tuple[str, ...] = ()
    """Modules without which the step is skipped."""
    tools: tuple[str, ...] = ()
    """Programs, likewise."""
    after_build: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    step: str
    status: str
    """passed, failed, timed out, skipped or stopped."""
    seconds: float = 0.0
    limit_s: float = 0.0
    detail: str = ""
    """Why it was skipped; how many tests passed; the last line of a log."""


def build() -> Step:
    """The extension; where its CUDA kernels do not compile the rest of it, which is a failure all the same."""
    once = f"{shlex.quote(sys.executable)} setup.py build_ext --inplace"
    script = f"{once} || {{ AEPO_CUDA=0 {once} && echo built without CUDA kernels; exit 1; }}"
    return Step("build", ["bash", "-c", script], BUILD_LIMIT_S)


def steps(device: str, quick: bool, work: Path) -> list[Step]:
    """What is to be done, in the order of its worth. Limits and packing together stay within TOTAL_LIMIT_S."""

    def stage(name: str, limit_s: float, after_build: bool = False) -> Step:
        return Step(name, [*stages(device, quick), name, "--json", str(work / f"{name}.json")], limit_s, ("torch",),
                    after_build=after_build)  # fmt: skip

    return [
        Step("env", [*stages(device, quick), "environment"], 20, ("torch",)),
        stage("ceilings", 45),
        stage("kernels", 90, after_build=True),
        stage("losses", 85),
        stage("peers", 70),
        tests(device, quick),
        stage("sweep", 50),
    ]


def stages(device: str, quick: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_stages", "--device", device, *(["--quick"] if quick else [])]


def tests(device: str, quick: bool) -> Step:
    """On a GPU the tests of its kernels alone: what a CPU can show has been shown."""
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]  # -q is in pyproject.toml
    cores = os.cpu_count() or 1
    if device == "cuda":
        if _installed("xdist") and cores >= 4:  # most of the time Triton compiles on the host
            command += ["-n", str(min(12, cores)), "--dist", "worksteal"]
        command += ["--gpu", "tests/kernels"]
    elif quick:
        command += ["tests/kernels/test_drop_in.py::test_shapes_and_values_of_trl_and_verl"]
    else:  # but this session's own, which would build again
        command += ["tests/kernels", "--ignore=tests/kernels/test_gpu_session.py"]
    return Step("tests", command, 150, ("pytest", "hypothesis"), after_build=True)


PROFILE = ["ncu", "--clock-control", "none", "--target-processes", "all", "-c", "16",
           "-k", "regex:token_stats|logits_grad|decode_entropy|sample",
           *(word for name in ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "LaunchStats")
             for word in ("--section", name))]  # fmt: skip
CHECK = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]


def second_steps(device: str, quick: bool, work: Path, first: dict[str, Any] | None) -> list[Step]:
    """What did not pass before, on the machine that is still warm; then what takes a profiler and a memory checker."""
    if first is not None and (first.get("device"), first.get("quick")) != (device, quick):
        first = None  # a rehearsal elsewhere
    passed = {outcome["step"] for outcome in (first or {}).get("steps", []) if outcome["status"] == "passed"}
    again = [] if first is None else [step for step in steps(device, quick, work) if step.name not in passed]
    gpu = device == "cuda"  # elsewhere the calls are made without the tools
    return [
        *again,
        Step("profile", [*(PROFILE if gpu else []), *stages(device, quick), "profiled"], 100, ("torch",),
             tools=("ncu",) if gpu else (), after_build=True),
        Step("memcheck", [*(CHECK if gpu else []), *stages(device, quick), "odd"], 150, ("torch",),
             tools=("compute-sanitizer",) if gpu else (), after_build=True,
             environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    ]  # fmt: skip


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def absent(step: Step) -> str | None:
    """Why a step cannot be done here."""
    modules = [module for module in step.needs if not _installed(module)]
    if modules:
        return f"{sys.executable} has no {', '.join(modules)}"
    tools = [tool for tool in step.tools if shutil.which(tool, path=_path()) is None]
    return f"no {', '.join(tools)} here" if tools else None


def _path() -> str:
    """Of programs: CUDA's are often not on it."""
    return f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}:/usr/local/cuda/bin"


class Running:
    """A step's process, with its output in <work>/<name>.log."""

    def __init__(self, step: Step, work: Path) -> None:
        # Unbuffered, or a step that is killed loses what it had to say.
        name = f"{os.getpid()}/{step.name}"
        environment = {
            **os.environ, "PYTHONUNBUFFERED": "1", "PATH": _path(), "AEPO_GPU_SESSION_STEP": name, **step.environment
        }  # fmt: skip
        self._name = f"AEPO_GPU_SESSION_STEP={name}".encode()
        self.step, self._start = step, time.monotonic()
        with (work / f"{step.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        return self._process.poll() is not None

    def finish(self, limit_s: float) -> Outcome:
        """Wait until it ends or `limit_s` have passed since it began; nothing of it is left then."""
        try:
            left_s = self._start + limit_s - time.monotonic()
            status = "passed" if self._process.wait(max(0.01, left_s)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            self.end()
        return Outcome(self.step.name, status, time.monotonic() - self._start, limit_s)

    def end(self) -> None:
        """Kill what is left of the step's processes: workers, compilers, and those that left its group but carry its
        name in their environment."""
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is somebody else's
                if self._name in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds may never end
            self._process.wait(3)


class Stopped(BaseException):
    """A signal asked for the end."""


MARK = ".gpu_session"
"""In a working folder: what is there was written by a session, and the next one may remove it."""


def claim(work: Path) -> TextIO:
    """Empty a working folder, or make it. ValueError if it holds anything but an earlier session's files, or if another
    session is running there, which lasts as long as somebody has the file that is returned."""
    if work.exists() and not (work / MARK).exists() and (not work.is_dir() or any(work.iterdir())):
        raise ValueError(f"--work must be a new or empty folder, or that of an earlier session; got {work}")
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f".{work.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"another session is running in --work {work}") from None
    shutil.rmtree(work, ignore_errors=True)  # or an earlier session's numbers would be taken for this one's
    work.mkdir()
    (work / MARK).touch()
    return lock


class Session:
    """Does steps and keeps the summary and the archive up to date."""

    def __init__(self, device: str, quick: bool, work: Path, output: Path, name: str = "gpu_session") -> None:
        self._start = time.monotonic()
        if output == work or work in output.parents:
            raise ValueError(f"--output must not be inside --work, which is emptied; got {output} in {work}")
        self.work, self.output, self.name = work, output, name
        self.summary: dict[str, Any] = {
            "device": device, "quick": quick, "machine": None, "steps": [], "tests": {}, "failed_tests": [],
            "headlines": [], "seconds": 0.0,
        }  # fmt: skip
        self._built, self._after_build = False, set[str]()
        self.problem = ""
        """Why the output folder does not have the last state, if it has not."""
        output.mkdir(parents=True, exist_ok=True)
        self._lock = claim(work)
        archive = output / f"{name}.tar.gz"
        if archive.exists():  # by accident, perhaps: those may be the numbers of a GPU that is gone
            archive.replace(output / f"{name}.before.tar.gz")

    def left_s(self) -> float:
        return TOTAL_LIMIT_S - PACKING_S - (time.monotonic() - self._start)

    def run(self, builder: Step, todo: Sequence[Step]) -> None:
        """Do all steps, those that need the build when it has ended; whatever happens, the archive is made."""
        waiting = list(todo)
        running = building = None
        reason = "nothing waited for it any more"
        self._after_build = {step.name for step in todo if step.after_build}
        try:
            building = Running(builder, self.work)
            while waiting:
                if building is not None and building.ended():
                    self._keep(building.finish(builder.limit_s))
                    building = None
                step = next((one for one in waiting if building is None or not one.after_build), None)
                if step is None:
                    assert building is not None
                    self._keep(building.finish(min(builder.limit_s, TOTAL_LIMIT_S - PACKING_S)))
                    building = None
                    continue
                waiting.remove(step)
                limit_s = min(step.limit_s, self.left_s())
                if hindrance := absent(step) or ("no time left" if limit_s < 1 else None):
                    self._keep(Outcome(step.name, "skipped", detail=hindrance))
                    continue
                print(f"{step.name}: {' '.join(step.command)[:150]}", flush=True)
                try:
                    running = Running(step, self.work)
                except OSError as error:  # no room for its log, say
                    self._keep(Outcome(step.name, "failed", detail=str(error)))
                    continue
                self._keep(running.finish(limit_s))
                running = None
        except BaseException as error:
            reason = str(error) or type(error).__name__
            if not isinstance(error, Stopped):
                raise
        finally:
            with _no_signals():
                cut = [process for process in (running, building) if process is not None]
                for process in cut:
                    process.end()
                for step in [*(process.step for process in cut), *waiting]:
                    self._keep(Outcome(step.name, "stopped", detail=reason))

    def _keep(self, outcome: Outcome) -> None:
        """Add what a step came to, and what it measured."""
        log = self.work / f"{outcome.step}.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        if outcome.step == "env":
            self.summary["machine"] = last_json(lines)
        if outcome.step == "tests":
            self.summary["tests"], self.summary["failed_tests"] = count_tests(text)
            outcome.detail = outcome.detail or ", ".join(f"{n} {name}" for name, n in self.summary["tests"].items())
        measured = read_json(self.work / f"{outcome.step}.json")
        if isinstance(measured, dict) and "rows" in measured:
            self.summary["headlines"] += headlines(measured)
        if outcome.status in ("failed", "timed out") and not outcome.detail:
            telling = [line for line in lines if re.search(r"fatal|error:|cannot", line, re.I)] or lines[-1:]
            outcome.detail = f"{telling[0].strip()[:100] if telling else ''} (see {log.name})"
        if outcome.step == "build":
            self._built = outcome.status == "passed"
        elif outcome.step in self._after_build and not self._built and outcome.status != "skipped":
            outcome.detail = f"with what an earlier build left; {outcome.detail}"
        self.summary["steps"].append(dataclasses.asdict(outcome))
        self._write()

    def _write(self) -> None:
        self.summary["seconds"] = time.monotonic() - self._start
        text = json.dumps(self.summary, indent=1) + "\n"
        self.problem = ""
        try:
            for folder in (self.work, self.output):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "summary.json").write_text(text, encoding="utf-8")
            pack(self.work, self.output / f"{self.name}.tar.gz")
        except OSError as error:  # a full disk may have room again after the next step
            self.problem = f"cannot write the results: {error}"
            print(self.problem, flush=True)


@contextlib.contextmanager
def _no_signals() -> Any:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"stopped by {signal.Signals(number).name}")


def pack(folder: Path, archive: Path) -> None:
    """Everything in a folder as one .tar.gz, of logs the end; a reader sees the old archive or the new one."""
    new = archive.with_name(f".{archive.name}.new")
    with tarfile.open(new, "w:gz", compresslevel=6) as tar:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.name == MARK:
                continue
            data = path.read_bytes()
            if path.suffix == ".log":
                data = data[-LOG_BYTES:]
            entry = tarfile.TarInfo(f"{archive.name.partition('.')[0]}/{path.relative_to(folder)}")
            entry.size, entry.mtime = len(data), path.stat().st_mtime
            tar.addfile(entry, io.BytesIO(data))
    new.replace(archive)


def last_json(lines: Sequence[str]) -> dict[str, Any] | None:
    """The last line that is a JSON object: libraries may print behind it."""
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(line), dict):
                return found
    return None


def count_tests(log: str) -> tuple[dict[str, int], list[str]]:
    """({passed: n, failed: n, ..}, the failed tests) from pytest's verbose output, also of a run that was cut short."""
    # "a.py::b[c] PASSED [ 1%]", or under xdist "[gw0] [ 1%] PASSED a.py::b[c]".
    status = "(PASSED|FAILED|ERROR|SKIPPED)"
    line = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] {status} (\S.*?)|(\S+::.*?) {status}\b.*)\s*$", re.M)
    found = [(a or d, (b or c).strip()) for a, b, c, d in line.findall(log)]
    counts = collections.Counter(status.lower() for status, _ in found)
    return dict(counts), [name for status, name in found if status in ("FAILED", "ERROR")]


def headlines(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """For every problem the fastest of our rows, the goal, and the fastest peer that computes the same."""
    found = []
    problems: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in bench["rows"]:
        problems[row["problem"]].append(row)
    for problem, rows in problems.items():
        ours = [row for row in rows if row["provider"].startswith("aepo_kernels")]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["median_ms"])
        peers = [
            row
            for row in rows
            if row not in ours and row["computes"] == best["computes"] and row["max_error"] is not None  # no ceiling
        ]
        peer = min(peers, key=lambda row: row["median_ms"], default=None)
        found.append(
            {
                "problem": problem,
                "provider": best["provider"],
                "median_ms": best["median_ms"],
                "percent_of_ceiling": best["percent_of_ceiling"],
                "goal_percent_of_ceiling": GOALS.get(best["question"]),
                "fastest_peer": None if peer is None else peer["provider"],
                "fastest_peer_ms": None if peer is None else peer["median_ms"],
            }
        )
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if a step did not get to write it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def print_summary(summary: dict[str, Any]) -> None:
    machine = summary["machine"] or {}
    print("\n" + " | ".join(f"{key} {value}" for key, value in machine.items()))
    for name in summary["failed_tests"][:20]:
        print(f"FAILED {name}")
    print(f"\n{'step':12} {'status':10} {'seconds':>8}")
    for outcome in summary["steps"]:
        print(f"{outcome['step']:12} {outcome['status']:10} {outcome['seconds']:8.0f}  {outcome['detail']}")
    print(f"{'total':23} {summary['seconds']:8.0f}\n")
    if summary["headlines"]:
        print(f"{'ms':>9} {'% of ceiling':>13} {'goal':>5}")
    for row in summary["headlines"]:
        goal = "" if row["goal_percent_of_ceiling"] is None else f"{row['goal_percent_of_ceiling']}"
        peer = "" if row["fastest_peer_ms"] is None else f"{row['fastest_peer_ms']:.3g} ms {row['fastest_peer']}"
        share = "" if row["percent_of_ceiling"] is None else f"{row['percent_of_ceiling']:.0f}"
        print(f"{row['median_ms']:9.3g} {share:>13} {goal:>5}  {row['problem']}: {row['provider']}"
              + (f"; fastest peer {peer}" if peer else ""))  # fmt: skip


def main() -> int:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    output = os.environ.get("OUT") or ROOT / "benchmarks/results/gpu"
    parser.add_argument("--output", type=Path, default=output, metavar="FOLDER", help="gets the archive and a summary")
    parser.add_argument("--work", type=Path, default=ROOT / "build/gpu_session", metavar="FOLDER",
                        help="where the steps write; --second looks there for what did not pass")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one test and small cases: does it all run?")
    parser.add_argument("--second", action="store_true", help="what did not pass, a profiler, a memory checker")
    args = parser.parse_args()
    work = args.work.resolve()
    for number in SIGNALS:
        signal.signal(number, _stop)
    if args.second:
        first, work = read_json(work / "summary.json"), work.with_name(f"{work.name}_second")
        todo: Callable[..., list[Step]] = lambda *scale: second_steps(*scale, first)  # noqa: E731
    else:
        todo = steps
    name = "gpu_session_second" if args.second else "gpu_session"
    try:
        session = Session(args.device, args.quick, work, args.output.resolve(), name)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    session.run(build(), todo(args.device, args.quick, work))
    print_summary(session.summary)
    if session.problem:
        print(f"{session.problem}; what was measured lies in {work}")
        return 1
    print(f"\n{session.output / name}.tar.gz")
    return 0 if all(outcome["status"] == "passed" for outcome in session.summary["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
