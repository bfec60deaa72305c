"""What is of another model, tokenizer or optimizer is refused in one line, and nothing has changed by then."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import checkpoints, fresh, load, names, rewrite, save, trained
from run_toys import content, make_run
from safetensors.torch import load_file
from trainer_toys import ToyLanguageModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from aepo.config import Config
from aepo.learning.optimizer import make_optimizer
from aepo.models.language_model import LanguageModel
from aepo.parallel import OneProcess
from aepo.run.checkpoint import CheckpointError, verify_checkpoint
from aepo.run.checkpoint_fit import model_problem, require_tokenizer
from aepo.run.checkpoint_load import load_weights
from aepo.run.directory import RunDirectory


def without(found: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in keys}


def other_positions(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta is in rope_parameters since transformers 5."""
    if "rope_parameters" in config:
        return {**config, "rope_parameters": {**config["rope_parameters"], "rope_theta": 5.0}}
    return {**config, "rope_theta": 5.0}


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
OTHERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "newer": ("state.json", lambda s: {**s, "format": 2}, "format 2 is of a newer version of aepo, this one reads 1"),
    "no format": ("state.json", lambda s: without(s, "format"), "format: expected a whole number from 1, got None"),
    "old format": ("state.json", lambda s: {**s, "format": 0}, "format: expected a whole number from 1, got 0"),
    "few moments": ("state.json", lambda s: {**s, "moments": -1}, "moments: expected a whole number from 0, got -1"),
    "before": ("state.json", lambda s: {**s, "step": -1}, "step: expected a whole number from 0, got -1"),
    "no object": ("state.json", lambda s: [s], "state.json: expected an object, got list"),
    "text": ("state.json", lambda s: {**s, "step": "2"}, "step: expected a whole number from 0, got '2'"),
    "truth": ("state.json", lambda s: {**s, "step": True}, "step: expected a whole number from 0, got True"),
    "other step": ("state.json", lambda s: {**s, "step": 3}, "step 3 does not fit the directory's name"),
    "optimizer": ("state.json", lambda s: {**s, "optimizer": "SGD"}, "the optimizer was SGD, here it is AdamW"),
    "moments": ("state.json", lambda s: {**s, "moments": "all"}, "moments: expected a whole number from 0, got 'all'"),
    "type": ("config.json", lambda c: {**c, "model_type": "qwen2"}, "model_type was 'qwen2', here it is 'qwen3'"),
    "epsilon": ("config.json", lambda c: {**c, "rms_norm_eps": 0.1}, "rms_norm_eps was 0.1, here it is 1e-06"),
    "theta": ("config.json", other_positions, "rope_theta was 5"),
    "list": ("config.json", lambda c: [c], "config.json: expected an object, got list"),
    "class": ("config.json", lambda c: {**c, "num_hidden_layers": "two"}, "config.json cannot be used: "),
    "no weight": ("model.safetensors", lambda w: without(w, NORM), f"model.safetensors: {NORM!r} is missing"),
    "surplus": ("model.safetensors", lambda w: {**w, "bias": w[NORM].clone()}, "'bias' is not of this model"),
    "shape": ("model.safetensors", lambda w: {**w, NORM: w[NORM][:3].clone()}, "expected the shape [32], got [3]"),
    "kind": ("model.safetensors", lambda w: {**w, NORM: w[NORM].int()}, "expected torch.float32, got I32"),
    "nan": ("model.safetensors", lambda w: {**w, NORM: w[NORM] * float("nan")}, "values that are not finite"),
    "no moments": (
        "optimizer.safetensors",
        lambda m: {k: v for k, v in m.items() if not k.startswith(DOWN)},
        f"expected moments of 24 parameters, got 23, none of {DOWN!r}",
    ),
    "none at all": ("optimizer.safetensors", lambda m: {}, "expected moments of 24 parameters, got 0"),
    "other names": (
        "optimizer.safetensors",
        lambda m: {f"base.{k}": v for k, v in m.items()},
        "'base.model.embed_tokens.weight|exp_avg' is not of this model (and 71 more)",
    ),
    "no square": (
        "optimizer.safetensors",
        lambda m: without(m, f"{DOWN}|exp_avg_sq"),
        f"'{DOWN}|exp_avg_sq' is missing",
    ),
    "one more": (
        "optimizer.safetensors",
        lambda m: {**m, f"{DOWN}|max_exp_avg_sq": m[f"{DOWN}|exp_avg_sq"].clone()},
        f"'{DOWN}|max_exp_avg_sq' is not of this model",
    ),
    "too large": (
        "optimizer.safetensors",
        lambda m: {**m, f"{NORM}|exp_avg": torch.full((32,), 1e300, dtype=torch.float64)},
        f"'{NORM}|exp_avg' has values that are not finite in torch.float32",
    ),
    "below 0": (
        "optimizer.safetensors",
        lambda m: {**m, f"{NORM}|exp_avg_sq": -m[f"{NORM}|exp_avg_sq"] - 1},
        f"'{NORM}|exp_avg_sq' has values below 0",
    ),
    "steps below 0": (
        "optimizer.safetensors",
        lambda m: {**m, f"{NORM}|step": torch.tensor(-1.0)},
        f"'{NORM}|step' has values below 0",
    ),
    "records": ("state.json", lambda s: {**s, "records": [1]}, "records: expected size and hash of each file"),
    "a record": ("state.json", lambda s: {**s, "records": {"x": ["1", 2]}}, "records: expected size and hash"),
    "moment's shape": (
        "optimizer.safetensors",
        lambda m: {**m, f"{NORM}|exp_avg": m[f"{NORM}|exp_avg"][:2].clone()},
        "expected the shape [32], got [2]",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_another_is_refused_before_anything_changes(tmp_path: Path, name: str) -> None:
    file, change, expected = OTHERS[name]
    path = save(tmp_path, 2)
    rewrite(path, file, change)
    verify_checkpoint(path)
    model, optimizer = trained(1)[0].model, None
    optimizer = make_optimizer(model, Config().optimizer)
    model(input_ids=torch.tensor([[1, 2]])).logits.square().sum().backward()
    optimizer.step()
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError) as error:
        load(path, model, optimizer)
    assert str(error.value).startswith(f"cannot load checkpoint {path}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(v, after[i][k]) for i, entry in moments["state"].items() for k, v in entry.items())


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, _ = fresh()
    with pytest.raises(CheckpointError, match=r"the optimizer was AdamW, here it is Adam$"):
        load(save(tmp_path, 2), model, torch.optim.Adam(model.parameters()))


def test_parameters_without_a_gradient_have_no_moments(tmp_path: Path) -> None:
    toy = ToyLanguageModel()
    optimizer = make_optimizer(toy.model, Config().optimizer)
    for step in (0, 1):
        path = checkpoints(tmp_path, toy, optimizer).save(step, None)
        model, other = fresh()
        load(path, model, other)
        assert len(other.state) == step
        toy.model.model.norm.weight.grad = torch.ones(32)  # that of no other
        optimizer.step()


def test_loading_is_in_place_and_older_names_of_tied_weights_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    stored = load_file(path / "model.safetensors")
    assert "model.embed_tokens.weight" in stored, "vLLM passes over lm_head where it is tied"
    rewrite(path, "model.safetensors", lambda w: {k.replace("model.embed_tokens", "lm_head"): v for k, v in w.items()})
    model, _ = fresh()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    load_weights(path, model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_weights_of_a_damaged_checkpoint_are_not_loaded(tmp_path: Path, name: str) -> None:
    """One flipped bit, which leaves every number finite and every file readable."""
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    place = len(content) - 4 if name.endswith(".safetensors") else content.rindex(b" ")
    content[place] ^= 1 if name.endswith(".safetensors") else ord(" ") ^ ord("\t")
    file.write_bytes(content)
    model, _ = fresh()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f"^corrupt checkpoint: .*{name} does not have the checksum it was"):
        load_weights(file.parent, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "mistral", "gemma3_text", "gemma2", "qwen3_moe", "olmo2", "granite"]
)
def test_other_architectures_fit_themselves_and_load_in_transformers(tmp_path: Path, kind: str, tie: bool) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 18, "num_experts": 8, "moe_intermediate_size": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, tie_word_embeddings=tie)).eval()
    optimizer = make_optimizer(model, Config().optimizer)
    path = checkpoints(tmp_path, LanguageModel(model, ToyLanguageModel().tokenizer), optimizer).save(0, None)
    load(path, model, optimizer)
    loaded, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    load_weights(path, loaded)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


