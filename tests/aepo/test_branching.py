"""The budget rule and the branch rule against numbers worked out by hand, and the draws they rest on."""

from __future__ import annotations

import math
import re

import pytest

from aepo.agents.protocol import AgentError
from aepo.config import RolloutConfig
from aepo.rollout.branching import BranchPoint, branch_rule, decide_branch, decide_budget, mean_entropy
from aepo.rollout.seeding import derive_seed, derive_uniform


@pytest.mark.parametrize(
    ("root", "tools", "beta", "fresh_paths"),
    [
        (1.0, [1.0], 1.0, 4),  # sigmoid(0) = 1/2
        (1.0, [0.5, 1.5], 1.0, 4),  # the mean of the tool entropies counts
        (math.log(3), [0.0], 1.0, 6),  # sigmoid(ln 3) = 3/4
        (0.0, [math.log(3)], 1.0, 2),  # 1/4
        (0.0, [0.5 * math.log(3)], 2.0, 2),
        (1.01, [1.0], 1.0, 5),  # 4.02 is rounded up
        (0.0, [5.0], 1.0, 1),  # 0.05: at least one
        (0.0, [1e6], 1.0, 1),  # exp must not overflow
        (1e6, [0.0], 1.0, 8),
    ],
)
def test_budget(root: float, tools: list[float], beta: float, fresh_paths: int) -> None:
    decision = decide_budget(root, tools, RolloutConfig(paths=8, budget_beta=beta))
    assert decision.fresh_paths == fresh_paths
    assert decision.root_entropy == root
    assert decision.tool_entropy == sum(tools) / len(tools)


def test_budget_without_a_tool_call_is_all_fresh() -> None:
    decision = decide_budget(0.3, [], RolloutConfig(paths=8))
    assert (decision.fresh_paths, decision.tool_entropy) == (8, None)


def decide(uniform: float = 0.9, consecutive: int = 0, room: int = 1, entropy: float = 2.0, **changes: float):
    return decide_branch(3, 7, point(uniform, consecutive, room, entropy), RolloutConfig(branch_gamma=0.2, **changes))


def point(uniform: float = 0.9, consecutive: int = 0, room: int = 1, entropy: float = 2.0) -> BranchPoint:
    return BranchPoint(
        entropies=(entropy, entropy),
        logprobs=(-0.5, -1.5),
        initial_entropy=1.0,
        log_vocabulary=4.0,
        uniform=uniform,
        consecutive=consecutive,
        room=room,
        step=2,
    )


@pytest.mark.parametrize(
    ("alpha", "entropy", "consecutive", "penalty", "probability"),
    [
        (0.5, 2.0, 0, 0.05, 0.55),  # 0.5 + 0.2 * (2 - 1) / 4
        (0.5, 0.0, 0, 0.05, 0.45),  # a fall in entropy lowers the chance
        (0.5, 2.0, 3, 0.05, 0.55 * 0.85),
        (0.5, 2.0, 20, 0.05, 0.0),
        (0.5, 2.0, 50, 0.05, 0.0),  # the penalty stops at 1: the sign must not turn
        (0.5, 2.0, 3, 0.0, 0.55),  # ARPO
    ],
)
def test_branch_probability(alpha: float, entropy: float, consecutive: int, penalty: float, probability: float) -> None:
    decision = decide(entropy=entropy, consecutive=consecutive, branch_alpha=alpha, branch_penalty=penalty)
    assert decision.probability == pytest.approx(probability, abs=1e-15)
    assert decision.delta == (entropy - 1.0) / 4.0
    assert decision.branched == (probability > 0.5)
    assert (decision.path, decision.node, decision.alpha, decision.consecutive) == (3, 7, alpha, consecutive)


def test_uniform_alpha_is_the_draw() -> None:
    assert decide(uniform=0.25).alpha == 0.25
    assert decide(uniform=0.25, branch_alpha=0.75).alpha == 0.75


def test_branches_above_the_threshold_and_only_with_room() -> None:
    assert not decide(branch_alpha=0.5, entropy=1.0).branched  # exactly tau
    assert decide(branch_alpha=0.5, entropy=1.0, branch_threshold=0.49).branched
    full = decide(branch_alpha=0.9, room=0)
    assert full.probability > 0.5
    assert not full.branched


def surprise(point: BranchPoint) -> float:
    """A rule of one's own: the mean negative log-prob."""
    return -math.fsum(point.logprobs) / len(point.logprobs)


def test_a_rule_of_ones_own_takes_the_place_of_the_formula() -> None:
    rule = branch_rule(RolloutConfig(branch_rule="test_branching:surprise"))
    decision = decide_branch(3, 7, point(), RolloutConfig(branch_threshold=0.9), rule)
    assert (decision.probability, decision.branched, decision.entropy) == (1.0, True, 2.0)
    assert not decide_branch(3, 7, point(), RolloutConfig(branch_threshold=1.0), rule).branched
    assert not decide_branch(3, 7, point(room=0), RolloutConfig(branch_threshold=0.9), rule).branched
    assert branch_rule(RolloutConfig()) is None


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lambda point: math.nan, "returned nan: expected a finite number"),
        (lambda point: None, "failed: TypeError"),
        (lambda point: exit(0), "failed: SystemExit: 0"),
        (lambda point: point.entropy, "AttributeError: 'BranchPoint' object has no attribute 'entropy'"),
    ],
)
def test_a_rule_that_fails_is_named(rule, text: str) -> None:
    with pytest.raises(AgentError, match="rollout.branch_rule: .*" + re.escape(text)):
        decide_branch(3, 7, point(), RolloutConfig(), rule)


def test_mean_entropy_is_a_mean_over_the_window() -> None:
    assert mean_entropy([1.0, 2.0, 3.0, 100.0], 3) == 2.0
    assert mean_entropy([1.0, 2.0], 20) == 1.5


def test_draws_depend_on_every_part_and_are_uniform() -> None:
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    different = [(1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a2"), ("1", "a", 2), (1, "a", 2, 0)]
    assert len({derive_seed(*parts) for parts in different}) == len(different)
    assert all(0 <= derive_seed(*parts) < 2**64 for parts in different)
    draws = sorted(derive_uniform(0, "alpha", i) for i in range(2000))
    assert 0 <= draws[0] < draws[-1] < 1
    # Kolmogorov-Smirnov distance; 1.63 / sqrt(n) is its 99% point, and these draws never change.
    assert max(abs(draw - i / 2000) for i, draw in enumerate(draws)) < 1.63 / math.sqrt(2000)
