"""Everything that needs a GPU, in one call of under 9 minutes: build, kernel tests, benchmarks; JSON and a short table.

python -m benchmarks.gpu_session                     # results in the folder gpu of benchmarks/results/
python -m benchmarks.gpu_session --output /tmp/h100
python -m benchmarks.gpu_session --device cpu --quick   # the same code path without a GPU, a few small cases

It installs nothing and uses the Python that runs it, with whatever torch and triton that has. Every step is a process
of its own with its own time limit, and a step that fails, hangs or lacks a package never stops the later ones.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_LIMIT_S = 520.0
"""For all steps together, so that the call ends before 9 minutes have passed."""

# % of the speed of the bare reads, writes or matrix products in the same run: a forward at 92 % of the copy bandwidth,
# a loss at 90 % of read + read + write, a loss from hidden states in 1.15 times its products, decoding in 1.3 reads.
GOALS = {"token-stats": 92, "policy-loss": 90, "linear": 87, "decode": 77}

# Questions of `aepo bench` with their time limits: each is a step of its own, so that none costs another its numbers.
BENCH_LIMITS_S = {"token-stats": 60.0, "policy-loss": 70.0, "linear": 90.0, "decode": 50.0, "sample": 40.0}

MACHINE = "import json; from aepo.bench.clock import machine; print(json.dumps(machine({device!r})))"


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit_s: float
    needs: tuple[str, ...] = ()
    """Modules without which the step is skipped."""


@dataclasses.dataclass
class Outcome:
    step: str
    status: str
    """passed, failed, timed out or skipped."""
    seconds: float = 0.0
    limit_s: float = 0.0
    detail: str = ""
    """Why it was skipped; how many tests passed."""


def steps(device: str, quick: bool, output: Path) -> list[Step]:
    """What is to be done, in order. `quick` takes one test and one small benchmark."""
    python = [sys.executable, "-m"]  # -vv: one v for the -q of pyproject.toml, one for a line per test
    tests = ["tests/kernels", "--ignore=tests/kernels/test_gpu_session.py"]  # not itself, which would build again
    if quick:
        tests = ["tests/kernels/test_drop_in.py::test_shapes_and_values_of_trl_and_verl"]
    # Most of a test run on a GPU is Triton compiling on the host, one kernel after the other.
    processes = device == "cuda" and (os.cpu_count() or 1) >= 8 and _installed("xdist")
    spread = ["-n", "8", "--dist", "loadfile"] if processes else []
    questions = ["token-stats"] if quick else list(BENCH_LIMITS_S)
    small = ["--quick", "--tokens", "4", "--vocab", "1000"] if quick else []
    return [
        Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150),
        Step("machine", [sys.executable, "-c", MACHINE.format(device=device)], 30, ("torch",)),
        Step("tests", [*python, "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", *spread, *tests],
             240, ("pytest", "hypothesis")),
    ] + [
        Step(question, [*python, "aepo.cli", "bench", question, "--device", device, *small,
                        "--json", str(output / f"{question}.json")],
             BENCH_LIMITS_S[question], ("rich", "typer"))
        for question in questions
    ]  # fmt: skip


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(step: Step, limit_s: float, output: Path) -> Outcome:
    """Run one step with its output in <output>/<name>.log; all its processes end when it does."""
    absent = [module for module in step.needs if not _installed(module)]
    if absent:
        return Outcome(step.name, "skipped", detail=f"{sys.executable} has no {', '.join(absent)}")
    if limit_s < 1:
        return Outcome(step.name, "skipped", detail="no time left")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # or a step that is killed loses what it had to say
    start = time.monotonic()
    with (output / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            _end(process)
    return Outcome(step.name, status, time.monotonic() - start, limit_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the step's processes, its workers and compilers among them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        return
    process.wait()


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
            if row not in ours and row["computes"] == best["computes"] and row["percent_of_ceiling"] is not None
        ]
        peer = min(peers, key=lambda row: row["median_ms"], default=None)
        found.append(
            {
                "problem": problem,
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
        print(f"{'ms':>9} {'% of ceiling':>13} {'goal':>5}  {'fastest peer':>12}")
    for row in summary["headlines"]:
        goal = "" if row["goal_percent_of_ceiling"] is None else f"{row['goal_percent_of_ceiling']}"
        peer = "" if row["fastest_peer_ms"] is None else f"{row['fastest_peer_ms']:.3g} ms {row['fastest_peer']}"
        share = "" if row["percent_of_ceiling"] is None else f"{row['percent_of_ceiling']:.0f}"
        print(f"{row['median_ms']:9.3g} {share:>13} {goal:>5}  {row['problem']}" + (f"; {peer}" if peer else ""))


def session(device: str, quick: bool, output: Path) -> dict[str, Any]:
    """Do all steps; <output>/summary.json is complete after each of them."""
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    summary: dict[str, Any] = {"device": device, "quick": quick, "machine": None, "steps": [], "tests": {},
                               "failed_tests": [], "headlines": [], "seconds": 0.0}  # fmt: skip
    for question in BENCH_LIMITS_S:  # a step that fails must not show an earlier session's numbers
        (output / f"{question}.json").unlink(missing_ok=True)
    for step in steps(device, quick, output):
        print(f"{step.name}: {' '.join(step.command)[:150]}", flush=True)
        outcome = run(step, min(step.limit_s, TOTAL_LIMIT_S - (time.monotonic() - start)), output)
        log = output / f"{step.name}.log"
        text = log.read_text(encoding="utf-8", errors="replace") if outcome.status != "skipped" else ""
        if step.name == "machine" and outcome.status == "passed":
            summary["machine"] = json.loads(text.splitlines()[-1])
        if step.name == "tests":
            summary["tests"], summary["failed_tests"] = count_tests(text)
            outcome.detail = outcome.detail or ", ".join(f"{n} {name}" for name, n in summary["tests"].items())
        if step.name in BENCH_LIMITS_S and (bench := read_json(output / f"{step.name}.json")):
            summary["headlines"] += headlines(bench)
        if outcome.status in ("failed", "timed out") and not outcome.detail:
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
            outcome.detail = f"{last[:100]} (see {log.name})"
        summary["steps"].append(dataclasses.asdict(outcome))
        summary["seconds"] = time.monotonic() - start
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main() -> int:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu", metavar="FOLDER")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="one test and one small benchmark: does it all run?")
    args = parser.parse_args()
    summary = session(args.device, args.quick, args.output.resolve())
    print_summary(summary)
    return 0 if all(outcome["status"] == "passed" for outcome in summary["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
