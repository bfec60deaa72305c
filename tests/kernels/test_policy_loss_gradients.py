"""Claim: for every preset, aggregation and option, loss and gradients are those of the printed formula under autograd
in float64, on every backend; in float32 no further from it than eager PyTorch in float32."""

import pytest
import torch
from policy_oracle import make_batch, policy_oracle

from aepo_kernels import PolicyObjective, policy_loss
from aepo_kernels.objective import AGGREGATIONS, PRESETS
from aepo_kernels.testing import assert_within_budget

OPTIONS = {
    "dual clip": {"clip": "aepo", "dual_clip": 1.5},
    "dual clip, gradient kept at both bounds": {"clip": "gppo", "dual_clip": 2.0, "eps_low": 0.4},
    "sequence ratio, gradient kept": {"clip": "gppo", "ratio_level": "sequence", "eps_low": 0.05, "eps_high": 0.05},
    "sequence ratio, detached": {"clip": "cispo", "ratio_level": "sequence", "eps_low": 0.05, "eps_high": 0.05},
    "sequence ratio, dual clip": {"ratio_level": "sequence", "dual_clip": 1.05, "eps_high": 0.01},
    "cispo with both bounds": {"clip": "cispo", "eps_low": 0.2, "eps_high": 0.2},
    "entropy factor that flips signs": {"clip": "aepo", "entropy_advantage": 1.5},
    "entropy factor clamped": {"clip": "aepo", "entropy_advantage": 1.5, "clamp_entropy_factor": True},
    "negative entropy factor": {"entropy_advantage": -0.5},
    "entropy bonus": {"entropy_bonus": 0.01},
    "k1": {"kl_coef": 0.1, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.1, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.1, "kl_estimator": "k3"},
    "importance": {"importance_cap": 1.2},
    "importance, uncapped": {"importance_cap": float("inf")},
    "importance, sequence ratio": {"importance_cap": 1.2, "ratio_level": "sequence"},
    "everything": {
        "clip": "aepo",
        "dual_clip": 3.0,
        "entropy_advantage": 0.2,
        "entropy_bonus": 0.01,
        "kl_coef": 0.1,
        "importance_cap": 1.2,
    },
}


def inputs_for(objective, batch):
    given = {"cu_seqlens": batch.cu_seqlens}
    if objective.needs_entropy:
        given["entropy"] = batch.entropy
    if objective.kl_coef:
        given["ref_logprobs"] = batch.ref_logprobs
    if objective.importance_cap is not None:
        given["rollout_logprobs"] = batch.rollout_logprobs
    if objective.aggregation == "constant":
        given["denominator"] = 100.0
    return given


def loss_and_grads(function, batch):
    batch.logprobs = batch.logprobs.detach().requires_grad_()
    batch.entropy = batch.entropy.detach().requires_grad_()
    loss = function(batch)
    grads = torch.autograd.grad(loss, (batch.logprobs, batch.entropy), allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads


def check(objective, backend, device, dtype, batch=None):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64 kernels")
    batch = (batch or make_batch()).to(dtype)
    truth_batch = batch.to(torch.float64)  # of the inputs as stored
    here = batch.to(dtype, device)
    denominator = 100.0 if objective.aggregation == "constant" else None

    def ours(b):
        # Masked tokens hold NaN in ours, and something harmless in the oracle, which never looks at them.
        hidden = {"mask": b.mask, "objective": objective, "backend": backend, **inputs_for(objective, b)}
        for name in ("entropy", "ref_logprobs", "rollout_logprobs"):
            if name in hidden:
                hidden[name] = torch.where(b.mask, hidden[name], torch.nan)
        first = [torch.where(b.mask, x, torch.nan) for x in (b.logprobs, b.old_logprobs, b.advantages)]
        return policy_loss(*first, **hidden).loss

    def oracle(b):
        return policy_oracle(b, objective, denominator=denominator)

    actual, truth, eager = (loss_and_grads(f, b) for f, b in ((ours, here), (oracle, truth_batch), (oracle, batch)))
    # Each token's part is rounded at its own size, and the loss adds parts of both signs.
    scales = (truth[1].abs().sum(), 10 * truth[1].abs().max(), 10 * truth[2].abs().max())
    for name, *values, scale in zip(
        ("loss", "grad of logprobs", "grad of entropy"), actual, truth, eager, scales, strict=True
    ):
        assert_within_budget(name, *values, scale=scale)
    assert truth[1][batch.mask].ne(0).any()
    assert actual[1][~here.mask].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_with_every_aggregation(name, aggregation, dtype, backend, device):
    check(PolicyObjective.preset(name, aggregation=aggregation), backend, device, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, dtype, backend, device):
    check(PolicyObjective(**OPTIONS[option]), backend, device, dtype)


def test_many_tokens_and_sequences(backend, device):
    # More tokens than one block of a kernel, more sequences than one block, one sequence longer than a block.
    lengths = [3] * 1100 + [5000] + [0, 1, 2] * 50
    if (backend, device) == ("triton", "cpu"):  # the interpreter is slow
        lengths = [3] * 60 + [2500] + [0, 1, 2] * 20
    objective = PolicyObjective.preset("gspo", eps_low=0.1, eps_high=0.1)
    check(objective, backend, device, torch.float32, make_batch(3, lengths, spread=0.3))
    check(PolicyObjective.preset("aepo"), backend, device, torch.float32, make_batch(4, lengths))


def test_the_entropy_advantage_takes_entropy_as_a_constant(backend, device):
    batch = make_batch().to(torch.float32, device)
    entropy = batch.entropy.requires_grad_()
    logprobs = batch.logprobs.requires_grad_()
    objective = PolicyObjective.preset("aepo")
    loss = policy_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.mask,
        objective=objective,
        entropy=entropy,
        backend=backend,
    ).loss
    loss.backward()
    assert entropy.grad is None
    assert logprobs.grad.abs().max() > 0
