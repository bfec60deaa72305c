"""Claims about policy losses at the ends of their inputs: a token without advantage counts for nothing, whatever its
ratio; metrics stay numbers; NaN still shows; entropies that differ by rounding scale nothing; float masks and one
advantage per sequence mean what they mean elsewhere. On every backend."""

import itertools
import math

import pytest
import torch

from aepo_kernels import PolicyObjective, linear_policy_loss, logits_policy_loss, policy_loss
from aepo_kernels.objective import CLIPS, ENTROPY_NOISE_ULPS, PRESETS
from aepo_kernels.testing import make_labels, make_logits

INF, NAN = math.inf, math.nan
OBJECTIVES = {name: PolicyObjective.preset(name) for name in PRESETS} | {
    f"{clip}, {level}": PolicyObjective(clip=clip, ratio_level=level)
    for clip, level in itertools.product(CLIPS, ("token", "sequence"))
}


def run(objective, logprobs, old, advantages, backend, device, dtype=torch.float32, **given):
    """(loss, gradient, metrics) of the tokens of one sequence."""
    tensors = [torch.tensor(x, dtype=dtype, device=device) for x in (logprobs, old, advantages)]
    given = {
        name: torch.tensor(x, dtype=dtype, device=device) if isinstance(x, list) else x for name, x in given.items()
    }
    if objective.needs_entropy:
        given.setdefault("entropy", torch.linspace(0.5, 2.0, len(logprobs), dtype=dtype, device=device))
    bounds = torch.tensor([0, len(logprobs)], device=device)
    x = tensors[0].requires_grad_()
    mask = torch.ones_like(x, dtype=torch.bool)
    out = policy_loss(x, *tensors[1:], mask, objective=objective, cu_seqlens=bounds, backend=backend, **given)
    out.loss.backward()
    return out.loss.item(), x.grad.cpu(), {name: value.item() for name, value in out.metrics.items()}


