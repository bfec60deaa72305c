"""Claims: entropy statistics are those of the tokens that count, in float64, over all ranks of a group (2 and 3
processes); the advantage is A (1 + a (H - mean) / std) up to one rounding; equal entropies change nothing; it is what
the policy loss makes of the same statistics; arguments that do not fit raise an error that names them."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import cases, run_in_processes

from aepo_kernels import PolicyObjective, policy_loss
from aepo_kernels.entropy_advantage import entropy_aware_advantages, entropy_statistics

MODULES = ("entropy_statistics_cases",)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """World size -> what failed, from one set of processes each."""
    return functools.cache(lambda world: run_in_processes(MODULES, world, tmp_path_factory.mktemp(f"{world}_ranks")))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", cases(MODULES))
def test_over_ranks(case, world, failures):
    assert case not in failures(world), failures(world)[case]


def problem(seed, rows, length, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    entropy = (torch.randn(rows, length, generator=g, dtype=torch.float64).abs() ** 3).to(dtype)
    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[0, :2] = True
    return torch.randn(rows, generator=g, dtype=torch.float64), entropy, mask


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 6), length=st.integers(2, 30))
def test_statistics_are_those_of_the_tokens_that_count(seed, rows, length):
    _, entropy, mask = problem(seed, rows, length)
    for kind in (mask, mask.long(), mask.float()):
        mean, std = entropy_statistics(entropy.masked_fill(~mask, torch.nan), kind)
        assert (mean.dtype, mean.shape, std.dtype, std.shape) == (torch.float64, (), torch.float64, ())
        torch.testing.assert_close((mean, std), (entropy[mask].mean(), entropy[mask].std()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_summed_in_float64(dtype, device):
    _, entropy, mask = problem(0, 5, 40, dtype)
    stats = entropy_statistics(entropy.to(device), mask.to(device))
    expected = entropy.double()[mask].mean(), entropy.double()[mask].std()
    torch.testing.assert_close(tuple(x.cpu() for x in stats), expected, rtol=1e-12, atol=0)


def test_a_spread_that_float32_sums_would_lose(device):
    entropy = (5.567 + 1e-3 * torch.randn(64, 64, dtype=torch.float64)).to(torch.float32)
    _, std = entropy_statistics(entropy.to(device), torch.ones(64, 64, device=device))
    torch.testing.assert_close(std.cpu(), entropy.double().std(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("values", "mask", "expected"),
    [
        ([], [], (0, 0)),
        ([1.0, 2.0], [0, 0], (0, 0)),
        ([1.0, 2.0], [0, 1], (2, 0)),
        ([0.3] * 7, [1] * 7, (0.3, 0)),
        ([1.0, 3.0], [1, 1], (2, 2**0.5)),
    ],
)
def test_few_tokens(values, mask, expected, device):
    entropy = torch.tensor(values, dtype=torch.float64, device=device)
    mean, std = entropy_statistics(entropy, torch.tensor(mask, device=device))
    assert (mean.item(), std.item()) == pytest.approx(expected, abs=1e-15)


def test_nan_on_a_token_that_counts_is_seen(device):
    entropy = torch.tensor([[1.0, torch.nan, 2.0]], device=device)
    stats = entropy_statistics(entropy, torch.ones(1, 3, device=device))
    assert all(x.isnan() for x in stats)
    assert entropy_aware_advantages(torch.ones(1, device=device), entropy, stats).isnan().all()


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    length=st.integers(2, 30),
    coefficient=st.floats(-3, 3),
    clamp=st.booleans(),
)
def test_the_advantage_is_the_formula(seed, rows, length, coefficient, clamp):
    advantages, entropy, mask = problem(seed, rows, length)
    mean, std = stats = entropy_statistics(entropy, mask)
    factor = 1 + coefficient * (entropy - mean) / std
    expected = advantages[:, None] * (factor.clamp(min=0) if clamp else factor)
    per_token = advantages[:, None].expand_as(entropy)
    settings = {"coefficient": coefficient, "clamp": clamp}
    for given_as in (advantages, advantages[:, None], per_token):
        found = entropy_aware_advantages(given_as, entropy, stats, **settings)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    numbers = entropy_aware_advantages(advantages, entropy, (mean.item(), std.item()), **settings)
    torch.testing.assert_close(numbers, expected, rtol=1e-12, atol=1e-13)
    one_row = entropy_aware_advantages(advantages[:1], entropy[:1], stats, **settings)
    assert torch.equal(one_row, found[:1])  # however a batch is cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rounding_to_the_dtype_of_the_advantages(dtype, device):
    advantages, entropy, mask = problem(3, 4, 20, torch.float32)
    stats = entropy_statistics(entropy, mask)
    found = entropy_aware_advantages(advantages.to(device, dtype), entropy.to(device), stats)
    factor = 1 + 0.2 * (entropy.double() - stats[0]) / stats[1]
    expected = (advantages.to(dtype).double()[:, None] * factor).to(dtype)
    torch.testing.assert_close(found.cpu(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_advantages_and_entropies_get_no_gradient_through_it():
    entropy = torch.rand(2, 3, requires_grad=True)
    found = entropy_aware_advantages(torch.ones(2), entropy, entropy_statistics(entropy, torch.ones(2, 3)))
    assert not found.requires_grad


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-6])
def test_rounding_is_no_spread(spread, device):
    """8 ulps of float32 at 4: 3.8e-6."""
    entropy = 4 + spread * torch.tensor([[-1.0, 1.0, 0.0, 1.0]], device=device)
    stats = entropy_statistics(entropy, torch.ones(1, 4, device=device))
    advantages = torch.tensor([-0.7], device=device)
    found = entropy_aware_advantages(advantages, entropy, stats, coefficient=3.0)
    assert torch.equal(found, advantages[:, None].expand(1, 4))
    wide = 4 + 1e-4 * torch.tensor([[-1.0, 1.0, 0.0, 1.0]], device=device)
    stats = entropy_statistics(wide, torch.ones(1, 4, device=device))
    assert (entropy_aware_advantages(advantages, wide, stats, coefficient=3.0) != advantages).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_spread_of_entropies_in_half_precision_is_one(dtype, device):
    """Neighbours of 4: far less than 8 ulps of the dtype, but the statistics are float64 of exact numbers."""
    ulp = 4 * torch.finfo(dtype).eps
    entropy = (4 + ulp * torch.tensor([[2.0, 1.0, 0.0, 1.0]], device=device)).to(dtype)
    stats = entropy_statistics(entropy, torch.ones(1, 4, device=device))
    found = entropy_aware_advantages(torch.ones(1, dtype=torch.float64, device=device), entropy, stats)
    exact = entropy.double()
    torch.testing.assert_close(found, 1 + 0.2 * (exact - exact.mean()) / exact.std(), rtol=1e-12, atol=1e-13)
    assert found.unique().numel() > 1


@pytest.mark.parametrize("clamp", [False, True])
def test_the_policy_loss_makes_the_same_of_the_same_statistics(clamp):
    advantages, entropy, mask = problem(7, 5, 30)
    g = torch.Generator().manual_seed(0)
    old = -torch.rand(5, 30, generator=g, dtype=torch.float64)
    logprobs = (old + 0.4 * torch.randn(5, 30, generator=g, dtype=torch.float64)).requires_grad_()
    stats = entropy_statistics(entropy, mask)
    objective = PolicyObjective.preset("aepo", entropy_advantage=1.2, clamp_entropy_factor=clamp)
    rows = advantages[:, None].expand_as(old)
    inside = policy_loss(logprobs, old, rows, mask, objective=objective, entropy=entropy, entropy_stats=stats)
    made = entropy_aware_advantages(advantages, entropy, stats, coefficient=1.2, clamp=clamp)
    before = policy_loss(logprobs, old, made, mask, objective=PolicyObjective.preset("aepo", entropy_advantage=0.0))
    torch.testing.assert_close(inside.loss, before.loss, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(x.loss, logprobs)[0] for x in (inside, before)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


H = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: entropy_statistics([1.0], H), TypeError, r"entropy must be a floating-point tensor; got \[1.0\]"),
        (
            lambda: entropy_statistics(H.long(), H),
            TypeError,
            "entropy must be a floating-point tensor; got torch.int64",
        ),
        (lambda: entropy_statistics(H, H[0]), ValueError, r"mask must have shape \(2, 3\) like entropy; got \(3,\)"),
        (lambda: entropy_statistics(H, None), ValueError, r"mask must have shape .*got NoneType"),
        (lambda: entropy_aware_advantages(H, H[0], (1, 1)), ValueError, r"entropy must be \[B, L\]; got shape \(3,\)"),
        (lambda: entropy_aware_advantages(H[0], H, (1, 1)), ValueError, r"advantages must be .*got shape \(3,\)"),
        (lambda: entropy_aware_advantages(H[:1], H, (1, 1)), ValueError, r"advantages must be .*got shape \(1, 3\)"),
        (lambda: entropy_aware_advantages(H.long(), H, (1, 1)), TypeError, "advantages must be .*got torch.int64"),
        (lambda: entropy_aware_advantages(H, H, None), TypeError, r"stats must be \(mean, std\).*got NoneType"),
        (lambda: entropy_aware_advantages(H, H, (1, 1, 1)), TypeError, r"stats must be \(mean, std\)"),
        (lambda: entropy_aware_advantages(H, H, (1, 1), coefficient="a"), ValueError, "coefficient must be .*got 'a'"),
        (
            lambda: entropy_aware_advantages(H, H, (1, 1), coefficient=float("nan")),
            ValueError,
            "coefficient must be a finite number; got nan",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
