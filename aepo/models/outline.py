"""A model as its config.json describes it, without weights.

It lives on the meta device, where tensors have shapes and dtypes and no memory: 14 billion parameters take 0.2 seconds.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from aepo.models.adapters import refuse_adapter_directory
from aepo.registry import error_text

MOST_LAYERS = 10_000
"""Each is made: 10**12 of them would take all memory, of which a table is asked for."""

AT_LEAST_ONE = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
IF_GIVEN = ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")  # likewise


def read_model_config(directory: Path) -> PreTrainedConfig:
    """Of a model directory, of which no other file is needed. ValueError, in one line: it is no causal language model
    of transformers, holds an adapter or quantized weights, cannot be, or has layers that cannot be trained here."""
    refuse_adapter_directory(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: expected a model directory, with a config.json")
    written, _ = _of_transformers(PreTrainedConfig.get_config_dict, directory)
    for part in (written, written.get("text_config")):
        if isinstance(part, dict):
            _refuse_many_layers(directory, part.get("num_hidden_layers"))  # transformers lists a type for each
            _refuse_quantized(directory, part.get("quantization_config"))
    config = _of_transformers(AutoConfig.from_pretrained, directory, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{directory}: expected a causal language model, got model_type {config.model_type!r}")
    text = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise _error(directory, "text_config", text, "a configuration")
    other = {kind for kind in getattr(text, "layer_types", None) or () if kind != "full_attention"}
    if other:
        raise ValueError(
            f"{directory}: layers of type {sorted(other)}; expected full_attention alone, as trajectories are packed"
        )
    _refuse_sizes(directory, text)
    return config


def _of_transformers(read: Any, directory: Path, **options: bool) -> Any:
    try:
        return read(directory, local_files_only=True, **options)
    except Exception as error:  # transformers has no kind of its own
        raise ValueError(f"{directory}: expected a config.json of transformers: {error_text(error)}") from error


def _refuse_quantized(directory: Path, found: Any) -> None:
    """`aepo train` cannot load most of them. Of some, transformers makes whole weights, where there is no GPU."""
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ValueError(
            f"{directory}/config.json: quantization_config, of {method!r}; expected a model with whole weights: a run "
            "trains those, and the table counts them"
        )


def _refuse_many_layers(directory: Path, found: object) -> None:
    if isinstance(found, int) and found > MOST_LAYERS:
        raise _error(directory, "num_hidden_layers", found, f"at most {MOST_LAYERS:,}")


def _refuse_sizes(directory: Path, text: PreTrainedConfig) -> None:
    """Of models that cannot be: PyTorch makes some of them."""
    sizes: dict[str, Any] = {key: getattr(text, key, None) for key in AT_LEAST_ONE + IF_GIVEN}
    for key, size in sizes.items():
        if size is None and key in IF_GIVEN:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise _error(directory, text.attribute_map.get(key, key), size, "a whole number of at least 1")
    _refuse_many_layers(directory, sizes["num_hidden_layers"])
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"] or 1
    if heads % groups:
        raise _error(directory, "num_attention_heads", heads, f"a multiple of num_key_value_heads, {groups}")
    if sizes["head_dim"] is None and sizes["hidden_size"] % heads:
        expected = f"a multiple of num_attention_heads, {heads}, or a head_dim"
        raise _error(directory, "hidden_size", sizes["hidden_size"], expected)


def _error(directory: Path, key: str, found: object, expected: str) -> ValueError:
    return ValueError(f"{directory}/config.json: {key}={found!r}; expected {expected}")


def source(config: PreTrainedConfig) -> str:
    """The file, for errors."""
    return f"{config.name_or_path}/config.json" if config.name_or_path else type(config).__name__


@contextlib.contextmanager
def blamed_on(config: PreTrainedConfig, consequence: str) -> Iterator[None]:
    """Whatever is raised within comes of what the configuration says. ValueError, in one line, with the reason."""
    try:
        yield
    except Exception as error:  # KeyError, AssertionError and others: no model's code checks all that it is given
        raise ValueError(f"{source(config)}: {consequence}: {error_text(error)}") from error


def outline(config: PreTrainedConfig, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """The model on the meta device, in evaluation mode. layers: so many in place of its own number.

    ValueError, in one line: transformers cannot make it."""
    config = copy.deepcopy(config)
    config._attn_implementation = None  # of the machine where it was saved: here its package may be missing
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = ["full_attention"] * layers
    with blamed_on(config, "transformers cannot make this model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def number_of_parameters(model: PreTrainedModel) -> int:
    """Tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
