"""Advantages, compared with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from trainer_toys import scored, trajectory

from aepo.advantages import (
    AdvantageSettings,
    advantage_settings,
    all_equal,
    make_samples,
    overlong_penalty,
    step_advantages,
)
from aepo.agents.protocol import AgentError
from aepo.config import PolicyConfig

PROMPT = (1, 2, 3)


def path_advantages(groups: list[list[float]], **settings: Any) -> list[list[float]]:
    """Advantages of paths with these rewards, each path of one written token."""
    paths = [[trajectory(PROMPT, ((10 + j,), ())) for j in range(len(rewards))] for rewards in groups]
    result: list[list[float]] = [[] for _ in groups]
    for sample in make_samples(scored(paths, groups), AdvantageSettings(**settings), 100):
        result[sample.question].append(sample.advantages[-1])
    return result


def test_group() -> None:
    # Rewards 1, 0, 0, 0: mean 0.25, unbiased variance (0.75^2 + 3 * 0.25^2) / 3 = 0.25; 3 alone has no difference.
    assert path_advantages([[1.0, 0.0, 0.0, 0.0], [3.0], [0.0, 1.0, 0.0, 0.0]]) == [
        pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-15),
        [0.0],
        pytest.approx([-0.5, 1.5, -0.5, -0.5], abs=1e-15),
    ]


@pytest.mark.parametrize(
    "rewards", [[0.7], [0.1] * 3, [0.1 + 0.2, 0.3, 0.3, 0.3], [-1e300] * 4, [1.0 - 0.9 - 0.1, 0.0]]
)
def test_rounding_is_no_difference(rewards: list[float]) -> None:
    assert all_equal(rewards)
    group = [trajectory(PROMPT, ((10 + j,), ())) for j in range(len(rewards))]
    assert step_advantages(group, rewards, 1.0) == [[0.0]] * len(rewards)
    for kind in ("group", "batch", "gigpo"):
        assert path_advantages([rewards], kind=kind) == [[0.0] * len(rewards)]
        assert path_advantages([rewards], kind=kind, drop_equal_groups=True) == [[]]


def test_real_differences_are_told_apart() -> None:
    assert all_equal([])
    assert not all_equal([1.0, 1.0 - 1e-6])
    assert not all_equal([1e-11, 0.0])


def test_batch() -> None:
    # Rewards 1, 0 | 1, 1, 2: mean 1, unbiased variance 2/4.
    root = math.sqrt(2.0)
    assert path_advantages([[1.0, 0.0], [1.0, 1.0, 2.0]], kind="batch") == [
        pytest.approx([0.0, -root]),
        pytest.approx([0.0, 0.0, root]),
    ]
    assert path_advantages([[1.0], [1.0]], kind="batch") == [[0.0], [0.0]]


def test_steps_are_grouped_by_equal_anchor_state() -> None:
    # Both paths search from the prompt (anchor PROMPT) and read the same result 7 8 (anchor (7, 8)); path 0 answers at
    # step 1; path 1 makes another call, reads 9, and answers at step 2 from an anchor of its own.
    short = trajectory(PROMPT, ((10,), (7, 8)), ((11, 12), ()))
    long = trajectory(PROMPT, ((13,), (7, 8)), ((14,), (9,)), ((15,), ()))
    got = step_advantages([short, long], [1.0, 0.5], discount=0.5)
    # Anchor PROMPT: returns 0.5 * 1 and 0.25 * 0.5; anchor (7, 8): 1 and 0.5 * 0.5. Two values always give +-1/sqrt(2).
    half = 1 / math.sqrt(2)
    assert got == [pytest.approx([half, half]), pytest.approx([-half, -half, 0.0])]


def test_step_groups_compare_discounted_returns() -> None:
    # Three paths from one anchor with equal rewards: only their lengths 1, 2, 2 differ, so returns are 1, 0.5, 0.5.
    one = trajectory(PROMPT, ((10,), ()))
    two = trajectory(PROMPT, ((10,), (7,)), ((11,), ()))
    got = step_advantages([one, two, two], [1.0, 1.0, 1.0], discount=0.5)
    third = math.sqrt(3) / 3  # mean 2/3, unbiased std sqrt(1/12)
    assert got[0] == pytest.approx([2 * third])
    assert got[1] == pytest.approx([-third, 0.0])


def test_gigpo_adds_the_step_advantage_to_the_path_advantage() -> None:
    short = trajectory(PROMPT, ((10,), (7, 8)), ((11, 12), ()))
    long = trajectory(PROMPT, ((13,), (7, 8)), ((14,), (9,)), ((15,), ()))
    settings = AdvantageSettings(kind="gigpo", step_weight=0.1, step_discount=0.5)
    first, second = make_samples(scored([[short, long]], [[1.0, 0.5]]), settings, max_tokens=100)
    half = 1 / math.sqrt(2)
    assert first.advantages == pytest.approx((0, 0, 0, 1.1 * half, 0, 0, 1.1 * half, 1.1 * half))
    assert second.advantages == pytest.approx((0, 0, 0, -1.1 * half, 0, 0, -1.1 * half, 0, -half))


def test_gigpo_compares_the_steps_by_the_rewards_that_the_paths_are_compared_by() -> None:
    """Both earn 1; the second, of 15 of 20 tokens, loses half of it to a buffer of 10."""
    paths = [trajectory(PROMPT, ((10,), ())), trajectory(PROMPT, (range(10, 25), ()))]
    settings = AdvantageSettings(kind="gigpo", step_weight=0.1, overlong_buffer=10)
    short, long = make_samples(scored([paths], [[1.0, 1.0]]), settings, max_tokens=20)
    half = 1 / math.sqrt(2)
    assert short.advantages == pytest.approx((0, 0, 0, 1.1 * half))
    assert long.advantages == pytest.approx((0, 0, 0, *[-1.1 * half] * 15))


def test_advantages_stand_only_on_generated_tokens() -> None:
    path = trajectory(PROMPT, ((10, 11), (7,)), ((12,), ()))
    (good, bad) = make_samples(scored([[path, path]], [[1.0, 0.0]]), AdvantageSettings(), max_tokens=100)
    half = 1 / math.sqrt(2)
    assert good.advantages == pytest.approx((0, 0, 0, half, half, 0, half))
    assert bad.advantages == pytest.approx((0, 0, 0, -half, -half, 0, -half))
    assert (good.question, good.path, bad.path) == (0, 0, 1)


def test_dapo_drops_groups_without_a_difference_and_keeps_the_indices() -> None:
    path = trajectory(PROMPT, ((10,), ()))
    settings = AdvantageSettings(drop_equal_groups=True)
    samples = make_samples(scored([[path, path], [path, path], [path]], [[1.0, 1.0], [0.0, 1.0], [1.0]]), settings, 100)
    assert [(s.question, s.path) for s in samples] == [(1, 0), (1, 1)]


@pytest.mark.parametrize(("length", "expected"), [(10, 0.0), (80, 0.0), (85, 0.25), (100, 1.0), (130, 1.0)])
def test_overlong_penalty(length: int, expected: float) -> None:
    assert overlong_penalty(length, max_tokens=100, buffer=20) == pytest.approx(expected)
    assert overlong_penalty(length, max_tokens=100, buffer=0) == 0.0


def test_overlong_penalty_is_part_of_the_reward() -> None:
    # Equal rewards, but path 1 has 10 tokens after the prompt, all of the buffer: shaped rewards are 1 and 0.
    short, long = trajectory(PROMPT, ((10,), ())), trajectory(PROMPT, (range(10, 20), ()))
    settings = AdvantageSettings(drop_equal_groups=True, overlong_buffer=5)
    samples = make_samples(scored([[short, long]], [[1.0, 1.0]]), settings, max_tokens=10)
    assert [s.advantages[-1] for s in samples] == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)])


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_named(reward: float) -> None:
    path = trajectory(PROMPT, ((10,), ()))
    with pytest.raises(ValueError, match="reward of question 1, path 0 is"):
        make_samples(scored([[path], [path, path]], [[1.0], [reward, 0.0]]), AdvantageSettings(), 100)


def test_presets_and_overrides() -> None:
    assert advantage_settings(PolicyConfig(preset="aepo")) == AdvantageSettings()
    assert advantage_settings(PolicyConfig(preset="reinforce++")).kind == "batch"
    assert advantage_settings(PolicyConfig(preset="gigpo", step_weight=0.5)).step_weight == 0.5
    dapo = advantage_settings(PolicyConfig(preset="dapo", overlong_buffer=0))
    assert (dapo.drop_equal_groups, dapo.overlong_buffer) == (True, 0)
    assert advantage_settings(PolicyConfig(preset="aepo", advantage="batch")).kind == "batch"
    steps = advantage_settings(PolicyConfig(preset="gigpo", advantage="test_advantages:halves"))
    assert (steps.kind, steps.own) == ("gigpo", halves), "what GiGPO adds for the steps stays"


def halves(rewards, questions):
    """An advantage of one's own."""
    return rewards / 2 + questions


