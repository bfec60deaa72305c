"""Python, system, processor, memory and disk, and what this processor multiplies."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from aepo.doctor.finding import Finding

MIN_PYTHON = (3, 10)  # as in pyproject.toml
INSTRUCTION_SETS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
FREE_GIB = 2.0  # less memory or disk than this is reported: the demo stays below


def machine() -> Iterator[Finding]:
    """Python, system, processor, memory, disk."""
    version = platform.python_version()
    good = sys.version_info >= MIN_PYTHON
    needed = ".".join(map(str, MIN_PYTHON))
    yield Finding("machine", "python", "ok" if good else "broken", f"{version} (needs >= {needed})")
    yield Finding("machine", "system", "info", f"{platform.system()} {platform.release()}, {platform.machine()}")
    model, flags = _processor()
    sets = [name for name in INSTRUCTION_SETS if name in flags]
    yield Finding("machine", "processor", "info", f"{model}, {_cores()} cores, {' '.join(sets) or 'no SIMD known'}")
    for name, free, total in (("memory", *memory_gib()), ("disk", *_disk())):
        state: Literal["ok", "missing"] = "ok" if free >= FREE_GIB else "missing"
        yield Finding("machine", name, state, f"{free:.1f} of {total:.1f} GiB free (the demo needs {FREE_GIB:.0f})")


def products() -> Iterator[Finding]:
    """Whether matrix products in bfloat16, the usual dtype of a model, are worth having on this processor."""
    import torch

    from aepo.bench.rates import product_rate, slow_products

    narrow, wide = (product_rate(dtype) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    rates = f"{narrow:.3g} GFLOP/s in bfloat16, {wide:.3g} in float32 (one core)"
    if slow_products(torch.bfloat16):
        yield Finding("machine", "matrix products", "info", f"{rates}: train and compare in float32 here")
    else:
        yield Finding("machine", "matrix products", "ok", rates)


def _processor() -> tuple[str, set[str]]:
    """Model name and feature flags; Linux says both, elsewhere there are no flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.machine()), set(
        (fields.get("flags") or fields.get("Features", "")).split()
    )


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gib() -> tuple[float, float]:
    """Available and total memory [GiB]."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return kib["MemAvailable"] / 2**20, kib["MemTotal"] / 2**20
    except OSError:  # not Linux: what is free is not known, take all of it
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return total, total


def _disk() -> tuple[float, float]:
    """Free and total space of the working directory's disk [GiB]."""
    usage = shutil.disk_usage(".")
    return usage.free / 2**30, usage.total / 2**30