# What belongs to a model besides its weights


def test_all_ends_of_text_of_the_model_are_kept(tmp_path: Path) -> None:
    toy, optimizer = trained()
    toy.model.generation_config.eos_token_id = [1, 6]
    toy.model.generation_config.temperature = 0.9  # without sampling: transformers does not save that
    path = checkpoints(tmp_path, toy, optimizer).save(1, None)
    before = LanguageModel(toy.model, toy.tokenizer).eos_ids
    assert before == (1, 6)
    assert LanguageModel.from_directory(path, dtype=torch.float32, device="cpu").eos_ids == before


@pytest.mark.parametrize("was", [1, [1], [1, 5], [5, 1], [5, 1, 5]])
@pytest.mark.parametrize("now", [1, [1], [1, 5], [5, 1]])
def test_ends_of_text_are_the_same_in_any_order(was: Any, now: Any, tmp_path: Path) -> None:
    toy, optimizer = trained()
    same = {*(was if isinstance(was, list) else [was])} == {*(now if isinstance(now, list) else [now])}
    for owner, what in ((toy.model.config, "config.json"), (toy.model.generation_config, "generation_config.json")):
        owner.eos_token_id = was
        path = checkpoints(tmp_path, toy, optimizer).save(1, None)
        owner.eos_token_id = now
        language_model = LanguageModel(toy.model, toy.tokenizer)
        with contextlib.nullcontext() if same else pytest.raises(ValueError, match=f"{what}: eos_token_id was"):
            if problem := model_problem(path, toy.model, OneProcess()):
                raise ValueError(problem)
            require_tokenizer(path, language_model, "toy")


def test_a_tokenizer_with_several_chat_templates(tmp_path: Path) -> None:
    toy, optimizer = trained()
    toy.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    path = checkpoints(tmp_path, toy, optimizer).save(1, None)
    assert "  additional_chat_templates/tool_use.jinja\n" in (path / "SHA256SUMS").read_text()
    verify_checkpoint(path)
    assert AutoTokenizer.from_pretrained(path).chat_template == toy.tokenizer.chat_template


def test_a_checkpoint_with_folders_is_removed_like_any(tmp_path: Path) -> None:
    """Several chat templates are in a folder, which no list of files names: it is not somebody else's."""
    run = tmp_path / "run"
    make_run(run, steps=1)
    shutil.rmtree(run / "checkpoints")
    toy, optimizer = trained()
    toy.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for step in (1, 1, 2, 3):
        path = checkpoints(run / "checkpoints", toy, optimizer, keep=1).save(step, None)
    assert (path / "additional_chat_templates" / "tool_use.jinja").exists()
    assert names(run / "checkpoints") == ["step_000003"]
    with RunDirectory.claim(run, overwrite=True) as held:
        held.replace_old()
    assert content(run) == {}
