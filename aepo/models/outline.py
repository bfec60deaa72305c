"""A model as its config.json describes it, without weights.

It lives on the meta device, where tensors have shapes and dtypes and no memory: 14 billion parameters take 0.2 seconds.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from aepo.models.adapters import refuse_adapter_directory
from aepo.registry import error_text


def read_model_config(directory: Path) -> PreTrainedConfig:
    """Of a model directory, of which no other file is needed. ValueError, in one line: it is no causal language model
    of transformers, holds an adapter, or has layers that cannot be trained here."""
    refuse_adapter_directory(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: expected a model directory, with a config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has no kind of its own
        raise ValueError(f"{directory}: expected a config.json of transformers: {error_text(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{directory}: expected a causal language model, got model_type {config.model_type!r}")
    other = {kind for kind in getattr(config.get_text_config(), "layer_types", None) or () if kind != "full_attention"}
    if other:
        raise ValueError(
            f"{directory}: layers of type {sorted(other)}; expected full_attention alone, as trajectories are packed"
        )
    return config


def outline(config: PreTrainedConfig, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """The model on the meta device, in evaluation mode. layers: so many in place of its own number."""
    config = copy.deepcopy(config)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = ["full_attention"] * layers
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def number_of_parameters(model: PreTrainedModel) -> int:
    """Tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
