"""Claims about a step of AEPOTrainer, each against the float64 oracle (trl_oracle.py): loss and gradient are those of
the algorithm under every preset, with any advantages, and however a batch is cut.
"""

import dataclasses

import pytest
import torch
from trl_oracle import (
    assert_gradients,
    assert_step,
    float64_model,
    group_estimate,
    loss_mask,
    row_keys,
    scored,
    truth_of,
)
from trl_recorder import MOVING, TOKENIZER, logged, run

from aepo_kernels import PolicyObjective
from aepo_kernels.objective import PRESETS

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
        entropy = scored(float64_model(generation.weights), generation.batch)[1]
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
    texts = TOKENIZER.batch_decode([c for _, c in keys], skip_special_tokens=True)
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
    texts = TOKENIZER.batch_decode([c for _, c in keys], skip_special_tokens=True)
    rewards = torch.tensor([len(text) for text in texts], dtype=torch.float64).view(2, 4)
    std = {"group": rewards.std(1, keepdim=True), "batch": rewards.std(), "none": torch.tensor(1.0 - 1e-4)}[scale]
    estimate = ((rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)).flatten().tolist()
    advantages = dict(zip(keys, estimate, strict=True))
    assert_step(step, truth_of(step, PolicyObjective.preset("aepo"), advantages=advantages))


def test_batch_advantages(tmp_path):
    trainer = run(tmp_path, preset="reinforce++", per_device_train_batch_size=8, max_steps=1)
    (step,) = trainer.steps
    keys = row_keys(step.generation.batch)
    texts = TOKENIZER.batch_decode([c for _, c in keys], skip_special_tokens=True)
    rewards = torch.tensor([len(text) for text in texts], dtype=torch.float64)
    estimate = ((rewards - rewards.mean()) / rewards.std()).tolist()
    truth = truth_of(step, PolicyObjective(), advantages=dict(zip(keys, estimate, strict=True)))
    assert_step(step, truth)
    assert list(trainer._logs["advantages"]) == pytest.approx(estimate, rel=1e-6)
