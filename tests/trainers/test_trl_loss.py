"""Claims about a step of AEPOTrainer, each against the float64 oracle (trl_oracle.py): loss and gradient are those of the
algorithm under every preset and setting, however a batch is cut; and those of GRPOTrainer where the method is the same.
"""

import dataclasses
import math

import pytest
import torch
import trl_oracle
from policy_oracle import policy_oracle
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
