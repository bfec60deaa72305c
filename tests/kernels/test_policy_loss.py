"""Claims about policy_loss beyond its gradient: values and metrics computed by hand, micro-batches that add up to the
whole batch, masks without a token, NaN that shows, and a clear error for every input that does not fit."""

import itertools
import math

import pytest
import torch
from policy_oracle import make_batch

from aepo_kernels import PolicyObjective, policy_loss
from aepo_kernels.objective import AGGREGATIONS
from aepo_kernels.ops.aggregation import token_weights


def hand_made(objective, ratios, advantages, backend, device, **given):
    """Loss and gradient of tokens with these ratios; the loss weighs them 1/T."""
    ratios, advantages = torch.tensor(ratios), torch.tensor(advantages)
    old = torch.full_like(ratios, -1.0)
    inputs = [x.to(device) for x in (old + ratios.log(), old, advantages, ratios > 0)]
    given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    logprobs = inputs[0].requires_grad_()
    out = policy_loss(*inputs, objective=objective, backend=backend, **given)
    out.loss.backward()
    return out, logprobs.grad.cpu() * len(ratios)


# One token per case: above, inside and below the bounds [0.8, 1.2] for either sign, and beyond the dual clip 3.
RATIOS = [1.5, 1.1, 0.5, 1.5, 1.1, 0.5, 4.0]
ADVANTAGES = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0]


@pytest.mark.parametrize(
    ("clip", "losses", "grads"),
    [
        ("ppo", [-2.4, -2.2, -1.0, 3.0, 2.2, 1.6, 6.0], [0.0, -2.2, -1.0, 3.0, 2.2, 0.0, 0.0]),
        ("aepo", [-2.4, -2.2, -1.0, 3.0, 2.2, 1.6, 6.0], [-2.4, -2.2, -1.0, 3.0, 2.2, 0.0, 0.0]),
        ("gppo", [-2.4, -2.2, -1.0, 3.0, 2.2, 1.6, 6.0], [-2.4, -2.2, -1.0, 3.0, 2.2, 1.6, 0.0]),
    ],
)
def test_clip_rules_by_hand(clip, losses, grads, backend, device):
    objective = PolicyObjective(clip=clip, dual_clip=3.0)
    out, grad = hand_made(objective, RATIOS, ADVANTAGES, backend, device)
    torch.testing.assert_close(grad, torch.tensor(grads), rtol=1e-6, atol=1e-7)
    assert out.loss.item() == pytest.approx(sum(losses) / 7, rel=1e-6)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    approx_kl = sum(r - 1 - math.log(r) for r in RATIOS) / 7
    assert metrics == pytest.approx(
        {
            "loss": sum(losses) / 7,
            "clip_fraction_high": 1 / 7,
            "clip_fraction_low": 1 / 7,
            "dual_clip_fraction": 1 / 7,
            "ratio_mean": sum(RATIOS) / 7,
            "ratio_max": 4.0,
            "approx_kl": approx_kl,
            "valid_tokens": 7.0,
        },
        rel=1e-5,
    )
    assert not any(value.requires_grad for value in out.metrics.values())


def test_cispo_by_hand(backend, device):
    out, grad = hand_made(PolicyObjective(clip="cispo"), RATIOS, ADVANTAGES, backend, device)
    expected = [-2.4, -2.2, -1.6, 2.4, 2.2, 1.6, 2.4]  # -A clip(r), for every token
    torch.testing.assert_close(grad, torch.tensor(expected), rtol=1e-6, atol=0)
    assert out.metrics["clip_fraction_high"].item() == pytest.approx(3 / 7)
    assert out.metrics["clip_fraction_low"].item() == pytest.approx(2 / 7)


def test_sequence_ratio_by_hand(backend, device):
    # Sequence 1: log-ratios 0.3 and 0.1, ratio e^0.2, inside. Sequence 2: one valid token, e^0.5, clipped.
    old = torch.full((4,), -1.0, device=device)
    logprobs = (old + torch.tensor([0.3, 0.1, 9.0, 0.5], device=device)).requires_grad_()
    advantages = torch.tensor([1.0, 3.0, 5.0, 2.0], device=device)
    objective = PolicyObjective(ratio_level="sequence", eps_low=0.3, eps_high=0.3)
    out = policy_loss(
        logprobs,
        old,
        advantages,
        torch.tensor([1, 1, 0, 1], device=device),
        objective=objective,
        cu_seqlens=torch.tensor([0, 2, 4], device=device),
        backend=backend,
    )
    out.loss.backward()
    r = math.exp(0.2)
    assert out.loss.item() == pytest.approx(-(1 * r + 3 * r + 2 * 1.3) / 3, rel=1e-6)
    torch.testing.assert_close(logprobs.grad.cpu(), torch.tensor([-2 * r, -2 * r, 0.0, 0.0]) / 3, rtol=1e-6, atol=0)
    assert out.metrics["ratio_max"].item() == pytest.approx(math.exp(0.5), rel=1e-6)


def test_entropy_factor_and_its_metrics_by_hand(backend, device):
    # H = 1, 2, 6: mean 3, unbiased std sqrt(7). With a = 1.5 the first factor is 1 - 3 / sqrt(7) < 0: its sign flips.
    objective = PolicyObjective(entropy_advantage=1.5)
    entropy = torch.tensor([1.0, 2.0, 6.0])
    out, grad = hand_made(objective, [1.0, 1.0, 1.0], [1.0, -1.0, 1.0], backend, device, entropy=entropy)
    factor = 1 + 1.5 * (entropy - 3) / math.sqrt(7)
    torch.testing.assert_close(grad, -factor * torch.tensor([1.0, -1.0, 1.0]), rtol=1e-6, atol=1e-7)
    assert out.metrics["advantage_flips"].item() == 1
    assert out.metrics["entropy_mean"].item() == pytest.approx(3)
    assert out.metrics["entropy_std"].item() == pytest.approx(math.sqrt(7))
    given = {"entropy": entropy, "entropy_stats": (0.0, 3.0)}
    _, grad = hand_made(objective, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], backend, device, **given)
    torch.testing.assert_close(grad, -(1 + 0.5 * entropy), rtol=1e-6, atol=0)