@pytest.mark.parametrize("old", [-100.0, -9999.0, -INF], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_token_without_advantage_counts_for_nothing(name, old, backend, device):
    loss, grad, metrics = run(OBJECTIVES[name], [-1.0, -2.0], [old, -2.1], [0.0, 0.0], backend, device)
    assert loss == 0
    assert grad.tolist() == [0, 0]
    assert not any(math.isnan(value) for value in metrics.values()), metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_it_leaves_the_others_alone(clip, dtype, backend, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64 kernels")
    objective = PolicyObjective(clip=clip)
    expected, grad, _ = run(objective, [-1.0, -2.0], [-1.1, -2.2], [0.5, -1.0], backend, device, dtype)
    loss, both, _ = run(
        objective, [-1.0, -1.0, -2.0], [-1.1, -INF, -2.2], [0.5, 0.0, -1.0], backend, device, dtype, denominator=2
    )
    assert loss == expected
    assert both.tolist() == [grad[0], 0, grad[1]]


@pytest.mark.parametrize(("clip", "kept"), [("ppo", 0.0), ("aepo", -2.4), ("gppo", -2.4), ("cispo", -2.4)])
def test_an_impossible_old_token_is_clipped_where_its_advantage_is_positive(clip, kept, backend, device):
    loss, grad, metrics = run(PolicyObjective(clip=clip), [-1.0], [-INF], [2.0], backend, device)
    assert loss == pytest.approx(2.4 if clip == "cispo" else -2.4)
    assert grad.item() == pytest.approx(kept)
    assert metrics["approx_kl"] == INF
    assert metrics["ratio_max"] == INF


def test_a_factor_of_zero_anywhere_in_the_product(backend, device):
    # CISPO's bound 0 for an impossible token: -A * 0 * -inf.
    loss, grad, _ = run(PolicyObjective.preset("cispo"), [-INF], [-1.0], [2.0], backend, device)
    assert (loss, grad.item()) == (0, 0)
    # A clipped gradient of 0, and no advantage, beside an importance weight of inf.
    uncapped = PolicyObjective(importance_cap=INF)
    _, grad, _ = run(uncapped, [-1.0], [-3.0], [2.0], backend, device, rollout_logprobs=[-INF])
    assert grad.item() == 0
    loss, grad, _ = run(uncapped, [-1.0], [-3.0], [0.0], backend, device, rollout_logprobs=[-INF])
    assert (loss, grad.item()) == (0, 0)
    # An importance weight of 0 beside a ratio of inf.
    loss, grad, _ = run(uncapped, [-1.0], [-INF], [-2.0], backend, device, rollout_logprobs=[-1.0])
    assert (loss, grad.item()) == (0, 0)
    # And without any advantage, where ratio or importance is inf / inf.
    loss, grad, _ = run(uncapped, [-INF], [-INF], [0.0], backend, device, rollout_logprobs=[-INF])
    assert (loss, grad.item()) == (0, 0)
    clamped = PolicyObjective(entropy_advantage=2.0, clamp_entropy_factor=True)
    given = {"entropy": [1.0], "entropy_stats": (5.0, 1.0)}  # factor 1 - 8, clamped to 0
    loss, grad, _ = run(clamped, [-1.0], [-INF], [-2.0], backend, device, **given)
    assert (loss, grad.item()) == (0, 0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_beyond_all_bounds_is_inf(estimator, backend, device):
    objective = PolicyObjective(kl_estimator=estimator)
    _, _, metrics = run(objective, [-INF], [-1.0], [0.0], backend, device, ref_logprobs=[-1.0])
    assert metrics["kl"] == (-INF if estimator == "k1" else INF)  # k1 is logprob - ref_logprob


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("where", ["logprobs", "old", "advantages", "rollout"])
def test_nan_and_infinite_advantages_still_show(where, clip, backend, device):
    values = {"logprobs": -1.0, "old": -1.0, "advantages": 0.0, "rollout": -1.0}
    objective = PolicyObjective(clip=clip, importance_cap=2.0)
    for bad in (NAN, *([INF] if where == "advantages" else [])):
        x = {**values, where: bad}
        ratio_zero = -INF if bad == INF else x["logprobs"]
        loss, grad, _ = run(
            objective, [ratio_zero], [x["old"]], [x["advantages"]], backend, device, rollout_logprobs=[x["rollout"]]
        )
        assert not math.isfinite(loss)
        assert not grad.isfinite().any()


@pytest.mark.parametrize("operation", [logits_policy_loss, linear_policy_loss])
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_the_same_from_logits_and_hidden_states(operation, schedule, backend, device):
    if operation is logits_policy_loss and schedule == "keep":
        pytest.skip("a schedule of hidden states")
    hidden, weight = make_logits(4, 8, device=device) / 3, make_logits(50, 8, seed=1, device=device) / 3
    hidden.requires_grad_()
    labels = make_labels(hidden.detach() @ weight.T)
    old = torch.tensor([-INF, -9999.0, -3.0, -3.0], device=device)
    advantages = torch.tensor([0.0, 0.0, 0.0, 1.0], device=device)
    policy = (labels, old, advantages, torch.ones(4, device=device))
    objective = PolicyObjective(clip="aepo")
    inputs, options = (hidden @ weight.T,), {}
    if operation is linear_policy_loss:
        inputs, options = (hidden, weight), {"schedule": schedule}
    out = operation(*inputs, *policy, objective=objective, backend=backend, **options)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss.isfinite()
    assert grad[:3].eq(0).all()
    assert grad[3].ne(0).all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 11.9])
def test_entropies_that_differ_by_rounding_scale_nothing(size, backend, device):
    objective = PolicyObjective(entropy_advantage=0.2)
    ulp = 2.0**-23 * size
    n = 6
    ones, grad_of_equal = [0.0] * n, -1 / n
    noise = [size + k * ulp for k in (0, 1, 2, 3, 0, 1)]
    given = ({}, {"entropy_stats": (size, ENTROPY_NOISE_ULPS * 0.9 * ulp)})
    for stats in given:
        _, grad, metrics = run(objective, ones, ones, [1.0] * n, backend, device, entropy=noise, **stats)
        torch.testing.assert_close(grad, torch.full((n,), grad_of_equal), rtol=1e-6, atol=0)
        assert metrics["advantage_flips"] == 0
    # A difference of a thousandth is one: its factors are those of the formula.
    real = torch.tensor([size * (1 + k * 1e-3) for k in range(n)], dtype=torch.float32).double()
    _, grad, _ = run(objective, ones, ones, [1.0] * n, backend, device, entropy=real.tolist())
    factor = 1 + 0.2 * (real - real.mean()) / real.std()
    torch.testing.assert_close(grad, (-factor / n).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("ulps", "scaled"), [(7.5, False), (8.5, True)])
def test_where_rounding_ends(ulps, scaled, backend, device):
    objective = PolicyObjective(entropy_advantage=0.2)
    for mean in (1.0, -1.0):
        given = {"entropy": [2.0], "entropy_stats": (mean, ulps * 2.0**-23)}
        _, grad, _ = run(objective, [-1.0], [-1.0], [1.0], backend, device, **given)
        assert (grad.item() != -1) == scaled


def test_a_nan_ratio_is_in_the_metrics(backend, device):
    _, _, metrics = run(PolicyObjective(), [-1.0, NAN, -1.0], [-1.0] * 3, [1.0] * 3, backend, device)
    assert all(math.isnan(metrics[name]) for name in ("ratio_max", "ratio_mean", "approx_kl"))
    assert run(PolicyObjective(), [-1.0], [-INF], [1.0], backend, device)[2]["ratio_max"] == INF


def batch(device):
    g = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(3, 5, generator=g)
    logprobs = old + 0.3 * torch.randn(3, 5, generator=g)
    mask = torch.rand(3, 5, generator=g) < 0.7
    return [x.to(device) for x in (logprobs, old, torch.randn(3, generator=g), mask)]


@pytest.mark.parametrize("name", ["aepo", "gspo"])
def test_one_advantage_per_sequence(name, backend, device):
    logprobs, old, advantages, mask = batch(device)
    objective = PolicyObjective.preset(name)
    entropy = {"entropy": -logprobs} if objective.needs_entropy else {}

    def result(advantages):
        x = logprobs.clone().requires_grad_()
        out = policy_loss(x, old, advantages, mask, objective=objective, backend=backend, **entropy)
        out.loss.backward()
        return out.loss.item(), x.grad

    loss, grad = result(advantages[:, None].repeat(1, 5))
    for given in (advantages, advantages[:, None]):
        found_loss, found = result(given)
        assert found_loss == loss
        assert torch.equal(found, grad)


def test_advantages_of_other_shapes_are_refused(backend):
    logprobs, old, advantages, mask = batch("cpu")
    for wrong in (advantages[:2], advantages[None], torch.ones(5), torch.ones(()), torch.ones(1, 5)):
        with pytest.raises(ValueError, match=r"advantages must have shape \(3, 5\)"):
            policy_loss(logprobs, old, wrong, mask, objective=PolicyObjective(), backend=backend)


def test_a_square_batch_takes_one_advantage_per_row(backend, device):
    old = torch.zeros(3, 3, device=device)
    x = old.clone().requires_grad_()
    advantages = torch.tensor([1.0, 2.0, 3.0], device=device)
    policy_loss(x, old, advantages, old == 0, objective=PolicyObjective(), backend=backend).loss.backward()
    torch.testing.assert_close(x.grad * -9, advantages[:, None].expand(3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32], ids=str)
def test_masks_of_zeros_and_ones(dtype, backend, device):
    logprobs, old, advantages, mask = batch(device)
    objective = PolicyObjective.preset("grpo")

    def result(mask):
        return policy_loss(logprobs, old, advantages, mask, objective=objective, backend=backend).loss.item()

    assert result(mask.to(dtype)) == result(mask)


@pytest.mark.parametrize("wrong", [0.5, -1.0, NAN, INF])
@pytest.mark.parametrize("operation", [policy_loss, logits_policy_loss, linear_policy_loss])
def test_a_float_mask_of_other_numbers_is_refused(operation, wrong, backend, device):
    logits = torch.zeros(2, 4, device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    inputs = {policy_loss: (logits[:, 0],), logits_policy_loss: (logits, labels), linear_policy_loss: (logits,) * 2}
    inputs[linear_policy_loss] += (labels,)
    zeros, mask = torch.zeros(2, device=device), torch.tensor([1.0, wrong], device=device)

    def loss():
        return operation(*inputs[operation], zeros, zeros, mask, objective=PolicyObjective(), backend=backend).loss

    if device == "cpu":
        with pytest.raises(ValueError, match=f"mask must hold 0 and 1 alone.*; got {wrong}"):
            loss()
    else:  # reading the mask would wait for the device
        assert loss().isnan()
