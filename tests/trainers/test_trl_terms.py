"""Claims about TRL's settings of the loss, each against the float64 oracle (trl_oracle.py): bounds, terms, masks and
factors reach the loss as TRL means them, in training and in an evaluation.
"""

import copy
import math

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl_oracle import assert_step, float64_model, loss_mask, sapo_oracle, scored, truth_of
from trl_recorder import EVALUATED, MOVING, TOKENIZER, Recorded, logged, made_up, run
from trl_toys import make_trainer

from aepo.integrations.trl import AEPOConfig
from aepo_kernels import PolicyObjective

# Terms and masks of TRL's settings


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_beta_is_the_kl_to_the_reference(estimator, tmp_path):
    trainer = run(tmp_path, beta=0.3, objective={"kl_estimator": estimator}, num_iterations=2, max_steps=4, **MOVING)
    objective = PolicyObjective.preset("aepo", kl_coef=0.3, kl_estimator=estimator)
    reference = trainer.steps[0].weights
    for step, kl in zip(trainer.steps, logged(trainer, "kl"), strict=True):
        truth = truth_of(step, objective, reference=reference)
        assert_step(step, truth)
        log_ref = (truth.batch.ref_logprobs - truth.batch.logprobs)[truth.batch.mask]
        if estimator == "k3":
            assert kl == pytest.approx((log_ref.exp() - 1 - log_ref).mean().item(), rel=1e-4, abs=1e-6)
    assert log_ref.abs().max() > 0.1


def test_the_entropy_bonus(tmp_path):
    trainer = run(tmp_path, objective={"entropy_bonus": 0.2}, gradient_accumulation_steps=2, num_iterations=2, **MOVING)
    for step in trainer.steps:
        assert_step(step, truth_of(step, PolicyObjective.preset("aepo", entropy_bonus=0.2), per_generation=2))


def test_temperature(tmp_path):
    trainer = run(tmp_path, temperature=1.7, num_iterations=2, **MOVING)
    for step in trainer.steps:
        assert_step(step, truth_of(step, PolicyObjective.preset("aepo"), temperature=1.7))


def test_dual_clip_is_reached_by_delta_and_by_the_preset(tmp_path):
    """delta bounds a ratio of negative advantages: what TRL calls two-sided clipping is what the presets call dual."""
    for changed, objective in (
        ({"preset": "aepo"}, PolicyObjective.preset("aepo")),
        ({"preset": "grpo", "delta": 1.5}, PolicyObjective.preset("grpo", dual_clip=1.5)),
    ):
        settings = MOVING | changed | {"num_iterations": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-2}
        trainer = run(tmp_path, max_steps=6, **settings)
        beyond = 0
        for step, shown in zip(trainer.steps, logged(trainer, "policy/dual_clip"), strict=True):
            truth = truth_of(step, objective)
            assert_step(step, truth)
            b = truth.batch
            ratio = (b.logprobs - b.old_logprobs).exp()
            bounded = (ratio > objective.dual_clip) & (b.advantages < 0) & b.mask
            assert shown == pytest.approx((bounded.sum() / b.mask.sum()).item(), abs=1e-6)
            beyond += int(bounded.sum())
        assert beyond > 0


def test_bounds_by_trls_names(tmp_path):
    for changed, objective in (
        ({"preset": "aepo", "epsilon": 0.05}, PolicyObjective.preset("aepo", eps_low=0.05, eps_high=0.05)),
        ({"preset": "dapo", "epsilon_high": 0.01}, PolicyObjective.preset("dapo", eps_high=0.01)),
        ({"preset": "cispo", "epsilon_high": 1.1}, PolicyObjective.preset("cispo", eps_high=0.1)),
        (
            {"preset": "dapo", "importance_sampling_level": "sequence", "loss_type": "grpo"},
            PolicyObjective.preset("dapo", ratio_level="sequence", aggregation="seq-mean-token-mean"),
        ),
    ):
        trainer = run(tmp_path, num_iterations=3, max_steps=3, **MOVING, **changed)
        for step in trainer.steps:
            assert_step(step, truth_of(step, objective))


def test_truncated_completions_are_masked(tmp_path):
    trainer = run(tmp_path, mask_truncated_completions=True, per_device_train_batch_size=8, preset="gspo")
    for step in trainer.steps:
        rows = loss_mask(step.generation.batch).any(1)
        assert not rows.all()
        assert rows.any()
        assert_step(step, truth_of(step, PolicyObjective.preset("gspo")))


def unfinished(prompts, trainer):
    found = made_up(prompts, trainer)
    ids = [[65 if token == TOKENIZER.eos_token_id else token for token in x] for x in found["completion_ids"]]
    return found | {"completion_ids": ids}


@pytest.mark.parametrize("changed", [{"preset": "aepo"}, {"preset": "grpo", "loss": "examples.own_losses:sapo"}])
def test_no_token_at_all(changed, tmp_path):
    trainer = run(tmp_path, mask_truncated_completions=True, rollout_func=unfinished, beta=0.1, **changed)
    for step in trainer.steps:
        assert step.losses == [0]
        assert all((x == 0).all() for x in step.gradients.values())
    assert logged(trainer, "policy/ratio_max") == [0, 0]