@pytest.mark.parametrize("entropy", [[0.7], [0.1] * 50, [1e-3] * 3, [0.0, 0.0]])
def test_equal_entropies_leave_the_advantage_alone(entropy, backend, device):
    # In float32 the mean of fifty 0.1 is not 0.1: a careless std is that rounding, and the factor noise over noise.
    n = len(entropy)
    objective = PolicyObjective.preset("aepo")
    out, grad = hand_made(objective, [1.0] * n, [1.0] * n, backend, device, entropy=torch.tensor(entropy))
    assert grad.sub(-1).abs().max() < 1e-6
    assert out.metrics["entropy_std"].item() == 0


def test_entropy_std_does_not_cancel(backend, device):
    # E[H^2] - E[H]^2 in float32 loses a spread of 1e-4 around 8 altogether.
    g = torch.Generator().manual_seed(0)
    entropy = 8 + 1e-4 * torch.randn(1000, generator=g)
    out, _ = hand_made(PolicyObjective(), [1.0] * 1000, [1.0] * 1000, backend, device, entropy=entropy)
    assert out.metrics["entropy_std"].item() == pytest.approx(entropy.double().std().item(), rel=1e-4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole_batch(aggregation, backend, device):
    dtype = torch.float32 if backend == "triton" else torch.float64
    batch = make_batch(7, (5, 9, 0, 3, 12, 6, 1, 8)).to(dtype, device)
    objective = PolicyObjective.preset("aepo", aggregation=aggregation)
    bounds = batch.cu_seqlens
    counted = sum(bool(batch.mask[i:j].any()) for i, j in itertools.pairwise(bounds))
    denominator = {"token-mean": batch.mask.sum(), "constant": 64}.get(aggregation, counted)
    valid = batch.entropy[batch.mask]
    stats = (valid.mean(), valid.std())

    def run(first, last):
        tokens = slice(int(bounds[first]), int(bounds[last]))
        logprobs = batch.logprobs[tokens].clone().requires_grad_()
        out = policy_loss(
            logprobs,
            batch.old_logprobs[tokens],
            batch.advantages[tokens],
            batch.mask[tokens],
            objective=objective,
            entropy=batch.entropy[tokens],
            entropy_stats=stats,
            cu_seqlens=bounds[first : last + 1] - bounds[first],
            denominator=denominator,
            backend=backend,
        )
        out.loss.backward()
        return out.loss.detach(), logprobs.grad

    whole_loss, whole_grad = run(0, 8)
    parts = [run(i, j) for i, j in ((0, 1), (1, 4), (4, 5), (5, 8))]
    assert torch.equal(torch.cat([grad for _, grad in parts]), whole_grad)
    eps = torch.finfo(dtype).eps
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole_loss.item(), abs=20 * eps)
    if aggregation != "constant":  # and the default is the same count, taken from the call
        weights = [
            token_weights(batch.mask, None, bounds, aggregation, d, dtype)
            for d in (None, torch.tensor(float(denominator), device=device))
        ]
        assert torch.equal(*weights)


def test_rows_of_a_batch_are_its_sequences(backend, device):
    batch = make_batch(2, (6, 6, 6)).to(torch.float32, device)
    objective = PolicyObjective.preset("gspo")
    flat = [batch.logprobs, batch.old_logprobs, batch.advantages, batch.mask]
    packed = policy_loss(*flat, objective=objective, cu_seqlens=batch.cu_seqlens, backend=backend)
    padded = policy_loss(*(x.view(3, 6) for x in flat), objective=objective, backend=backend)
    assert torch.equal(packed.loss, padded.loss)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("name", ["aepo", "gspo", "cispo"])
def test_no_valid_token_is_a_zero_that_can_be_backpropagated(name, tokens, backend, device):
    logprobs = torch.full((tokens,), torch.nan, device=device, requires_grad=True)
    other = torch.full((tokens,), torch.nan, device=device)
    out = policy_loss(
        logprobs,
        other,
        other,
        torch.zeros(tokens, dtype=torch.bool, device=device),
        objective=PolicyObjective.preset(name),
        entropy=other,
        cu_seqlens=torch.tensor([0, tokens], device=device),
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert logprobs.grad.shape == (tokens,)
    assert logprobs.grad.eq(0).all()
    assert all(value.item() == 0 for value in out.metrics.values())


@pytest.mark.parametrize(
    "where", ["logprobs", "old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs", "entropy"]
)
def test_nan_on_a_valid_token_shows_in_the_loss(where, backend, device):
    batch = make_batch().to(torch.float32, device)
    getattr(batch, where)[0] = torch.nan
    objective = PolicyObjective.preset("aepo", kl_coef=0.1, importance_cap=2.0)
    out = policy_loss(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.mask,
        objective=objective,
        entropy=batch.entropy,
        ref_logprobs=batch.ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        backend=backend,
    )
    assert out.loss.isnan()


def test_sixteen_bit_log_probs_get_their_gradient_in_their_dtype():
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    out = policy_loss(logprobs, logprobs.detach(), torch.ones(2), torch.ones(2, dtype=int), objective=PolicyObjective())
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert logprobs.grad.dtype == torch.bfloat16
