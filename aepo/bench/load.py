"""How many cores other programs, and other machines on the same host, kept busy meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

SHORTEST_S = 0.3
"""The system counts in ticks of 10 ms on each core, so that a shorter time is mostly rounding."""


class _Sample(NamedTuple):
    time_s: float
    busy_s: float
    """CPU time of all programs, this one included, and what the hypervisor gave to other machines."""
    own_s: float


def _sample() -> _Sample | None:
    """None where the system is not Linux."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, first[:8])
    busy = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
    return _Sample(time.monotonic(), busy, sum(os.times()[:4]))


class LoadMeter:
    """Counts from where it is made."""

    def __init__(self) -> None:
        self._start = _sample()

    def others_cores(self) -> float | None:
        """Mean number of cores that were busy with something else since; None where the system does not tell."""
        now = _sample()
        if now is None or self._start is None or now.time_s - self._start.time_s < SHORTEST_S:
            return None
        others = (now.busy_s - self._start.busy_s) - (now.own_s - self._start.own_s)
        return min(max(0.0, others / (now.time_s - self._start.time_s)), float(os.cpu_count() or 1))


def missing_cores(others_cores: float, threads: int) -> float:
    """How many of the cores that `threads` threads would keep busy were taken by others."""
    return max(0.0, others_cores + threads - (os.cpu_count() or 1))
