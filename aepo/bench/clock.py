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

    most_repeats: int
    """Of a short call within one round."""

    def seconds(self, run: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
        """Seconds per run(), mean of `repeats`; prepare() runs before each and is not counted."""
        ...

    def extra_memory(self, run: Callable[[], object]) -> int | None:
        """Bytes by which memory grows at its peak during run(); None where the system does not tell."""
        ...


class CpuClock:
    """Wall time. Memory is the peak of the resident set above where the call began."""

    most_repeats = 1000

    def seconds(self, run: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            prepare()
            start = time.perf_counter()
            run()
            total += time.perf_counter() - start
        return total / repeats

    def extra_memory(self, run: Callable[[], object]) -> int | None:
        before = forget_peak()
        run()
        return None if before is None else max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> int | None:
    """The peak begins anew; returns what is in memory now, None where the system does not tell."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux, not glibc, or not allowed
        ctypes.CDLL(None).malloc_trim(0)  # or memory that earlier calls freed would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        return resident("VmRSS")
    return None


SLEEP_CYCLES = (2_000_000, 6_000_000)
"""Of the device before a timed call: 1 to 3 ms at 2 GHz, the host's time to launch our losses (about 1 ms on a slow
CPU) twice over."""
CYCLES_PER_S = 2e9


class Gpu:
    """The current CUDA device, as the clock uses it."""

    def __init__(self) -> None:
        size = max(4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, 2**28)
        self._other = torch.ones(size // 4, device="cuda")

    def evict(self) -> None:
        """Fill the L2 cache with other numbers, by reading: written lines would go to memory during the timed call."""
        self._other.sum()

    def sleep(self, cycles: int) -> None:
        torch.cuda._sleep(cycles)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes; the peak starts anew here."""
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


class CudaClock:
    """Time between two CUDA events around each call, with a cold L2 cache. Memory is PyTorch's own account.

    The device sleeps before each call until the host has launched all of it, so that the host's time does not count: a
    call of 20 us takes the host 200 to prepare. A call that waits for the device by itself is not helped by that.
    """

    most_repeats = 20

    def __init__(self, gpu: Gpu | None = None) -> None:
        self._gpu = Gpu() if gpu is None else gpu

    def seconds(self, run: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
        shortest, longest = SLEEP_CYCLES
        cycles, events = longest, []  # until the host's time is known
        for _ in range(repeats):
            prepare()
            self._gpu.evict()
            self._gpu.sleep(cycles)
            start, end = self._gpu.event(), self._gpu.event()
            start.record()
            began = time.perf_counter()
            run()
            host_s = time.perf_counter() - began
            end.record()
            events.append((start, end))
            cycles = min(max(shortest, int(2 * host_s * CYCLES_PER_S)), longest)
        self._gpu.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3 / repeats

    def extra_memory(self, run: Callable[[], object]) -> int | None:
        self._gpu.synchronize()
        before = self._gpu.allocated()
        run()
        self._gpu.synchronize()
        return self._gpu.peak() - before


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
    """AEPO_COMMIT, for a copy without .git; else of the checkout that this file is tracked in; None for a package."""
    if given := os.environ.get("AEPO_COMMIT"):
        return given
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
