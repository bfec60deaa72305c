"""Claims about a step of AEPOTrainer, each against the float64 oracle (trl_oracle.py): loss and gradient are those of
the algorithm under every preset and setting, however a batch is cut; and GRPOTrainer's where the method is the same.
"""

import dataclasses
import math

import pytest
import torch
import trl_oracle
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_oracle import (
    assert_gradients,
    assert_step,
    group_estimate,
    loss_mask,
    made_up,
    recorded,
    row_keys,
    scored,
    truth_of,
)
from trl_toys import make_model, make_trainer

from aepo.integrations.trl import AEPOConfig, AEPOTrainer
from aepo_kernels import PolicyObjective
from aepo_kernels.objective import PRESETS

Recorded = recorded(AEPOTrainer)
RecordedGRPO = recorded(GRPOTrainer)
MOVING = {"learning_rate": 2e-2, "lr_scheduler_type": "constant"}
"""Steps that take ratios out of every preset's clip range."""


def run(folder, trainer=Recorded, config=AEPOConfig, **changed):
    """A trained trainer: made-up completions with tool results, prompts of different lengths, gradients not clipped."""
    changed = {"rollout_func": made_up, "max_grad_norm": 0.0} | changed
    if changed.get("beta"):  # TRL loads the reference from where the model came from
        make_model(trl_oracle.TOKENIZER).save_pretrained(folder / "start")
        changed["model"] = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    made = make_trainer(trainer, config, folder, **changed)
    made.train()
    return made


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# Every preset, with ratios of 1 and with others


@pytest.mark.parametrize("preset", PRESETS)
def test_the_step_of_a_preset(preset, tmp_path):
    trainer = run(tmp_path, preset=preset, advantage="group")
    assert len(trainer.steps) == 2
    for step in trainer.steps:
        assert {x["completion_mask"].sum(1).unique().numel() > 1 for x in step.micro_batches} == {True}
        assert any((x["prompt_mask"] == 0).any() or len(set(row_keys(x))) for x in step.micro_batches)
        assert_step(step, truth_of(step, PolicyObjective.preset(preset)))
    assert logged(trainer, "loss") == pytest.approx([sum(step.losses) for step in trainer.steps])


@pytest.mark.parametrize("preset", PRESETS)
def test_ratios_out_of_the_clip_range(preset, tmp_path):
    trainer = run(
        tmp_path,
        preset=preset,
        advantage="group",
        num_iterations=2,
        steps_per_generation=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=4,
        **MOVING,
    )
    objective = PolicyObjective.preset(preset)
    assert len(trainer.generations) == 1
    outside = 0
    for step in trainer.steps:
        truth = truth_of(step, objective, per_generation=2)
        assert_step(step, truth)
        ratio = (truth.batch.logprobs - truth.batch.old_logprobs).exp()[truth.batch.mask]
        outside += int(((ratio < 1 - objective.eps_low) | (ratio > 1 + objective.eps_high)).sum())
    assert outside > 5


# How a batch is cut


