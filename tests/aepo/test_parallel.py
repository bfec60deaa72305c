"""The six verbs of one process."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from trainer_toys import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from aepo.config import Config
from aepo.learning.optimizer import make_optimizer
from aepo.parallel import OneProcess, number_of_weights, state_dtype, trained

ONE = OneProcess()


def stepped(model, optimizer, names=None):
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            parameter.grad = torch.full(parameter.shape, 0.5, dtype=state_dtype(parameter))
    optimizer.step()
    optimizer.zero_grad()


def test_a_frozen_copy_is_reached_by_no_update() -> None:
    model = tiny_model()
    frozen, before = ONE.shard(model, frozen=True), copy.deepcopy(model.state_dict())
    assert ONE.shard(model) is model
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = make_optimizer(model, Config().optimizer)
    stepped(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not torch.equal(model.model.norm.weight, frozen.model.norm.weight)


def test_gradients_are_scaled_to_the_norm_and_what_it_was_is_returned() -> None:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = 2 * math.sqrt(sum(parameter.numel() for parameter in model.parameters()))
    assert ONE.clip(model, 5.0) == pytest.approx(norm, rel=1e-12)
    clipped = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert clipped.norm().item() == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_comes_once_under_all_of_its_names(tied: bool) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    model.register_buffer("scale", torch.tensor(2.0))
    found = dict(ONE.full_weights(model))
    assert sorted(name for names in found for name in names) == sorted(model.state_dict())
    assert (("model.embed_tokens.weight", "lm_head.weight") in found) == tied
    assert found[("scale",)].item() == 2.0
    for names, tensor in found.items():
        assert all(torch.equal(tensor, model.state_dict()[name]) for name in names)
    expected = 50 * 32 * (1 if tied else 2) + 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32
    assert number_of_weights(ONE, model) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_that_is_loaded_is_that_state_in_the_same_memory(dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    optimizer = make_optimizer(model, Config().optimizer)
    stepped(model, optimizer)
    live = ONE.state(model, optimizer, whole=True)
    keys = {"", "step", "exp_avg", "exp_avg_sq"} | ({"master"} if dtype == torch.bfloat16 else set())
    assert {name.partition("|")[2] for name in live} == keys
    then = {name: value.clone() for name, value in live.items()}
    for _ in range(3):
        stepped(model, optimizer)
    assert any(not torch.equal(live[name], then[name]) for name in live)
    ONE.load(model, optimizer, then.items())
    now = ONE.state(model, optimizer, whole=True)
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in then)
    assert all(now[name] is live[name] for name in live)
    stepped(model, optimizer)
    assert not torch.equal(then["model.norm.weight|exp_avg"], now["model.norm.weight|exp_avg"]), "no alias of what came"


def test_what_was_never_updated_then_is_dropped() -> None:
    model = tiny_model(torch.bfloat16)
    optimizer = make_optimizer(model, Config().optimizer)
    stepped(model, optimizer, names=("model.norm.weight",))
    then = {name: value.clone() for name, value in ONE.state(model, optimizer, whole=True).items()}
    stepped(model, optimizer)
    assert len(optimizer.state) == len(trained(model, optimizer))
    ONE.load(model, optimizer, then.items())
    assert [*optimizer.state] == [model.model.norm.weight]


def test_a_state_is_loaded_into_an_optimizer_that_has_none_yet() -> None:
    """In the types that it keeps: 16-bit moments of before become float32."""
    model = tiny_model(torch.bfloat16)
    optimizer = make_optimizer(model, Config().optimizer)
    stepped(model, optimizer)
    saved = {name: value.clone() for name, value in ONE.state(model, optimizer, whole=True).items()}
    narrow = {name: value.bfloat16() if "exp_avg" in name else value for name, value in saved.items()}
    fresh = tiny_model(torch.bfloat16, seed=1)
    other = make_optimizer(fresh, Config().optimizer)
    ONE.load(fresh, other, narrow.items())
    for name, value in ONE.state(fresh, other, whole=True).items():
        assert value.dtype == saved[name].dtype, name
        assert torch.equal(value, narrow[name].to(value.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_has_none_yet_keeps_no_alias_of_what_came(dtype: torch.dtype) -> None:
    """What came may be a snapshot that is to be loaded again."""
    model = tiny_model(dtype)
    optimizer = make_optimizer(model, Config().optimizer)
    stepped(model, optimizer)
    came = {name: value.clone() for name, value in ONE.state(model, optimizer, whole=True).items()}
    truth = {name: value.clone() for name, value in came.items()}
    fresh = tiny_model(dtype, seed=1)
    other = make_optimizer(fresh, Config().optimizer)
    ONE.load(fresh, other, came.items())
    stepped(fresh, other)
    assert all(torch.equal(value, truth[name]) for name, value in came.items())
    changed = ONE.state(fresh, other, whole=True)
    assert all(not torch.equal(changed[name], truth[name]) for name in truth if "|" in name)