def test_only_tokens_of_high_entropy(tmp_path):
    """TRL's mask multiplies the policy term; the divisor stays that of all tokens, and the KL term has all of them."""

    def share(batch, step):
        """Entropies of the policy as it is now."""
        with torch.no_grad():
            model = float64_model(step.weights)
            entropy = torch.cat([scored(model, x)[1].reshape(-1) for x in step.micro_batches])
        return (entropy >= entropy[batch.mask].quantile(0.6)).double()

    trainer = run(tmp_path, top_entropy_quantile=0.4, beta=0.1, num_iterations=2, **MOVING)
    objective = PolicyObjective.preset("aepo", kl_coef=0.1)
    for step in trainer.steps:
        assert_step(step, truth_of(step, objective, share=share, reference=trainer.steps[0].weights))


def test_sequences_far_off_the_policy(tmp_path):
    """DeepSeek's mask: negative advantages of completions that have become improbable are left out. The policy that
    sampled is the one of rollout_func's log-probs."""
    dropped = []

    def share(batch, step):
        width = batch.cu_seqlens[1]
        moved = ((batch.rollout_logprobs - batch.logprobs.detach()) * batch.mask).view(-1, width)
        kl = moved.sum(1, keepdim=True) / batch.mask.view(-1, width).sum(1, keepdim=True)
        kept = (batch.advantages.view(-1, width) >= 0) | (kl <= 0.5)
        dropped.append(int((~kept & batch.mask.view(-1, width)).sum()))
        return kept.reshape(-1).double()

    trainer = run(tmp_path, off_policy_mask_threshold=0.5, num_iterations=2, per_device_train_batch_size=8, **MOVING)
    for step in trainer.steps:
        assert_step(step, truth_of(step, PolicyObjective.preset("aepo"), share=share))
    assert sum(dropped) > 0


class Corrected(Recorded):
    """As with vLLM, whose part is to give log-probs: TRL computes the ratio. The engine itself is not started."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_vllm = True
        self._last_loaded_step = self.state.global_step
        self.vllm_generation = self

    def sync_weights(self):
        """rollout_func samples by no weights."""


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_importance_sampling_correction(mode, tmp_path):
    def share(batch, step):
        width = batch.cu_seqlens[1]
        difference = ((batch.old_logprobs - batch.rollout_logprobs) * batch.mask).view(-1, width)
        if mode.startswith("sequence"):
            difference = difference.sum(1, keepdim=True).expand(-1, width)
        ratio = difference.exp().reshape(-1)
        return ratio.clamp(max=3.0) if mode.endswith("truncate") else ratio.where(ratio <= 3.0, 0)

    trainer = run(
        tmp_path,
        trainer=Corrected,
        beta=0.1,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=3.0,
        num_iterations=2,
        **MOVING,
    )
    objective = PolicyObjective.preset("aepo", kl_coef=0.1)
    for step in trainer.steps:
        assert "importance_sampling_ratio" in step.micro_batches[0]
        assert_step(step, truth_of(step, objective, share=share, reference=trainer.steps[0].weights))


def test_the_loss_of_a_router_is_cut_by_accumulation(tmp_path):
    """As TRL adds it: the mean over the micro-batches of a step, and whole in an evaluation."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "pad_token_id": None}
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=len(TOKENIZER), num_attention_heads=2, head_dim=16, **sizes, **experts)
    )
    same = {"gradient_accumulation_steps": 2, "max_steps": 1}
    same |= {"eval_dataset": EVALUATED, "per_device_eval_batch_size": 16}  # one batch
    found = []
    for coefficient in (0.0, 0.5):
        trainer = run(tmp_path, model=copy.deepcopy(moe), router_aux_loss_coef=coefficient, **same)
        trainer.model.load_state_dict(moe.state_dict())
        found.append((trainer.state.log_history[0], trainer.evaluate()))
    (without, evaluated_without), (trained, evaluated) = found
    assert trained["aux_loss"] > 0.1
    assert trained["loss"] - without["loss"] == pytest.approx(0.5 * trained["aux_loss"], rel=1e-4)
    added = evaluated["eval_loss"] - evaluated_without["eval_loss"]
    assert added == pytest.approx(0.5 * evaluated["eval_aux_loss"], rel=1e-4)


# Evaluation


@pytest.mark.parametrize("changed", [{"preset": "aepo"}, {"preset": "grpo"}, {"loss": "examples.own_losses:sapo"}])
def test_the_loss_of_an_evaluation(changed, tmp_path):
    """No accumulation and no iterations; statistics and divisors are those of an evaluation batch."""
    trainer = make_trainer(
        Recorded,
        AEPOConfig,
        tmp_path,
        rollout_func=made_up,
        eval_dataset=EVALUATED,
        gradient_accumulation_steps=4,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        **changed,
    )
    found = trainer.evaluate()
    objective = PolicyObjective.preset(changed.get("preset", "grpo"))
    loss = sapo_oracle if "loss" in changed else None
    truths = [truth_of(step, objective, loss=loss) for step in trainer.evaluated]
    assert len(truths) == 2
    for step, truth in zip(trainer.evaluated, truths, strict=True):
        assert sum(step.losses) == pytest.approx(truth.loss, abs=2e-6)
    assert found["eval_loss"] == pytest.approx(sum(x.loss for x in truths) / 2, abs=2e-6)
    assert math.isfinite(found["eval_policy/ratio_mean"])
