"""What samples say about all answers and all questions: pass@k, and intervals that are resampled by question."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 4000
COVERAGE = 0.95
_BLOCK = 1 << 22  # numbers that one block of resampling holds


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """The chance that one of `k` answers succeeds, given that `successes` of `samples` did: 1 - C(n-c, k) / C(n, k).

    Unbiased, where 1 - (1 - c/n)^k is too high or too low. Whole numbers are divided once, so it is exact to the last
    bit for any n. ValueError: more than `samples` are asked for.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k}: expected 1 to {samples} (the number of samples)")
    if not 0 <= successes <= samples:
        raise ValueError(f"successes = {successes}: expected 0 to {samples} (the number of samples)")
    draws = math.comb(samples, k)
    return (draws - math.comb(samples - successes, k)) / draws


def interval(values: Sequence[float], seed: int) -> Interval | None:
    """Where the mean over all questions like these lies, with 95 %: percentiles of means over resampled questions.

    `values` has one number per question, the mean over its samples: those are alike, and do not count as more
    questions. None where resampling cannot tell: one question, or the same value everywhere.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    if len(distinct) < 2:
        return None
    total, draw = len(values), np.random.default_rng(seed)
    block = max(_BLOCK // len(distinct), 1)
    # How often each value comes in a draw with replacement: a multinomial, as large as the values are different.
    means = [
        draw.multinomial(total, counts / total, size=min(block, RESAMPLES - done)) @ distinct / total
        for done in range(0, RESAMPLES, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
