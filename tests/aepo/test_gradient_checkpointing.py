"""train.gradient_checkpointing changes what is kept, and no number."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from trainer_toys import random_samples, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from aepo.config import load_config
from aepo.learning.forward import layers_to_recompute, row_logits
from aepo.learning.learner import Learner
from aepo.learning.pack_paths import pack
from aepo.parallel import OneProcess


def learner(model: torch.nn.Module, *settings: str) -> Learner:
    config = load_config(overrides=["train.tokens_per_microbatch=40", *settings])
    return Learner(model, config, str, OneProcess())


def loss_and_gradient(checkpointing: bool, *settings: str) -> tuple[float, Tensor]:
    ours = learner(tiny_model(), f"train.gradient_checkpointing={str(checkpointing).lower()}", *settings)
    batch = ours.pack_samples(random_samples(10), ["q0", "q1", "q2"])
    parts, _ = ours.backward(batch.minibatches[0], ours.entropy_stats(batch), batch.question_ids)
    assert len(parts) > 2
    return sum(part["loss"] for part in parts), torch.cat([p.grad.flatten() for p in ours.model.parameters()])


def own_loss(logprobs, entropy, batch):
    return ((logprobs - batch.old_logprobs).exp() * -batch.advantages).sum() / batch.tokens


@pytest.mark.parametrize("setting", ["policy.preset=aepo", "policy.preset=gspo", f"policy.loss={__name__}:own_loss"])
def test_loss_and_gradient_are_the_same(setting: str) -> None:
    loss, gradient = loss_and_gradient(True, setting)
    truth, expected = loss_and_gradient(False, setting)
    assert loss == truth
    assert torch.equal(gradient, expected)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("setting", ["policy.preset=aepo", "policy.preset=gspo", f"policy.loss={__name__}:own_loss"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_setting_reaches_every_forward_that_is_trained_on(setting: str, checkpointing: bool) -> None:
    """A layer runs once more for every micro-batch, in the backward."""
    ours = learner(tiny_model(), f"train.gradient_checkpointing={str(checkpointing).lower()}", setting)
    batch = ours.pack_samples(random_samples(10), ["q0", "q1", "q2"])
    runs = []
    for layer in ours.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))  # torch stops before the end of a second run
    ours.backward(batch.minibatches[0], ours.entropy_stats(batch), batch.question_ids)
    assert len(batch.minibatches[0]) > 2
    assert len(runs) == 2 * len(batch.minibatches[0]) * (2 if checkpointing else 1)


def kept_bytes(model: torch.nn.Module, checkpointing: bool) -> int:
    """What the forward keeps for the backward, parameters aside."""
    storages: dict[int, int] = {}

    def pack_tensor(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = pack(random_samples(8), dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        row_logits(model, batch, gradient_checkpointing=checkpointing)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_of_a_layer_its_input_is_kept_and_nothing_else() -> None:
    model, deeper = tiny_model(), tiny_model()
    deeper.model.layers.extend([copy.deepcopy(layer) for layer in deeper.model.layers])
    deeper.config.num_hidden_layers, deeper.config.layer_types = 4, 4 * ["full_attention"]  # in place of 2
    whole, deep = kept_bytes(model, False), kept_bytes(deeper, False)
    tokens = len(pack(random_samples(8)).input_ids)
    assert (deep - whole) / 2 > 10 * tokens * 32 * 8, "ten times the hidden states, in float64"
    assert kept_bytes(deeper, True) - kept_bytes(model, True) == 2 * tokens * 32 * 8
    assert kept_bytes(model, True) < whole / 3


def test_layers_are_as_they_were_afterwards() -> None:
    model, batch = tiny_model(), pack(random_samples(3), dtype=torch.float64)
    replaced = model.model.layers[1].forward

    def mine(*args, **kwargs):
        return replaced(*args, **kwargs)

    model.model.layers[1].forward = mine
    before = model.config._attn_implementation
    row_logits(model, batch, gradient_checkpointing=True).sum().backward()
    assert "forward" not in vars(model.model.layers[0])
    assert model.model.layers[1].forward is mine
    assert model.config._attn_implementation == before
    outside = replace(batch, input_ids=torch.full_like(batch.input_ids, 50))  # no token of this model
    with pytest.raises(IndexError):
        row_logits(model, outside, gradient_checkpointing=True)
    assert "forward" not in vars(model.model.layers[0])
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_models_have_such_layers(kind: str) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4))
    model = model.eval().double()
    assert len(layers_to_recompute(model)) == 3
    batch, found = pack(random_samples(4), dtype=torch.float64), []
    for checkpointing in (True, False):
        model.zero_grad()
        row_logits(model, batch, gradient_checkpointing=checkpointing).pow(2).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("how", ["a layer", "a wrapped layer", "the whole"])
def test_a_compiled_model_is_refused(how: str) -> None:
    """Nothing is compiled before it is called."""
    model = tiny_model()
    if how == "a layer":
        model.model.layers[1].compile()
    elif how == "a wrapped layer":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    else:
        model.compile()
    with pytest.raises(ValueError, match=r"train\.gradient_checkpointing = true: expected a model that torch\.compile"):
        learner(model, "train.gradient_checkpointing=true")


def test_a_model_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aepo.learning.learner.layers_to_recompute", lambda model: [])
    with pytest.raises(ValueError, match=r"train\.gradient_checkpointing = true: .*Qwen3ForCausalLM has none"):
        learner(tiny_model(), "train.gradient_checkpointing=true")
