"""The two rules of branching as numbers: how many paths start fresh, and when one branches after its tool has answered.

Pure, so that rollouts, and an engine that decides by itself (aepo/vllm/decisions.py), have one rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchSettings:
    """The five numbers of the branch rule, and the two of the budget. ValueError naming a field that does not fit."""

    fresh_paths: int | None = None
    """Of the k paths, those that start from the question; None: entropy pre-monitoring says how many."""
    budget_beta: float = 1.0
    entropy_window: int = 20
    branch_alpha: float | Literal["uniform"] = "uniform"
    branch_gamma: float = 0.2
    branch_penalty: float = 0.05
    branch_threshold: float = 0.5

    def __post_init__(self) -> None:
        counts = ["entropy_window"] if self.fresh_paths is None else ["fresh_paths", "entropy_window"]
        for name in counts:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        numbers = ["budget_beta", "branch_gamma", "branch_penalty", "branch_threshold"]
        numbers += ["branch_alpha"] if self.branch_alpha != "uniform" else []
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                also = ", or 'uniform'" if name == "branch_alpha" else ""
                raise ValueError(f"{name} must be a finite number{also}; got {value!r}")
        if self.branch_penalty < 0:
            raise ValueError(f"branch_penalty must be at least 0; got {self.branch_penalty!r}")


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


def fresh_paths(paths: int, root_entropy: float, tool_entropies: Sequence[float], beta: float) -> int:
    """Entropy pre-monitoring: m = ceil(k sigmoid(beta (H_root - mean H_tool))), at least 1 and at most k, `paths`.

    Without a tool result there is no place to branch at, so all k paths start fresh.
    """
    if not tool_entropies:
        return paths
    tool_entropy = math.fsum(tool_entropies) / len(tool_entropies)
    return min(max(math.ceil(paths * _sigmoid(beta * (root_entropy - tool_entropy))), 1), paths)


def _sigmoid(x: float) -> float:
    """Without overflow at either end."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
