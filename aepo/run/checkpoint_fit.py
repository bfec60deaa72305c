"""Whether what a checkpoint holds is of this model, tokenizer and optimizer. Nothing is changed by asking."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from aepo.files.tensors import DTYPES, is_finite, sha256_of_tensors
from aepo.parallel import Parallel, state_dtype
from aepo.registry import error_text

if TYPE_CHECKING:
    from aepo.models.language_model import LanguageModel

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
MASTER = "master"  # beside them, of every parameter or of none
# Of the configuration: what says nothing about which function of its tokens the model is. (Where positions have a
# table, its shape tells how many.)
IGNORED = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "architectures",
    "use_cache",
    "return_dict",
    "max_position_embeddings",
)
_FLOATING = [name for dtype, name in DTYPES.items() if dtype.is_floating_point]


def model_problem(path: Path, model: PreTrainedModel, parallel: Parallel) -> str | None:
    """Why the weights in this directory are not of this model, or None."""
    try:
        text = (path / "config.json").read_text(encoding="utf-8")
        if difference := _config_difference(json.loads(text), model.config):
            return f"config.json: {difference}"
    except Exception as error:  # whatever the class of a configuration raises
        return f"config.json cannot be used: {error_text(error)}"
    expected = {names: torch.empty_like(t, device="meta") for names, t in parallel.full_weights(model)}
    known = {name for names in expected for name in names}
    file = path / "model.safetensors"
    found = _names(file)
    wanted = {next((name for name in names if name in found), names[0]): tensor for names, tensor in expected.items()}
    return _tensors_problem(file, wanted, known)


def moments_problem(path: Path, trained: Mapping[str, Tensor], optimizer: str, state: Mapping[str, Any]) -> str | None:
    """Why the moments, and masters, in this directory are not of this optimizer, or None. trained: its parameters by
    name. optimizer: its class. state: of state.json."""
    written = state.get("optimizer", "AdamW")
    if written != optimizer:
        return f"state.json: the optimizer was {written}, here it is {optimizer}"
    file = path / "optimizer.safetensors"
    names = _names(file)
    found = {name.rpartition("|")[0] for name in names}
    if missing := state.get("moments", len(found)) - len(found):
        name = next((name for name in trained if name not in found), "")
        return f"{file.name}: expected moments of {len(found) + missing} parameters, got {len(found)}, none of {name!r}"
    have_masters = any(name.endswith(f"|{MASTER}") for name in names)
    wanted = {
        f"{name}|{key}": _like(parameter, key)
        for name, parameter in trained.items()
        if name in found
        for key in (*MOMENTS, *([MASTER] if have_masters else []))
    }
    return _tensors_problem(file, wanted, set(wanted)) or _values_problem(path, trained)


def _like(parameter: Tensor, key: str) -> Tensor:
    """What the optimizer keeps under this key, in shape and type."""
    if key == "step":
        return torch.zeros((), device="meta")
    return torch.empty_like(parameter, dtype=state_dtype(parameter), device="meta")


def _values_problem(path: Path, trained: Mapping[str, Tensor]) -> str | None:
    """Numbers that no AdamW has kept: less than nothing, or a master of another weight than the one that is saved."""
    with (
        safe_open(path / "optimizer.safetensors", "pt") as file,
        safe_open(path / "model.safetensors", "pt") as weights,
    ):
        names, saved = set(file.keys()), set(weights.keys())
        for name in trained:
            for key in ("step", "exp_avg_sq"):
                if f"{name}|{key}" in names and bool((file.get_tensor(f"{name}|{key}") < 0).any()):
                    return f"optimizer.safetensors: '{name}|{key}' has values below 0"
            if f"{name}|{MASTER}" in names and name in saved:
                weight = weights.get_tensor(name)
                if not torch.equal(file.get_tensor(f"{name}|{MASTER}").to(weight.dtype), weight):
                    return f"optimizer.safetensors: '{name}|{MASTER}' is not the master of {name} in model.safetensors"
    return None


def require_tokenizer(path: Path, language_model: LanguageModel, name: str) -> None:
    """ValueError, in one line: the tokenizer, or what ends a text, is not as in this checkpoint. name: model.name.

    Both tokenizers are loaded by the same code, so that another version of transformers is no difference. The chat
    template is not looked at here: it is of the format (`aepo.agents.remembered`).
    """
    if problem := _tokenizer_problem(path, language_model):
        raise ValueError(
            f"model.name = {name!r}: expected the tokenizer that the run has trained with, got another one: {problem}. "
            f"Put the files of the run's back, which are in {path}"
        )


def _tokenizer_problem(path: Path, language_model: LanguageModel) -> str | None:
    try:
        written = _tokenizer_parts(AutoTokenizer.from_pretrained(path, local_files_only=True))
    except Exception as error:  # transformers has no kind of its own
        return f"that of {path.name} cannot be loaded: {error_text(error)}"
    here = _tokenizer_parts(language_model.tokenizer)
    if part := next((part for part in here if here[part] != written.get(part)), None):
        return f"its {part} is not as in {path.name}"
    file = path / "generation_config.json"
    if file.is_file():  # the first checkpoints have none
        was = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        now = getattr(getattr(language_model.model, "generation_config", None), "eos_token_id", None)
        if _ids(was) != _ids(now):
            return f"{file.name}: eos_token_id was {was!r}, here it is {now!r}"
    return None


def _ids(given: Any) -> set[Any]:
    """Of eos_token_id: any of them ends a text, so one in a list is that one, and their order says nothing."""
    return set(given) if isinstance(given, list) else {given}


def _tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides what a text's tokens are. Every call sets truncation and padding anew."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["vocabulary"] = parts.pop("model")
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return {part: value for part, value in parts.items() if part not in ("truncation", "padding")} | roles


def weights_sha256(model: PreTrainedModel, parallel: Parallel) -> str:
    """Of all weights as they are, whole, in their type."""
    return sha256_of_tensors({names[0]: tensor for names, tensor in parallel.full_weights(model)})


def _names(file: Path) -> frozenset[str]:
    """Of the tensors in the file; none where it cannot be read, which `_tensors_problem` says."""
    try:
        with safe_open(file, "pt") as opened:
            return frozenset(opened.keys())
    except (OSError, SafetensorError):
        return frozenset()


def _tensors_problem(file: Path, wanted: Mapping[str, Tensor], known: set[str]) -> str | None:
    """wanted: what must be there. known: names that may."""
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            if missing := sorted(wanted.keys() - names):
                return f"{file.name}: {missing[0]!r} is missing{_and_more(missing)}"
            if surplus := sorted(names - known):
                return f"{file.name}: {surplus[0]!r} is not of this model{_and_more(surplus)}"
            for name, tensor in wanted.items():
                part = opened.get_slice(name)
                shape, dtype = list(part.get_shape()), part.get_dtype()
                if shape != list(tensor.shape):
                    return f"{file.name}: {name!r}: expected the shape {list(tensor.shape)}, got {shape}"
                if dtype != DTYPES.get(tensor.dtype) and not (tensor.is_floating_point() and dtype in _FLOATING):
                    return f"{file.name}: {name!r}: expected {tensor.dtype}, got {dtype}"
                value = opened.get_tensor(name)
                if not is_finite(value, tensor.dtype if value.is_floating_point() else None):
                    as_here = "" if not is_finite(value) else f" in {tensor.dtype}"
                    return f"{file.name}: {name!r} has values that are not finite{as_here}"
    except (OSError, SafetensorError) as error:
        return f"{file.name} cannot be read: {error_text(error)}"
    return None


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _config_difference(written: Any, config: PreTrainedConfig) -> str | None:
    """The first key with another value. Both sides take the same way, so that defaults are filled in alike."""
    if not isinstance(written, dict):
        return f"expected an object, got {type(written).__name__}"
    here = json.loads(config.to_json_string())
    if written.get("model_type") != here.get("model_type"):
        return f"model_type was {written.get('model_type')!r}, here it is {here.get('model_type')!r}"
    was, now = (
        dict(_flat(json.loads(type(config).from_dict(c).to_json_string(use_diff=False)))) for c in (written, here)
    )
    for key in sorted(was.keys() | now.keys()):
        is_end = key.rpartition(".")[2] == "eos_token_id"
        if was.get(key) != now.get(key) and not (is_end and _ids(was.get(key)) == _ids(now.get(key))):
            return f"{key} was {was.get(key)!r}, here it is {now.get(key)!r}"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in IGNORED:
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
