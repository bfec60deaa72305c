"""Checkpoints of weights of 16 bits: nothing is lost that training needs, and a run may go on in another type.

A step at the default learning rate changes a weight by 1e-6, which 16 bits round away: what a master holds is not what
its weight says, so a test that mixes them up fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import checkpoints, load, rewrite, trained
from safetensors.torch import load_file
from torch import Tensor
from trainer_toys import ToyLanguageModel
from transformers import AutoModelForCausalLM

from aepo.learning.optimizer import MasterAdamW
from aepo.run.checkpoint import CheckpointError
from aepo.run.checkpoint_load import load_weights

NARROW = [torch.bfloat16, torch.float16]
NORM = "model.norm.weight"


def state(toy: ToyLanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By NAME and NAME|KEY, copied."""
    found = {}
    for name, parameter in toy.model.named_parameters():
        found[name] = parameter.detach().clone()
        found |= {f"{name}|{key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name].dtype == value.dtype, name
        assert torch.equal(other[name], value), name


def assert_masters_say_more(found: dict[str, Tensor]) -> None:
    masters = {name.removesuffix("|master"): value for name, value in found.items() if name.endswith("|master")}
    assert masters
    assert all(value.dtype == torch.float32 for value in masters.values())
    assert all(torch.equal(value.to(found[name].dtype), found[name]) for name, value in masters.items())
    assert all(not torch.equal(value, found[name].float()) for name, value in masters.items())


def step(toy: ToyLanguageModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    toy.model(input_ids=torch.tensor([[4, 5]])).logits.square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 1])  # of the other one: without a state to load into, and with one
@pytest.mark.parametrize("dtype", NARROW)
def test_a_run_in_16_bits_goes_on_exactly(tmp_path: Path, dtype: torch.dtype, steps: int) -> None:
    ours, other = trained(3, dtype), trained(steps, dtype, seed=1)
    saved = state(*ours)
    assert_masters_say_more(saved)
    path = checkpoints(tmp_path, *ours).save(7, None)
    written = json.loads((path / "state.json").read_text())
    assert (written["optimizer"], written["moments"], written["format"]) == ("AdamW", 24, 1)
    checkpoints(tmp_path, *other).load(7)
    assert_same(saved, state(*other))
    for _ in range(2):
        step(*ours)
        step(*other)
    assert_same(state(*ours), state(*other))


def test_what_is_in_the_files(tmp_path: Path) -> None:
    ours = trained(3, torch.bfloat16)
    path = checkpoints(tmp_path, *ours).save(7, None)
    files = load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")
    assert_same(state(*ours), files)


def test_a_checkpoint_of_before_has_no_masters_and_short_moments(tmp_path: Path) -> None:
    """torch's AdamW, which trained weights of 16 bits then, keeps moments in their type."""
    old = ToyLanguageModel(torch.bfloat16)
    optimizer = torch.optim.AdamW(old.model.parameters())
    for _ in range(2):
        step(old, optimizer)
    saved = state(old, optimizer)
    assert saved[f"{NORM}|exp_avg"].dtype == torch.bfloat16
    checkpoints(tmp_path, old, optimizer).save(7, None)
    toy, ours = trained(0, torch.bfloat16, seed=1)
    checkpoints(tmp_path, toy, ours).load(7)
    masters = {f"{name}|master": p.detach().float() for name, p in old.model.named_parameters()}
    wider = {name: value.float() if "|" in name else value for name, value in saved.items()}
    assert_same(wider | masters, state(toy, ours))
    step(toy, ours)
    assert_masters_say_more(state(toy, ours))


def test_float32_weights_are_the_masters_of_16_bits(tmp_path: Path) -> None:
    ours, other = trained(2, torch.bfloat16), trained(1, torch.float32, seed=1)
    saved = state(*ours)
    checkpoints(tmp_path, *ours).save(7, None)
    checkpoints(tmp_path, *other).load(7)
    weights = {name: saved.pop(f"{name}|master") for name in [*saved] if "|" not in name}
    assert_same(saved | weights, state(*other))


def test_masters_of_16_bits_are_the_float32_weights(tmp_path: Path) -> None:
    ours, other = trained(2, torch.float32), trained(1, torch.bfloat16, seed=1)
    saved = state(*ours)
    checkpoints(tmp_path, *ours).save(7, None)
    checkpoints(tmp_path, *other).load(7)
    for name in [name for name in saved if "|" not in name]:
        saved |= {f"{name}|master": saved[name], name: saved[name].bfloat16()}
    assert_same(saved, state(*other))
    assert_masters_say_more(saved)


