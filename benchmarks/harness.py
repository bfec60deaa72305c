"""How all CPU benchmarks measure and report: gate, interleaved medians, ceilings, extra memory, table, JSON.

- Gate: every provider first runs a small instance of the problem and is compared with float64 truth; what fails gets no
  row. The largest error seen there is a column, because a fast wrong answer is easy.
- Time: all providers and the two memory ceilings run in turn, round after round, and each reports its median. Other
  load on the machine then falls on all of them alike, and ratios hold better than milliseconds do.
- Bytes: one number per problem, what an ideal implementation must move; so GB/s columns compare with each other.
- Memory: the peak of the resident set during one call above where it began, from the kernel's own high-water mark.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import aepo_kernels.backend

CONSOLE = Console(width=140)
GATE_TOLERANCE = 0.02
"""Largest error, relative to the largest true value, with which a provider is still timed. Wide enough for peers that
round every intermediate result to bfloat16; the error column tells them apart."""

PATIENCE_S = 15.0
"""A provider that has taken this long in the timed rounds of a problem sits out the rest, after two at least."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One shape of one question. `inputs` are passed to every provider."""

    name: str
    inputs: Any
    gate_inputs: Any
    """A small instance of the same shape in V."""
    truth: Sequence[Tensor]
    """What a provider has to return for `gate_inputs`, in float64."""
    ideal_bytes: int
    logits: Tensor
    """The tensor inside `inputs` whose size the memory column relates to."""
    restore: Callable[[Any], None] | None = None
    """Brings inputs back that a provider has overwritten; not timed."""


@dataclasses.dataclass(frozen=True)
class Provider:
    name: str
    run: Callable[[Any], Sequence[Tensor]]


@dataclasses.dataclass(frozen=True)
class Row:
    problem: str
    provider: str
    rounds: int
    median_ms: float
    gigabytes_per_second: float
    extra_share: float | None
    """Peak of the memory that the call took, / size of the logits; None where it cannot be measured."""
    max_error: float | None
    """At the gate; None for the ceilings."""


def arguments(description: str, epilog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, three rounds: does it run at all?")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--rounds", type=int, help="timed rounds per shape (default 7, quick 3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the logits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write machine and rows there")
    return parser


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""

    def git(*command: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), cpu)
    missing = aepo_kernels.backend.missing("cpu")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": missing or torch.ops.aepo_native.cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "load_average": round(os.getloadavg()[0], 1),
    }


def memory_ceilings(logits: Tensor) -> list[Provider]:
    """Read, and read and rewrite, a buffer of the logits' size: nothing that touches them all can be much faster."""
    columns = 1024
    rows = -(-logits.numel() * logits.element_size() // (4 * columns))
    buffer, vector = torch.zeros(rows, columns), torch.zeros(columns)
    bits = buffer.view(torch.int64)
    # Of all reductions that PyTorch has, the matrix-vector product came out as the fastest reader: 5.6 ms for 156 MB on
    # two threads, torch.dot 6.1, sum 6.9, amax 7.8 (2-core AVX-512 Xeon, Sapphire Rapids class VM).
    return [
        Provider("read the logits once (ceiling)", lambda _: (buffer @ vector,)),
        Provider("read and rewrite them in place (ceiling)", lambda _: (bits.bitwise_not_(),)),
    ]


def max_error(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest error of any output relative to its largest true value; infinite where it is NaN."""
    errors = [
        (output.double() - expected).abs().max() / expected.abs().max()
        for output, expected in zip(outputs, truth, strict=True)
    ]
    return torch.stack(errors).max().nan_to_num(torch.inf).item()


def extra_memory(run: Callable[[], Any]) -> int | None:
    """Bytes by which the resident set grows at its peak during run(), or None where the kernel does not tell."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # or memory that earlier calls freed would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status("VmRSS")
        run()
        return max(0, status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def measure(problem: Problem, providers: Sequence[Provider], rounds: int) -> list[Row]:
    """Gate, then time in turn. A provider whose answer is wrong is reported and gets no row."""
    errors: dict[Provider, float | None] = dict.fromkeys(memory_ceilings(problem.logits))
    for provider in providers:
        if problem.restore is not None:
            problem.restore(problem.gate_inputs)
        error = max_error(provider.run(problem.gate_inputs), problem.truth)
        if error > GATE_TOLERANCE:
            CONSOLE.print(f"{problem.name}: no row for {provider.name}, it is wrong by {error:.2g}", style="red")
        else:
            errors[provider] = error

    def seconds(provider: Provider, repeats: int = 1) -> float:
        if problem.restore is not None:
            problem.restore(problem.inputs)
        start = time.perf_counter()
        for _ in range(repeats):
            provider.run(problem.inputs)
        return (time.perf_counter() - start) / repeats

    repeats, memory = {}, {}
    for provider in errors:
        seconds(provider)  # compiles
        once: list[float] = []
        memory[provider] = extra_memory(lambda provider=provider, once=once: once.append(seconds(provider)))
        # Small problems are repeated to 5 ms, above the noise of the clock; an overwritten input cannot be.
        repeats[provider] = 1 if problem.restore else max(1, int(0.005 / once[0]))
    times: dict[Provider, list[float]] = {provider: [] for provider in errors}
    for _ in range(rounds):
        for provider, samples in times.items():
            if len(samples) < 2 or sum(samples) < PATIENCE_S:
                samples.append(seconds(provider, repeats[provider]))
    size = problem.logits.numel() * problem.logits.element_size()
    return [
        Row(
            problem=problem.name,
            provider=provider.name,
            rounds=len(samples),
            median_ms=statistics.median(samples) * 1e3,
            gigabytes_per_second=problem.ideal_bytes / statistics.median(samples) / 1e9,
            extra_share=None if memory[provider] is None else memory[provider] / size,
            max_error=errors[provider],
        )
        for provider, samples in times.items()
    ]


def table(rows: Sequence[Row], baseline: str) -> Table:
    """One problem's rows. Speed-ups are against the provider `baseline`, multiples against reading the logits once."""
    by_name = {row.provider: row for row in rows}
    read, slow = rows[0], by_name.get(baseline)
    result = Table(title=rows[0].problem, title_justify="left", title_style="bold")
    for column in ("", "ms", "GB/s", "x one read", f"faster than {baseline}", "extra memory / logits", "max error"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        result.add_row(
            row.provider,
            f"{row.median_ms:.3g}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.median_ms / read.median_ms:.2f}",
            f"{slow.median_ms / row.median_ms:.1f}x" if slow else "?",
            "?" if row.extra_share is None else f"{row.extra_share:.2%}",
            "" if row.max_error is None else f"{row.max_error:.0e}",
        )
    return result


def report(problems: Iterable[Problem], providers: Sequence[Provider], baseline: str, args: argparse.Namespace) -> None:
    """Measure all problems and print the tables; the last line of standard output is the same as JSON."""
    here = machine()
    CONSOLE.print(" | ".join(f"{key} {value}" for key, value in here.items()), style="dim")
    rows: list[Row] = []
    for problem in problems:
        measured = measure(problem, providers, args.rounds or (3 if args.quick else 7))
        CONSOLE.print(table(measured, baseline))
        rows += measured
    result = {"machine": here, "rows": [dataclasses.asdict(row) for row in rows]}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
