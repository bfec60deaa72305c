"""The two rules of a branched rollout, as pure functions: how many paths start fresh, and when a path branches.

AEPO (arXiv 2510.14545) has both. ARPO (2507.19849) is the same with a fixed number of fresh paths and no penalty, GRPO
is all paths fresh: settings of `RolloutConfig`, not other code. Entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aepo.agents.protocol import AgentError, blamed
from aepo.branching import branch_chance, entropy_change, fresh_paths, mean_entropy
from aepo.config import RolloutConfig
from aepo.registry import resolve_function
from aepo.types import BranchDecision, BudgetDecision


def decide_budget(root_entropy: float, tool_entropies: Sequence[float], config: RolloutConfig) -> BudgetDecision:
    """Entropy pre-monitoring (`aepo.branching.fresh_paths`), with the numbers that it went by."""
    return BudgetDecision(
        root_entropy=root_entropy,
        tool_entropy=math.fsum(tool_entropies) / len(tool_entropies) if tool_entropies else None,
        fresh_paths=fresh_paths(config.paths, root_entropy, tool_entropies, config.budget_beta),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchPoint:
    """A place where a path may branch: what the rule is asked about. Entropies and log-probs are in nats."""

    entropies: tuple[float, ...]
    """Of the tokens of the segment after the tool results."""
    logprobs: tuple[float, ...]
    """Of the same tokens."""
    initial_entropy: float
    """Mean over the first tokens of the path."""
    log_vocabulary: float
    """log V: the entropy of a uniform distribution."""
    uniform: float
    """Drawn from [0, 1) for this place."""
    consecutive: int
    """Places of this path just before this one that branched, without a gap."""
    room: int
    """Paths that the question may still get."""
    step: int
    """Tool turns of the path up to here."""


BranchRule = Callable[[BranchPoint], float]
"""A chance; a path branches where it is above `rollout.branch_threshold`."""


def branch_rule(config: RolloutConfig) -> BranchRule | None:
    """The rule of the user's own, `rollout.branch_rule`. ValueError: there is no such function."""
    if config.branch_rule is None:
        return None
    return resolve_function(config.branch_rule, "rollout.branch_rule", "point")


def decide_branch(
    path: int, node: int, point: BranchPoint, config: RolloutConfig, rule: BranchRule | None = None
) -> BranchDecision:
    """The branch rule at tool node `node`: P = (alpha + gamma dH) (1 - penalty(l)), branch where P > tau.

    dH = (entropy after the tool - initial entropy) / log V, alpha a constant or the place's uniform draw, l the places
    in a row that branched. A `rule` gives P in place of this formula. AgentError: it raised, or gave no finite number.
    """
    entropy = mean_entropy(point.entropies, config.entropy_window)
    delta = entropy_change(entropy, point.initial_entropy, point.log_vocabulary)
    alpha = point.uniform if config.branch_alpha == "uniform" else float(config.branch_alpha)
    if rule is None:
        probability = branch_chance(
            delta,
            alpha=alpha,
            gamma=config.branch_gamma,
            penalty=config.branch_penalty,
            consecutive=point.consecutive,
        )
    else:
        probability = _chance(rule, point)
    return BranchDecision(
        path=path,
        node=node,
        entropy=entropy,
        delta=delta,
        alpha=alpha,
        consecutive=point.consecutive,
        probability=probability,
        branched=probability > config.branch_threshold and point.room > 0,
    )


def _chance(rule: BranchRule, point: BranchPoint) -> float:
    name = getattr(rule, "__qualname__", repr(rule))
    with blamed(f"rollout.branch_rule: {name}", rule):
        chance = rule(point)
        number = float(chance)
    if not math.isfinite(number):
        raise AgentError(f"rollout.branch_rule: {name} returned {chance!r}: expected a finite number")
    return number