CUT = {"max_steps": 1, "generation_batch_size": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Objective -> the step with the 8 rows in one micro-batch."""
    found = {}

    def of(preset, settings):
        key = preset, str(settings)
        if key not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[key] = run(folder, preset=preset, per_device_train_batch_size=8, **CUT, **settings)
        return found[key]

    return of


@pytest.mark.parametrize("accumulated", [2, 4])
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("aepo", {}),
        ("gspo", {}),
        ("dapo", {"loss_type": "luspo"}),
        ("dapo", {"loss_type": "dr_grpo"}),
        ("gigpo", {"loss_type": "grpo"}),
        ("reinforce++", {"loss": "examples.own_losses:sapo"}),
    ],
)
def test_the_gradient_does_not_depend_on_the_cut(preset, settings, accumulated, whole, tmp_path):
    one = whole(preset, settings)
    cut = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 8 // accumulated}
    parts = run(tmp_path, preset=preset, **cut, **CUT, **settings)
    assert len(parts.steps[0].micro_batches) == accumulated
    assert_gradients(parts.steps[0].gradients, one.steps[0].gradients, 2e-6)
    assert logged(parts, "loss") == pytest.approx(logged(one, "loss"), abs=1e-6)


@pytest.mark.parametrize(("accumulated", "per_generation", "iterations"), [(1, 4, 1), (2, 4, 1), (4, 2, 1), (2, 2, 3)])
@pytest.mark.parametrize("preset", ["aepo", "grpo"])
def test_steps_per_generation_that_differ_from_accumulation(preset, accumulated, per_generation, iterations, tmp_path):
    trainer = run(
        tmp_path,
        preset=preset,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        max_steps=3,
        **MOVING,
    )
    for step in trainer.steps:
        if per_generation * iterations > accumulated:
            assert_step(step, truth_of(step, PolicyObjective.preset(preset), per_generation=per_generation))
        else:  # two generation batches in one step, each scored by the policy that is changed
            assert len(step.micro_batches) == accumulated
    if per_generation > accumulated:
        assert len({id(step.generation) for step in trainer.steps}) < len(trainer.steps)


def test_two_generation_batches_in_one_step(tmp_path):
    """Each has statistics and a divisor of its own, as in TRL; the step is their mean."""
    trainer = run(tmp_path, gradient_accumulation_steps=4, steps_per_generation=2, max_steps=1)
    (step,) = trainer.steps
    assert len(trainer.generations) == 2
    halves = []
    for i, generation in enumerate(trainer.generations):
        half = dataclasses.replace(step, generation=generation, micro_batches=step.micro_batches[2 * i : 2 * i + 2])
        halves.append(truth_of(half, PolicyObjective.preset("aepo")))
    assert sum(step.losses) == pytest.approx(sum(half.loss for half in halves) / 2, abs=2e-6)
    mean = {name: (x + halves[1].gradients[name]) / 2 for name, x in halves[0].gradients.items()}
    assert_gradients(step.gradients, mean)


# Advantages of AEPO


def test_advantages_are_aepos_with_statistics_of_the_whole_generation_batch(tmp_path):
    trainer = run(tmp_path, gradient_accumulation_steps=4, max_steps=1, objective={"entropy_advantage": 0.9})
    (generation,) = trainer.generations
    with torch.no_grad():
        entropy = scored(trl_oracle.float64_model(generation.weights), generation.batch)[1]
    mask = loss_mask(generation.batch)
    plain = group_estimate(generation)
    rows = torch.tensor([plain[key] for key in row_keys(generation.batch)], dtype=torch.float64)[:, None]
    expected = rows * (1 + 0.9 * (entropy - entropy[mask].mean()) / entropy[mask].std())
    found = generation.batch["advantages"]
    assert found.dtype == torch.float32
    assert found.shape == mask.shape
    torch.testing.assert_close(found[mask].double(), expected[mask], rtol=1e-4, atol=1e-5)  # float32 entropies
    assert logged(trainer, "policy/entropy_std") == pytest.approx([entropy[mask].std().item()], rel=1e-5)
    flips = ((expected * rows < 0) & mask).sum() / mask.sum()
    assert flips > 0
    assert logged(trainer, "policy/advantage_flips") == pytest.approx([flips.item()])


@pytest.mark.parametrize("clamp", [False, True])
def test_sign_flips_reach_the_loss(clamp, tmp_path):
    own = {"entropy_advantage": 1.5, "clamp_entropy_factor": clamp}
    trainer = run(tmp_path, objective=own, num_iterations=2, max_steps=2, **MOVING)
    for step in trainer.steps:
        assert_step(step, truth_of(step, PolicyObjective.preset("aepo", **own)))
    turned = logged(trainer, "policy/advantage_flips")[0]
    assert turned == 0 if clamp else turned > 0.1
    advantages = trainer.generations[0].batch["advantages"][loss_mask(trainer.generations[0].batch)]
    assert (advantages == 0).any() == clamp


def equal_rewards(completions, **_):
    return [0.3] * len(completions)


@pytest.mark.parametrize("preset", ["aepo", "reinforce++", "gspo", "cispo"])
def test_equal_rewards_have_no_gradient(preset, tmp_path):
    trainer = run(tmp_path, preset=preset, rewards=equal_rewards, num_iterations=2, **MOVING)
    for step in trainer.steps:
        assert all((x == 0).all() for x in step.gradients.values())
        assert step.losses == [0]


def some_unscorable(completions, **_):
    return [None if i % 3 == 0 else float(len(text)) for i, text in enumerate(completions)]


def test_a_completion_without_a_reward_takes_no_part(tmp_path):
    """Its tokens still count in the mean, as in TRL; and in AEPO's statistics."""
    trainer = run(tmp_path, rewards=some_unscorable, max_steps=1)
    (step,) = trainer.steps
    keys = row_keys(step.generation.batch)
    texts = trl_oracle.TOKENIZER.batch_decode([c for _, c in keys], skip_special_tokens=True)
    known = torch.tensor([len(text) for text in texts], dtype=torch.float64)[[1, 2]]
    advantages = dict.fromkeys(keys, 0.0)
    for i, value in zip((1, 2), known, strict=True):
        advantages[keys[i]] = ((value - known.mean()) / (known.std() + 1e-4)).item()
    assert_step(step, truth_of(step, PolicyObjective.preset("aepo"), advantages=advantages))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_scale_rewards(scale, tmp_path):
    trainer = run(tmp_path, scale_rewards=scale, per_device_train_batch_size=8, max_steps=1)
    (step,) = trainer.steps
    keys = row_keys(step.generation.batch)
    texts = trl_oracle.TOKENIZER.batch_decode([c for _, c in keys], skip_special_tokens=True)
    rewards = torch.tensor([len(text) for text in texts], dtype=torch.float64).view(2, 4)
    std = {"group": rewards.std(1, keepdim=True), "batch": rewards.std(), "none": torch.tensor(1.0 - 1e-4)}[scale]
    estimate = ((rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)).flatten().tolist()
    advantages = dict(zip(keys, estimate, strict=True))
    assert_step(step, truth_of(step, PolicyObjective.preset("aepo"), advantages=advantages))


def test_batch_advantages(tmp_path):
    trainer = run(tmp_path, preset="reinforce++", per_device_train_batch_size=8, max_steps=1)
    (step,) = trainer.steps
    keys = row_keys(step.generation.batch)
    texts = trl_oracle.TOKENIZER.batch_decode([c for _, c in keys], skip_special_tokens=True)
    rewards = torch.tensor([len(text) for text in texts], dtype=torch.float64)
    estimate = ((rewards - rewards.mean()) / rewards.std()).tolist()
    truth = truth_of(step, PolicyObjective(), advantages=dict(zip(keys, estimate, strict=True)))
    assert_step(step, truth)
    assert list(trainer._logs["advantages"]) == pytest.approx(estimate, rel=1e-6)


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
    ids = [
        [65 if token == trl_oracle.TOKENIZER.eos_token_id else token for token in x] for x in found["completion_ids"]
    ]
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
            model = trl_oracle.float64_model(step.weights)
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
            model = trl_oracle.float64_model(step.weights)
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


# Losses of the user's own


def sapo_oracle(b, entropy, tokens, rows, stats):
    """arXiv 2511.20347, over rows as they stand."""
    width = int(b.cu_seqlens[1])
    r = (b.logprobs - b.old_logprobs).exp().view(-1, width)
    a, mask = b.advantages.view(-1, width), b.mask.view(-1, width)
    tau = torch.where(a > 0, 1.0, 1.05)
    gain = 4 / tau / (1 + (-tau * (r - 1)).exp()) * a
    means = [row[m].mean() for row, m in zip(gain, mask, strict=True) if m.any()]
    return -torch.stack(means).sum() / rows


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


# Evaluation


@pytest.mark.parametrize("changed", [{"preset": "aepo"}, {"preset": "grpo"}, {"loss": "examples.own_losses:sapo"}])
def test_the_loss_of_an_evaluation(changed, tmp_path):
    """No accumulation and no iterations; statistics and divisors are those of an evaluation batch."""
    trainer = make_trainer(
        Recorded,
        AEPOConfig,
        tmp_path,
        rollout_func=made_up,
        eval_dataset=trl_oracle.EVALUATED,
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
