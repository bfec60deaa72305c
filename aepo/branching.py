"""The branch rule as numbers: where a path is less sure after its tool has answered than at its beginning, it branches.

Pure, so that a rollout and an engine that decides by itself (aepo/vllm/decisions.py) have one rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_entropy(entropies: Sequence[float], window: int) -> float:
    """Mean over the first `window` tokens of a segment, or over all of a shorter one."""
    first = entropies[:window]
    return math.fsum(first) / len(first)


def entropy_change(entropy: float, initial: float, log_vocabulary: float) -> float:
    """dH, in parts of the largest entropy there is: that of a uniform distribution, log V."""
    return (entropy - initial) / log_vocabulary


def branch_chance(change: float, *, alpha: float, gamma: float, penalty: float, consecutive: int) -> float:
    """P = (alpha + gamma dH) (1 - penalty l), the last factor not below 0; l places in a row have branched."""
    return (alpha + gamma * change) * (1.0 - min(penalty * consecutive, 1.0))
