"""Claims: a loss of the user's own gets what LossBatch says and is added up over micro-batches; logged numbers are
those of the float64 oracle; where GRPOTrainer has a method of ours, its gradients are ours.
"""

import pytest
import torch
from trl import GRPOConfig
from trl_oracle import assert_gradients, assert_step, float64_model, loss_mask, sapo_oracle, scored, truth_of
from trl_recorder import MOVING, RecordedGRPO, logged, run

from aepo_kernels import PolicyObjective

# Losses of the user's own


def test_sapo_of_the_examples(tmp_path):
    cut = {"gradient_accumulation_steps": 2, "num_iterations": 2, "per_device_train_batch_size": 4}
    trainer = run(tmp_path, loss="examples.own_losses:sapo", **cut, **MOVING)
    for step in trainer.steps:
        assert_step(step, truth_of(step, PolicyObjective(), loss=sapo_oracle, per_generation=2))
    assert len(logged(trainer, "policy/slope")) == 2


def with_everything(logprobs, entropy, batch):
    """Every field of the batch has a part."""
    mean, std = batch.entropy_stats
    ratio = (logprobs - batch.rollout_logprobs).exp().clamp(max=4)
    factor = 1 + 0.3 * (batch.old_entropy - mean) / std
    lengths = batch.cu_seqlens.diff().clamp(min=1)
    weight = (1 / lengths).repeat_interleave(batch.cu_seqlens.diff())
    value = -(ratio * batch.advantages * factor * weight).sum() / batch.paths
    value = value - 0.1 * (entropy * (logprobs - batch.ref_logprobs).detach()).sum() / batch.tokens
    return value + logprobs.sum() / batch.max_tokens / 100, {"paths": batch.paths, "warmth": batch.temperature}


def everything_oracle(b, entropy, tokens, rows, stats):
    width = int(b.cu_seqlens[1])
    lengths = b.mask.view(-1, width).sum(1).repeat_interleave(width)
    ratio = (b.logprobs - b.rollout_logprobs).exp().clamp(max=4)
    policy = ratio * b.advantages * (1 + 0.3 * (b.entropy - stats[0]) / stats[1]) / lengths
    log_ref = b.ref_logprobs - b.logprobs
    kl = (log_ref.exp() - 1 - log_ref)[b.mask].sum() / tokens
    bonus = (entropy * -log_ref.detach())[b.mask].sum() / tokens
    return -policy[b.mask].sum() / rows - 0.1 * bonus + b.logprobs[b.mask].sum() / 800 + 0.05 * kl


def test_what_a_function_of_ones_own_gets(tmp_path):
    cut = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 3}
    trainer = run(tmp_path, loss_fn=with_everything, beta=0.05, temperature=1.3, **cut, **MOVING)
    for step in trainer.steps:
        truth = truth_of(
            step,
            PolicyObjective(),
            loss=everything_oracle,
            per_generation=2,
            reference=trainer.steps[0].weights,
            temperature=1.3,
        )
        assert_step(step, truth)
    assert logged(trainer, "policy/paths") == [8] * 3
    assert logged(trainer, "policy/warmth") == pytest.approx([1.3] * 3)


def test_a_micro_batch_without_tokens_does_not_reach_the_function(tmp_path):
    seen = []

    def loss_fn(logprobs, entropy, batch):
        seen.append(len(logprobs))
        return -(logprobs * batch.advantages).sum() / batch.tokens

    def oracle(b, entropy, tokens, rows, stats):
        return -(b.logprobs * b.advantages)[b.mask].sum() / tokens

    cut = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "mask_truncated_completions": True}
    trainer = run(tmp_path, loss_fn=loss_fn, **cut)
    assert len(seen) < 8
    for step in trainer.steps:
        assert_step(step, truth_of(step, PolicyObjective(), loss=oracle))


def raises(logprobs, entropy, batch):
    return (logprobs / batch.nothing).sum()


def not_a_loss(logprobs, entropy, batch):
    return logprobs


def takes_a_name(logprobs, entropy, batch):
    return logprobs.sum(), {"ratio_mean": 1.0}


@pytest.mark.parametrize("loss_fn", [raises, not_a_loss, takes_a_name])
def test_errors_name_the_function(loss_fn, tmp_path):
    with pytest.raises((ValueError, TypeError), match=loss_fn.__name__):
        run(tmp_path, loss_fn=loss_fn)


