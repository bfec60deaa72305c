"""Time and memory of one call, on the CPU and on a CUDA device; and what a reader must know about the machine.

No GPU has run `CudaClock` yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from aepo_kernels import backend


class Clock(Protocol):
    """How one device is measured."""

    def seconds(self, run: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
        """Seconds per run(), mean of `repeats`; prepare() runs before each and is not counted."""
        ...

    def extra_memory(self, run: Callable[[], object]) -> int | None:
        """Bytes by which memory grows at its peak during run(); None where the system does not tell."""
        ...


class CpuClock:
    """Wall time. Memory is the peak of the resident set above where the call began."""

    def seconds(self, run: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            prepare()
            start = time.perf_counter()
            run()
            total += time.perf_counter() - start
        return total / repeats

    def extra_memory(self, run: Callable[[], object]) -> int | None:
        def status(field: str) -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

        def reset() -> int:
            ctypes.CDLL(None).malloc_trim(0)  # or memory that earlier calls freed would be taken again unseen
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            return status("VmRSS")

        before = None
        with contextlib.suppress(OSError, AttributeError):  # not Linux, not glibc, or not allowed
            before = reset()
        run()
        return None if before is None else max(0, status("VmHWM") - before)


class CudaClock:
    """Time between two CUDA events around each call, with a cold L2 cache. Memory is PyTorch's own account."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = max(2 * properties.L2_cache_size, 2**28)
        self._evict = torch.empty(size, dtype=torch.int8, device="cuda")

    def seconds(self, run: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
        events = []
        for _ in range(repeats):
            prepare()
            # Also keeps the device busy for the time that the launches of a short call take the host.
            self._evict.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / repeats

    def extra_memory(self, run: Callable[[], object]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def machine(device: str) -> dict[str, Any]:
    """Device, versions and commit."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), cpu)
    facts = {
        "device": device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": backend.missing("cpu") or torch.ops.aepo_native.cpu_capability(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def _commit() -> str | None:
    """Of the checkout that this file is tracked in; None for an installed package."""
    folder = str(Path(__file__).parent)
    if not _output("git", "-C", folder, "ls-files"):
        return None
    commit = _output("git", "-C", folder, "rev-parse", "--short", "HEAD")
    return f"{commit}+changes" if _output("git", "-C", folder, "status", "--porcelain", "-uno") else commit


def _output(*command: str) -> str | None:
    """First line that a program prints; None without the program, without output or after an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
