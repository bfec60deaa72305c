"""Claims about aepo_kernels.advantages: the papers' formulas in exact arithmetic, whatever the size and order of
rewards and ids; rounding is no difference; what is wrong with an argument is said."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import aepo_kernels
from aepo_kernels.advantages import (
    batch_advantages,
    group_advantages,
    leave_one_out_advantages,
    rewards_equal,
)

ROOT = math.sqrt(0.5)  # two different rewards are always that far from their mean, in stds


def unscaled(rewards, groups):
    return group_advantages(rewards, groups, scale=False)


def batch(rewards, groups):
    return batch_advantages(rewards)


ESTIMATES = {"group": group_advantages, "unscaled": unscaled, "batch": batch, "leave_one_out": leave_one_out_advantages}


def exact(estimate: str, rewards: list[float], groups: list[int]) -> list[float]:
    """By the formulas, in fractions; only the last square root is rounded. Rewards of a group must differ."""
    result = []
    for i, reward in enumerate(map(Fraction, rewards)):
        members = [j for j in range(len(rewards)) if groups[j] == groups[i] or estimate == "batch"]
        values = [Fraction(rewards[j]) for j in members]
        mean = sum(values) / len(values)
        if len(values) == 1:
            result.append(0.0)
        elif estimate == "leave_one_out":
            result.append(float(reward - (sum(values) - reward) / (len(values) - 1)))
        elif estimate == "unscaled":
            result.append(float(reward - mean))
        else:
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            result.append(math.copysign(math.sqrt((reward - mean) ** 2 / variance), reward - mean))
    return result


def ids(groups, device="cpu"):
    return torch.tensor(groups, dtype=torch.int64, device=device)


def zeros(rewards):
    return torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)


def test_by_hand(device):
    # Groups 7: 1, 0, 0, 0, with mean 1/4 and variance (9 + 3) / 16 / 3 = 1/4; and -2: 4, 2; and 5: 3 alone.
    rewards = torch.tensor([0.0, 4.0, 1.0, 0.0, 3.0, 2.0, 0.0], device=device)
    groups = ids([7, -2, 7, 7, 5, -2, 7], device)
    by_group = group_advantages(rewards, groups)
    assert by_group.tolist() == pytest.approx([-0.5, ROOT, 1.5, -0.5, 0, -ROOT, -0.5])
    assert unscaled(rewards, groups).tolist() == [-0.25, 1, 0.75, -0.25, 0, -1, -0.25]
    others = leave_one_out_advantages(rewards, groups).tolist()
    assert others == pytest.approx([-1 / 3, 2, 1, -1 / 3, 0, -2, -1 / 3])
    # All: mean 10/7, squares 30 - 100/7 = 110/7, variance 110/42.
    std = math.sqrt(110 / 42)
    assert batch_advantages(rewards).tolist() == pytest.approx([(r - 10 / 7) / std for r in rewards.tolist()])
    assert rewards_equal(rewards, groups).tolist() == [False] * 4 + [True] + [False] * 2
    assert not rewards_equal(rewards).any()
    assert by_group.device == rewards.device


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e300])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_estimate_is_its_formula(estimate, scale, offset, device):
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.randn(200, generator=generator, dtype=torch.float64) + offset) * scale
    groups = torch.randint(-20, 20, (200,), generator=generator) * 2**57
    truth = exact(estimate, rewards.tolist(), groups.tolist())
    advantages = ESTIMATES[estimate](rewards.to(device), groups.to(device))
    assert advantages.dtype == torch.float64
    # Rewards around 1000 hold differences around 1 to 1e-13; means of 200 lose a digit.
    close = {"rtol": 1e-11, "atol": 1e-12 if estimate in ("group", "batch") else 1e-12 * scale}
    torch.testing.assert_close(advantages.cpu(), torch.tensor(truth, dtype=torch.float64), **close)


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_other_dtypes_are_taken_as_the_numbers_that_they_are(estimate, dtype, device):
    rewards = torch.tensor([0.0, 0.1, 3.0, 0.0, 200.0, 0.0, 1.0, 1.0]).to(dtype)
    groups = ids([0, 1, 1, 1, 1, 2, 2, 2])
    truth = exact(estimate, rewards.double().tolist(), groups.tolist())
    for id_dtype in (torch.int64, torch.int32, torch.uint8):
        advantages = ESTIMATES[estimate](rewards.to(device), groups.to(device, id_dtype))
        assert advantages.dtype == torch.float32
        torch.testing.assert_close(advantages.cpu(), torch.tensor(truth), rtol=1e-7, atol=0)  # rounded once


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_the_order_of_rows_changes_no_bit(estimate, device):
    rewards = torch.randn(300, dtype=torch.float64, device=device)
    groups = torch.randint(9, (300,), device=device)
    advantages = ESTIMATES[estimate](rewards, groups)
    order = torch.randperm(300, device=device)
    assert torch.equal(ESTIMATES[estimate](rewards[order], groups[order]), advantages[order])
    assert torch.equal(ESTIMATES[estimate](rewards, groups), advantages)


@pytest.mark.parametrize(
    "rewards",
    [
        [0.7],
        [0.1] * 3,  # sums to 0.30000000000000004: a mean that is off by a bit must not become +-1
        [0.1] * 10,
        [-1e300] * 4,
        [0.1 + 0.2, 0.3, 0.3, 0.3],
        [1e-200, 0.0, 0.0],
        [5e-324, 0.0],
        [5e-13, -5e-13],
        [0.7 - 0.4, 0.3, 0.2 + 0.1],
        [-(0.1 + 0.2), -0.3],
        [1e300 * (1 + 2**-52), 1e300],
        [-1e300 * (1 + 2**-52), -1e300],
        [0.30000001192092896, 0.30000004172325134, 0.3],  # 0.3 in float32, one ulp above it, and in float64
        [sum([0.1] * 10), 1.0],
        [0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0],
        [1.0 - 0.9 - 0.1, 0.0],
        [1.0, 1.0 + 4 * 2**-23],
        [-1.0, -1.0 + 4 * 2**-23],
    ],
)
def test_rounding_is_no_difference(rewards, device):
    """Also beside a group with differences, which the others must not hide."""
    x = torch.tensor(rewards, dtype=torch.float64, device=device)
    assert rewards_equal(x).all()
    assert batch_advantages(x).tolist() == [0.0] * len(x)
    beside = torch.cat((x, torch.tensor([3.0, 5.0], device=device)))
    groups = ids([4] * len(x) + [2] * 2, device)
    for estimate in (group_advantages, unscaled, leave_one_out_advantages):
        assert estimate(x, zeros(x)).tolist() == [0.0] * len(x)
        assert estimate(beside, groups).tolist()[: len(x)] == [0.0] * len(x)
        assert estimate(beside, groups)[-1] > 0
    assert rewards_equal(beside, groups).tolist() == [True] * len(x) + [False] * 2


def test_sums_in_float32_that_should_be_equal_are(device):
    """0.1 ten times in any order of adding, as components of a reward are added up."""
    parts = torch.full((10,), 0.1, device=device)
    one_by_one = sum(parts.unbind(), torch.zeros((), device=device))
    rewards = torch.stack((one_by_one, parts.double().sum().float(), 10 * parts[0]))
    assert rewards[0] != rewards[1]
    assert group_advantages(rewards, zeros(rewards)).tolist() == [0.0] * 3


@pytest.mark.parametrize("scale", [1e-11, 1e-5, 1.0, 1e200, 1.7e308])
def test_real_differences_count_whatever_the_size_of_rewards(scale, device):
    for lower in (-scale, scale * (1 - 1e-6), 0.0):
        rewards = torch.tensor([scale, lower], dtype=torch.float64, device=device)
        if scale == 1e-11 and lower > 0:
            continue  # 1e-17 apart, which is rounding
        assert group_advantages(rewards, zeros(rewards)).tolist() == pytest.approx([ROOT, -ROOT], rel=1e-9)
        assert batch_advantages(rewards).tolist() == pytest.approx([ROOT, -ROOT], rel=1e-9)
    ends = torch.tensor([scale, -scale], dtype=torch.float64, device=device)
    assert unscaled(ends, zeros(ends)).tolist() == pytest.approx([scale, -scale])
    rewards = torch.tensor([scale, 0.0, scale], dtype=torch.float64, device=device)
    assert leave_one_out_advantages(rewards, zeros(rewards)).tolist() == pytest.approx([scale / 2, -scale, scale / 2])
    assert unscaled(rewards, zeros(rewards)).tolist() == pytest.approx([scale / 3, -scale / 3 * 2, scale / 3])


def test_float32_at_its_end(device):
    rewards = torch.tensor([3e38, -3e38, 1e-45], device=device)
    assert group_advantages(rewards, zeros(rewards)).tolist() == pytest.approx([1.0, -1.0, 0.0])
    assert unscaled(rewards, zeros(rewards)).tolist() == pytest.approx([3e38, -3e38, 0.0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number(value, device):
    """An error where it costs nothing to look, else NaN in its group alone: the loss shows it."""
    rewards = torch.tensor([0.0, 1.0, value, 0.0, 2.0, 1.0], device=device)
    groups = ids([3, 1, 1, 1, 3, 0], device)
    seen = {
        name: torch.compile(one, fullgraph=True, backend="eager")(rewards, groups) for name, one in ESTIMATES.items()
    }
    assert rewards_equal(rewards, groups).tolist() == [False] * 5 + [True]
    if device == "cpu":
        for estimate in ESTIMATES.values():
            with pytest.raises(ValueError, match=rf"rewards must be finite; got {value} at position 2"):
                estimate(rewards, groups)
    else:
        seen |= {f"eager {name}": one(rewards, groups) for name, one in ESTIMATES.items()}
    for name, advantages in seen.items():
        expected = [True] * 6 if "batch" in name else [False, True, True, True, False, False]
        assert advantages.isnan().tolist() == expected, name


def test_no_answers(device):
    rewards = torch.zeros(0, device=device)
    for estimate in ESTIMATES.values():
        assert estimate(rewards, zeros(rewards)).shape == (0,)
    assert rewards_equal(rewards).shape == (0,)


def test_advantages_are_constants_and_the_arguments_stay(device):
    rewards = torch.tensor([1.0, 0.0, 3.0], device=device, requires_grad=True)
    groups = ids([1, 0, 1], device)
    for estimate in ESTIMATES.values():
        assert not estimate(rewards, groups).requires_grad
    assert (rewards.tolist(), groups.tolist()) == ([1.0, 0.0, 3.0], [1, 0, 1])


def test_reinforce_plus_plus_with_a_baseline_is_the_two_in_a_row():
    rewards = torch.tensor([1.0, 0.0, 5.0, 9.0])
    advantages = batch_advantages(group_advantages(rewards, ids([0, 0, 1, 1]), scale=False))
    std = math.sqrt((0.25 * 2 + 4 * 2) / 3)  # of 1/2, -1/2, -2, 2
    assert advantages.tolist() == pytest.approx([0.5 / std, -0.5 / std, -2 / std, 2 / std])


@pytest.mark.parametrize(
    ("estimate", "compiler"), [*((name, "aot_eager") for name in ESTIMATES), ("group", "inductor")]
)
def test_compiles_into_one_graph(estimate, compiler, device):
    """Two sizes, so that the second one is compiled for any; but inductor's C++ takes seconds."""
    compiled = torch.compile(ESTIMATES[estimate], fullgraph=True, backend=compiler)
    for size in (24, 40) if compiler == "aot_eager" else (24,):
        rewards, groups = torch.rand(size, device=device), torch.arange(size, device=device) // 8
        torch.testing.assert_close(
            compiled(rewards, groups), ESTIMATES[estimate](rewards, groups), rtol=1e-6, atol=1e-7
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_nothing_waits_for_the_gpu(estimate):
    rewards = torch.rand(64, device="cuda")
    groups = torch.arange(64, device="cuda") // 8
    torch.cuda.set_sync_debug_mode("error")
    try:
        ESTIMATES[estimate](rewards, groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")


REWARDS, GROUPS = torch.zeros(4), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("rewards", "groups", "error", "message"),
    [
        ([1.0, 0.0], GROUPS, TypeError, r"rewards must be a tensor \[B\]; got list"),
        (REWARDS.to(torch.complex64), GROUPS, TypeError, "rewards must be floating .*; got torch.complex64"),
        (REWARDS.to(torch.float8_e5m2), GROUPS, TypeError, "rewards must be floating .*; got torch.float8_e5m2"),
        (REWARDS[:, None], GROUPS, ValueError, r"rewards must be \[B\], one per answer; got shape \(4, 1\)"),
        (REWARDS[0], GROUPS, ValueError, r"got shape \(\)"),
        (REWARDS, 4, TypeError, r"groups must be a tensor \[B\] of integers; got int"),
        (REWARDS, ["a"] * 4, TypeError, r"groups must be a tensor \[B\] of integers; got list"),
        (REWARDS, REWARDS, TypeError, "groups must have an integer dtype; got torch.float32"),
        (REWARDS, GROUPS.bool(), TypeError, "groups must have an integer dtype; got torch.bool"),
        (REWARDS, GROUPS[:1], ValueError, r"groups must have shape \(4,\) like rewards; got \(1,\)"),
        (REWARDS, GROUPS.to("meta"), ValueError, "groups must be on cpu like rewards; got meta"),
    ],
)
def test_a_bad_argument_is_named(rewards, groups, error, message):
    for function in (group_advantages, leave_one_out_advantages, rewards_equal):
        with pytest.raises(error, match=message):
            function(rewards, groups)
    if message.startswith("rewards"):
        with pytest.raises(error, match=message):
            batch_advantages(rewards)


def test_scale_is_a_choice_of_two():
    with pytest.raises(TypeError, match="scale must be a bool; got 'batch'"):
        group_advantages(REWARDS, GROUPS, scale="batch")


def test_the_module_is_part_of_the_package():
    assert aepo_kernels.advantages.group_advantages is group_advantages
