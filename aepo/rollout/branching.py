"""The two rules of a branched rollout, as pure functions: how many paths start fresh, and when a path branches.

AEPO (arXiv 2510.14545) has both. ARPO (2507.19849) is the same with a fixed number of fresh paths and no penalty, GRPO
is all paths fresh: settings of `RolloutConfig`, not other code. Entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aepo.config import RolloutConfig
from aepo.types import BranchDecision, BudgetDecision


def mean_entropy(entropies: Sequence[float], window: int) -> float:
    """Mean over the first `window` tokens of a segment, or over all of a shorter one."""
    first = entropies[:window]
    return math.fsum(first) / len(first)


def decide_budget(root_entropy: float, tool_entropies: Sequence[float], config: RolloutConfig) -> BudgetDecision:
    """Entropy pre-monitoring: m = ceil(k sigmoid(beta (H_root - mean H_tool))), at least 1 and at most k.

    A probe without a tool result shows no place to branch at, so all k paths start fresh.
    """
    if not tool_entropies:
        return BudgetDecision(root_entropy=root_entropy, tool_entropy=None, fresh_paths=config.paths)
    tool_entropy = math.fsum(tool_entropies) / len(tool_entropies)
    share = _sigmoid(config.budget_beta * (root_entropy - tool_entropy))
    fresh_paths = min(max(math.ceil(config.paths * share), 1), config.paths)
    return BudgetDecision(root_entropy=root_entropy, tool_entropy=tool_entropy, fresh_paths=fresh_paths)


def decide_branch(
    *,
    path: int,
    node: int,
    entropy: float,
    initial_entropy: float,
    log_vocabulary: float,
    uniform: float,
    consecutive: int,
    room: int,
    config: RolloutConfig,
) -> BranchDecision:
    """The branch rule at tool node `node`: P = (alpha + gamma dH) (1 - penalty(l)), branch where P > tau.

    `entropy` is that of the segment after the tool result, `initial_entropy` that of the path's first segment,
    dH = (entropy - initial_entropy) / log V. `uniform` in [0, 1) is alpha where the configuration draws it. l =
    `consecutive` counts the steps of this path just before this one that branched, without a gap. `room` is how
    many paths the question may still get.
    """
    delta = (entropy - initial_entropy) / log_vocabulary
    alpha = uniform if config.branch_alpha == "uniform" else float(config.branch_alpha)
    penalty = min(config.branch_penalty * consecutive, 1.0)
    probability = (alpha + config.branch_gamma * delta) * (1.0 - penalty)
    return BranchDecision(
        path=path,
        node=node,
        entropy=entropy,
        delta=delta,
        alpha=alpha,
        consecutive=consecutive,
        probability=probability,
        branched=probability > config.branch_threshold and room > 0,
    )


def _sigmoid(x: float) -> float:
    """Without overflow at either end."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
