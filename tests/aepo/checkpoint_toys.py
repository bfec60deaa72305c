"""A tiny model that was trained, its optimizer, and checkpoints of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from trainer_toys import ToyLanguageModel
from transformers import PreTrainedModel

from aepo.config import Config, to_yaml
from aepo.learning.optimizer import make_optimizer
from aepo.models.language_model import LanguageModel
from aepo.parallel import OneProcess, Parallel
from aepo.run.checkpoint_load import load_state
from aepo.run.checkpoints import Checkpoints

YAML = to_yaml(Config())


def trained(
    steps: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[ToyLanguageModel, torch.optim.Optimizer]:
    toy = ToyLanguageModel(dtype, seed)
    optimizer = make_optimizer(toy.model, Config().optimizer)
    for step in range(steps):
        toy.model(input_ids=torch.tensor([[1, 2, 3 + step]])).logits.square().sum().backward()
        optimizer.step()
    return toy, optimizer


def checkpoints(
    directory: Path,
    toy: ToyLanguageModel | LanguageModel,
    optimizer: torch.optim.Optimizer,
    keep: int = 2,
    parallel: Parallel = OneProcess(),  # noqa: B008
) -> Checkpoints:
    return Checkpoints(
        directory,
        keep=keep,
        config_yaml=YAML,
        model=toy.model,
        tokenizer=toy.tokenizer,
        optimizer=optimizer,
        parallel=parallel,
    )


def save(directory: Path, step: int, success: float | None = None, keep: int = 2) -> Path:
    return checkpoints(directory, *trained(), keep).save(step, success)


def load(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    load_state(path, model, optimizer, OneProcess())


def fresh(seed: int = 1) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    model = ToyLanguageModel(seed=seed).model
    return model, make_optimizer(model, Config().optimizer)


def rewrite(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Another content of a file, with its right checksum."""
    file = path / name
    if name.endswith(".safetensors"):
        save_file(change(load_file(file)), file)
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    sums = [line.split("  ") for line in (path / "SHA256SUMS").read_text().splitlines()]
    lines = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for _, n in sums]
    (path / "SHA256SUMS").write_text("".join(lines))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