def with_names_of_the_kernels(logprobs, entropy, batch):
    """What no run of it logs, so the names are free; `valid_tokens` is not what its means are weighted by."""
    return -(logprobs * batch.advantages).sum() / batch.tokens, {"valid_tokens": -7.0, "clip_fraction_high": 0.25}


def test_metrics_of_a_function_are_logged_whatever_the_kernels_call_theirs(tmp_path):
    trainer = run(tmp_path, loss_fn=with_names_of_the_kernels, num_iterations=2, **MOVING)
    assert logged(trainer, "policy/valid_tokens") == [-7.0, -7.0]
    assert logged(trainer, "policy/clip_fraction_high") == [0.25, 0.25]
    plain = run(tmp_path, loss_fn=lambda *x: with_names_of_the_kernels(*x)[0], num_iterations=2, **MOVING)
    for name in ("policy/ratio_mean", "policy/ratio_max", "policy/approx_kl"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name))


# Logged numbers


def test_logged_numbers(tmp_path):
    trainer = run(tmp_path, num_iterations=3, max_steps=3, per_device_train_batch_size=8, **MOVING)
    objective = PolicyObjective.preset("aepo")
    for i, step in enumerate(trainer.steps):
        truth = truth_of(step, objective)
        b = truth.batch
        log_ratio = (b.logprobs - b.old_logprobs)[b.mask]
        ratio, advantages = log_ratio.exp(), b.advantages[b.mask]
        with torch.no_grad():
            model = float64_model(step.weights)
            entropy = torch.cat([scored(model, x)[1][loss_mask(x)] for x in step.micro_batches])
        expected = {
            "policy/ratio_mean": ratio.mean(),
            "policy/ratio_max": ratio.max(),
            "policy/approx_kl": (ratio - 1 - log_ratio).mean(),
            "clip_ratio/high_mean": ((ratio > 1.2) & (advantages > 0)).double().mean(),
            "clip_ratio/low_mean": ((ratio < 0.8) & (advantages < 0)).double().mean(),
            "entropy": entropy.mean(),
            "loss": truth.loss,
        }
        for name, value in expected.items():
            assert logged(trainer, name)[i] == pytest.approx(float(value), rel=1e-4, abs=2e-6), name
    assert logged(trainer, "clip_ratio/high_mean")[-1] > 0


# Where TRL has the same method


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"preset": "grpo"}, {"loss_type": "grpo"}),
        ({"preset": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        ({"preset": "arpo", "objective": {"dual_clip": None}, "loss_type": "dr_grpo"}, {"loss_type": "dr_grpo"}),
        ({"preset": "cispo", "epsilon_high": 1.15}, {"loss_type": "cispo", "epsilon_high": 1.15}),
        (
            {"preset": "gspo"},
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": 3e-4,
                "epsilon_high": 4e-4,
            },
        ),
        (
            {"preset": "gspo", "loss_type": "luspo", "epsilon": 0.01},
            {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.01},
        ),
        (
            {"preset": "grpo", "beta": 0.2, "delta": 1.3},
            {"loss_type": "grpo", "beta": 0.2, "delta": 1.3, "use_bias_correction_kl": False},
        ),
    ],
)
def test_gradients_are_trls_where_the_method_is(ours, theirs, tmp_path):
    """Two steps of 2 micro-batches on the same tokens, up to rounding. By SGD: AdamW's first step is as long for a
    gradient that is rounding alone."""
    same = {"gradient_accumulation_steps": 2, "num_iterations": 2, "optim": "sgd", "learning_rate": 2e-2}
    a = run(tmp_path, **same, **ours)
    b = run(tmp_path, trainer=RecordedGRPO, config=GRPOConfig, **same, **theirs)
    for mine, other in zip(a.steps, b.steps, strict=True):
        assert_gradients(mine.gradients, other.gradients, 1e-4)
        assert sum(mine.losses) == pytest.approx(sum(other.losses), abs=1e-5)
    mine, other = a.state.log_history[-2], b.state.log_history[-2]
    assert {name for name in mine if not name.startswith("policy/")} == set(other)
    for name in other.keys() - {"step_time"}:
        assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