def test_an_advantage_of_ones_own() -> None:
    path = trajectory(PROMPT, ((10,), ()))
    settings = advantage_settings(PolicyConfig(advantage="test_advantages:halves"))
    samples = make_samples(scored([[path, path], [path]], [[1.0, 0.0], [3.0]]), settings, max_tokens=100)
    assert [s.advantages[-1] for s in samples] == [0.5, 0.0, 2.5]
    leave_one_out = PolicyConfig(advantage="aepo_kernels.advantages:leave_one_out_advantages")
    samples = make_samples(
        scored([[path, path, path]], [[1.0, 0.0, 0.5]]), advantage_settings(leave_one_out), max_tokens=100
    )
    assert [s.advantages[-1] for s in samples] == [0.75, -0.75, 0.0]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda rewards, questions: rewards[:1], r"returned shape \[1\], expected \[2\]"),
        (lambda rewards, questions: rewards / 0, "returned nan for path 0|returned inf for path 0"),
        (lambda rewards, questions: rewards.item(), "failed: RuntimeError"),
        (lambda rewards, questions: exit(0), "failed: SystemExit: 0"),
    ],
)
def test_an_advantage_that_fails_is_named(function, text: str) -> None:
    path = trajectory(PROMPT, ((10,), ()))
    with pytest.raises(AgentError, match=f"policy.advantage: .*({text})"):
        make_samples(scored([[path, path]], [[1.0, 0.0]]), AdvantageSettings(own=function), max_tokens=100)


def test_an_advantage_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"policy.advantage = 'grup': expected group, batch, gigpo or package"):
        advantage_settings(PolicyConfig(advantage="grup"))
