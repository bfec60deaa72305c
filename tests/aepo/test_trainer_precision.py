"""A run in bfloat16 goes on exactly, and may go on in another type, if the command names it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from test_trainer import config_for, outcome
from torch import Tensor
from trainer_toys import ToyLanguageModel, toy_agent

from aepo.run.files import read_facts
from aepo.trainer import Trainer


def trainer(directory: Path, steps: int, dtype: str, resume_step: int | None = None) -> Trainer:
    """At a learning rate that 16 bits cannot follow."""
    config = config_for(directory, f"train.steps={steps}", f"model.dtype={dtype}", "optimizer.learning_rate=1e-5")
    return Trainer(config, toy_agent(), ToyLanguageModel(getattr(torch, dtype)), resume_step=resume_step)


def saved(directory: Path, step: int) -> dict[str, Tensor]:
    checkpoint = directory / "checkpoints" / f"step_{step:06d}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def test_a_resumed_run_in_bfloat16_is_the_whole_one(tmp_path: Path) -> None:
    trainer(tmp_path / "whole", 4, "bfloat16").train()
    trainer(tmp_path / "parts", 2, "bfloat16").train()
    trainer(tmp_path / "parts", 4, "bfloat16", resume_step=2).train()
    assert outcome(tmp_path / "parts")[0] == outcome(tmp_path / "whole")[0]
    whole, parts = saved(tmp_path / "whole", 4), saved(tmp_path / "parts", 4)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    masters = {name: value for name, value in whole.items() if name.endswith("|master")}
    assert len(masters) == 24
    assert any(not torch.equal(value, whole[name.removesuffix("|master")].float()) for name, value in masters.items())


def test_a_run_goes_on_in_another_type(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer(run, 1, "bfloat16").train()
    wide = trainer(run, 2, "float32", resume_step=1)
    was = saved(run, 1)
    for name, parameter in wide.learner.model.named_parameters():
        assert torch.equal(parameter, was[f"{name}|master"]), name
    wide.train()
    narrow = trainer(run, 3, "bfloat16", resume_step=2)
    was = saved(run, 2)
    for name, parameter in narrow.learner.model.named_parameters():
        assert torch.equal(narrow.learner.optimizer.state[parameter]["master"], was[name]), name
    narrow.train()
    changed = [entry["changed"] for entry in read_facts(run)["resumed"]]
    assert [any("model.dtype was" in line for line in lines) for lines in changed] == [True, True]