def test_there_and_back_loses_nothing(tmp_path: Path) -> None:
    ours, narrow, back = trained(2), trained(0, torch.bfloat16), trained(0)
    checkpoints(tmp_path, *ours).save(1, None)
    checkpoints(tmp_path, *narrow).load(1)
    checkpoints(tmp_path, *narrow).save(2, None)
    checkpoints(tmp_path, *back).load(2)
    assert_same(state(*ours), state(*back))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_to_read_the_weights_alone_is_to_read_those_that_sampled(tmp_path: Path, dtype: torch.dtype) -> None:
    ours = trained(2, torch.bfloat16)
    path = checkpoints(tmp_path, *ours).save(7, None)
    toy = ToyLanguageModel(dtype, seed=1)
    load_weights(path, toy.model)
    for mine, theirs in zip(toy.model.parameters(), ours[0].model.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(dtype))


def test_weights_that_were_never_updated_have_no_masters(tmp_path: Path) -> None:
    toy, optimizer = trained(0, torch.bfloat16)
    toy.model.model.norm.weight.grad = torch.ones(32)  # that of no other
    optimizer.step()
    checkpoints(tmp_path, toy, optimizer).save(1, None)
    other = trained(2, torch.bfloat16, seed=1)
    checkpoints(tmp_path, *other).load(1)
    assert_same(state(toy, optimizer), state(*other))
    assert len(other[1].state) == 24, "asked for by `state`"
    assert sum(bool(kept) for kept in other[1].state.values()) == 1


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "missing": (lambda m: {k: v for k, v in m.items() if k != f"{NORM}|master"}, f"'{NORM}|master' is missing"),
    "shape": (
        lambda m: {**m, f"{NORM}|master": m[f"{NORM}|master"][:3].clone()},
        f"'{NORM}|master': expected the shape [32], got [3]",
    ),
    "kind": (lambda m: {**m, f"{NORM}|master": m[f"{NORM}|master"].int()}, "expected torch.float32, got I32"),
    "nan": (
        lambda m: {**m, f"{NORM}|master": m[f"{NORM}|master"] * float("nan")},
        f"'{NORM}|master' has values that are not finite",
    ),
    "of another weight": (
        lambda m: {**m, f"{NORM}|master": m[f"{NORM}|master"] * 1.01},
        f"'{NORM}|master' is not the master of {NORM} in model.safetensors",
    ),
    "too large": (
        lambda m: {**m, f"{NORM}|master": torch.full((32,), 1e300, dtype=torch.float64)},
        f"'{NORM}|master' has values that are not finite in torch.float32",
    ),
    "alone": (
        lambda m: {k: v for k, v in m.items() if not k.startswith(NORM) or k.endswith("|master")},
        f"'{NORM}|exp_avg' is missing (and 2 more)",
    ),
    "of another": (
        lambda m: {**m, "bias|master": m[f"{NORM}|master"].clone()},
        "optimizer.safetensors: expected moments of 24 parameters, got 25",
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", REFUSED)
def test_masters_that_do_not_fit_are_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    change, expected = REFUSED[name]
    path = checkpoints(tmp_path, *trained(2, torch.bfloat16)).save(7, None)
    rewrite(path, "optimizer.safetensors", change)
    toy, optimizer = trained(1, dtype, seed=1)
    before = state(toy, optimizer)
    with pytest.raises(CheckpointError) as error:
        load(path, toy.model, optimizer)
    assert str(error.value).startswith(f"cannot load checkpoint {path}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert_same(before, state(toy, optimizer))


def test_a_master_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    toy, optimizer = trained(2, torch.bfloat16)
    assert isinstance(optimizer, MasterAdamW)
    optimizer.state[toy.model.model.norm.weight]["master"][5] = float("inf")
    with pytest.raises(CheckpointError, match=rf"optimizer.safetensors: {NORM}\|master has values that are not finite"):
        checkpoints(tmp_path, toy, optimizer).save(2, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_transformers_loads_the_weights_in_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    ours, optimizer = trained(2, dtype)
    ours.model.generation_config.eos_token_id = [1, 6]
    path = checkpoints(tmp_path, ours, optimizer).save(7, None)
    assert json.loads((path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == dtype
    assert model.generation_config.eos_token_id == [1, 6]
    assert model.state_dict().keys() == ours.model.state_dict().keys()
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
