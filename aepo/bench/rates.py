"""What this machine can do at best, measured once: bytes per second of memory, operations per second of products."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from aepo.bench.clock import CpuClock, clock_for

MEMORY_BYTES = {"cuda": 2_560_000_000, "cpu": 2**27}
"""Of each tensor read or copied: far more than any cache holds. Half of the logits [64, 151936] stay in the 50 MB of an
H100's L2 cache, where a copy is twice as fast as from memory."""

SLOW_PRODUCTS = 3.0
"""A dtype whose products are slower than float32's by more than this has no units of its own on this processor."""


class MemoryRates(NamedTuple):
    """Bytes per second."""

    copy: float
    """Of a copy, bytes read and bytes written both counted."""
    read: float
    """Of a sum."""


@functools.cache
def memory_rates(device: str) -> MemoryRates:
    size = MEMORY_BYTES[device]
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    clock = clock_for(device)

    def rate(run: Callable[[], object], moved: int) -> float:
        return moved / statistics.median(clock.seconds(run, lambda: None, 1) for _ in range(9))

    source.sum()
    target.copy_(source)
    return MemoryRates(rate(lambda: target.copy_(source), 2 * size), rate(source.sum, size))


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of PyTorch's products on one core of this processor, in the three layouts of a linear
    layer's training, which may be far apart.

    On one, because threads that wait for each other on a loaded machine take all dtypes to the same rate: with four
    busy programs beside, two threads made 2.7 GFLOP/s in float32 instead of 140, and bfloat16 looked as good.
    """
    rows, columns, hidden = 64, 1024, 512
    x, weight = torch.randn(rows, hidden).to(dtype), torch.randn(columns, hidden).to(dtype)
    grad, threads = torch.randn(rows, columns).to(dtype), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = [_best(run) for run in (lambda: x @ weight.T, lambda: grad @ weight, lambda: grad.T @ x)]
    finally:
        torch.set_num_threads(threads)
    return 3 * 2.0 * rows * columns * hidden / sum(taken)


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls."""
    clock, end = CpuClock(), time.monotonic() + 0.2
    found: list[float] = []
    while len(found) < 2 or (len(found) < 50 and time.monotonic() < end):
        found.append(clock.seconds(run, lambda: None, 1))
    return min(found)


def fastest_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype` or float32, whichever this processor multiplies faster."""
    return max((dtype, torch.float32), key=product_rate)


def slow_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies a dtype so slowly that nobody would train in it."""
    return SLOW_PRODUCTS * product_rate(dtype) < product_rate(torch.float32)
