"""The policies that can be trained here: the tiny model, SmolLM2, and any model directory."""

from __future__ import annotations

from pathlib import Path

import torch

from aepo.agents.tasks.facts.warmstart import Progress, warm_started
from aepo.config import ModelConfig, WarmStartConfig
from aepo.models.language_model import LanguageModel
from aepo.models.smollm2 import model_directory

__all__ = ["LanguageModel", "load_model"]


def load_model(
    config: ModelConfig,
    warm_start: WarmStartConfig,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LanguageModel:
    """The model by its name, in evaluation mode. The first time, `tiny` is trained and SmolLM2 converted.

    progress: of the warm start of the tiny model. ValueError: there is no model of this name, and no such directory.
    """
    dtype, cache_dir = getattr(torch, config.dtype), Path(config.cache_dir).expanduser()
    if config.name == "tiny":
        language_model = warm_started(warm_start, cache_dir, device=device, progress=progress)
        language_model.model.to(dtype)
        return language_model
    directory = model_directory(cache_dir) if config.name == "smollm2-135m-instruct" else Path(config.name).expanduser()
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"model.name = {config.name!r}: expected tiny, smollm2-135m-instruct, or a directory with a config.json"
        )
    return LanguageModel.from_directory(directory, dtype=dtype, device=device)
