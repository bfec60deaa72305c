"""AdamW with float32 masters, against AdamW on the masters alone and against float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import config_for
from torch import Tensor
from torch.optim.adamw import adamw
from trainer_toys import ToyLanguageModel, random_samples, tiny_model, toy_agent

from aepo.config import OptimizerConfig, load_config
from aepo.learning.learner import Learner
from aepo.learning.optimizer import MasterAdamW, make_optimizer
from aepo.parallel import OneProcess
from aepo.trainer import Trainer

SETTINGS = ("optimizer.learning_rate=1e-3", "optimizer.weight_decay=0.1", "optimizer.betas=[0.6,0.7]")


def gradients_of(model: torch.nn.Module, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=draw) for p in model.parameters()]


def test_masters_are_what_adamw_makes_of_float32_weights_and_the_model_has_them_rounded() -> None:
    config = load_config(overrides=[*SETTINGS]).optimizer
    narrow = tiny_model(torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    ours, theirs = make_optimizer(narrow, config), torch_adamw(wide, config)
    for step in range(3):
        for model, optimizer in ((narrow, ours), (wide, theirs)):
            for parameter, gradient in zip(model.parameters(), gradients_of(model, step), strict=True):
                parameter.grad = gradient
            optimizer.step()
    for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours.state[p]["master"], q)
        assert torch.equal(p, q.bfloat16())
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(ours.state[p][key], theirs.state[q][key]), key
            assert ours.state[p][key].dtype == torch.float32


def torch_adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [{"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, *vectors]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


@pytest.mark.parametrize("elements", [1, 3000, 1 << 27])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_masters_it_is_torchs(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and without anything more in its state; however many take their step together."""
    together: list[int] = []
    monkeypatch.setattr("aepo.learning.optimizer.ELEMENTS", elements)
    monkeypatch.setattr("aepo.learning.optimizer.adamw", counting(together))
    config = load_config(overrides=[*SETTINGS]).optimizer
    model = tiny_model(dtype)
    other = copy.deepcopy(model)
    ours, theirs = make_optimizer(model, config), torch_adamw(other, config)
    for step in range(3):
        for one, optimizer in ((model, ours), (other, theirs)):
            for parameter, gradient in zip(one.parameters(), gradients_of(one, step), strict=True):
                parameter.grad = gradient.to(dtype)
            optimizer.step()
    largest = max(p.numel() for p in model.parameters())
    assert max(together) <= max(elements, largest)
    assert sum(together) == 3 * sum(p.numel() for p in model.parameters())
    # Two that fit together are not apart, but where one group, or step, ends and the next begins: 3 x 2 of them.
    assert sum(one + next_one <= elements for one, next_one in itertools.pairwise(together)) <= 5
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(ours.state[p][key], theirs.state[q][key]) for key in theirs.state[q])


def counting(together: list[int]) -> Callable[..., None]:
    def counted(parameters: list[Tensor], *others: Any, **more: Any) -> None:
        together.append(sum(p.numel() for p in parameters))
        adamw(parameters, *others, **more)

    return counted


def test_steps_too_small_for_the_weights_add_up_in_the_masters() -> None:
    """A thousand of 1e-6 move a weight of 1 by 1e-3; bfloat16 tells 1 from 1 - 2^-8 and from nothing nearer."""
    weights = torch.nn.Module()
    weights.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = make_optimizer(weights, load_config(overrides=["optimizer.learning_rate=1e-6"]).optimizer)
    for _ in range(1000):
        weights.weight.grad = torch.ones(2, 2)
        optimizer.step()
    master = optimizer.state[weights.weight]["master"]
    torch.testing.assert_close(master, torch.full((2, 2), 1 - 1e-3), rtol=0, atol=2e-5)  # 2^-24 a step
    assert (weights.weight == 1).all(), "the nearest number of 16 bits"
    for _ in range(1500):
        weights.weight.grad = torch.ones(2, 2)
        optimizer.step()
    assert (weights.weight == 1 - 2**-8).all()


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    """In bfloat16, 1 + 2^-9 is 1 again, however often."""
    config = load_config(overrides=[*SETTINGS])
    model = tiny_model(torch.bfloat16)
    make_optimizer(model, config.optimizer)
    weight = model.model.norm.weight
    for part in (1.0, *[2.0**-9] * 8):
        (weight * part).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad == 1 + 8 * 2**-9).all()


def test_gradients_that_are_there_already_are_no_hindrance() -> None:
    model = tiny_model(torch.bfloat16)
    (model.model.norm.weight * 3).sum().backward()
    assert model.model.norm.weight.grad.dtype == torch.bfloat16
    make_optimizer(model, load_config(overrides=[*SETTINGS]).optimizer)
    (model.model.norm.weight * 3).sum().backward()
    assert torch.equal(model.model.norm.weight.grad, torch.full((32,), 3.0))


def test_parameters_without_a_gradient_stay() -> None:
    model = tiny_model(torch.bfloat16)
    optimizer = make_optimizer(model, load_config(overrides=["optimizer.learning_rate=0.1"]).optimizer)
    before = copy.deepcopy(model.state_dict())
    model.model.norm.weight.grad = torch.ones(32)
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["model.norm.weight"]
    assert [*optimizer.state] == [model.model.norm.weight]


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_step_in_bfloat16_is_near_that_in_float64(checkpointing: str) -> None:
    """One optimiser step of a real Learner: the masters move as the weights of the float64 model do. bfloat16 has 8
    bits, and gradients go through two layers: 5 % of the norm is what rounding gave (3.4 %)."""

    def moved(dtype: torch.dtype) -> Tensor:
        model = tiny_model(torch.bfloat16).to(dtype)  # the same weights
        setting = f"train.gradient_checkpointing={checkpointing}"
        config = load_config(overrides=[*SETTINGS[:2], "train.tokens_per_microbatch=25", setting])
        learner = Learner(model, config, str, OneProcess())
        batch = learner.pack_samples(random_samples(10), ["q0", "q1", "q2"])
        learner.backward(batch.minibatches[0], learner.entropy_stats(batch), batch.question_ids)
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    truth, ours = moved(torch.float64), moved(torch.bfloat16)
    assert ((ours - truth).norm() / truth.norm()).item() < 0.05


def test_a_run_in_bfloat16_goes_on_where_it_was(tmp_path: Path) -> None:
    """Masters, moments and weights, to the bit: two steps, and two more by another process, are four."""

    def states(trainer) -> list[Tensor]:
        state = trainer.parallel.state(trainer.learner.model, trainer.learner.optimizer, whole=True)
        return [value for _, value in sorted(state.items())]

    settings = ("train.steps=4", "model.dtype=bfloat16", "checkpoint.every=2", "checkpoint.keep=9", "train.epochs=2")
    config = config_for(tmp_path / "run", *settings)
    whole = Trainer(config, toy_agent(), ToyLanguageModel(torch.bfloat16))
    whole.train()
    assert type(whole.learner.optimizer) is MasterAdamW
    resumed = Trainer(config, toy_agent(), ToyLanguageModel(torch.bfloat16), resume_step=2)
    resumed.train()
    found, expected = states(resumed), states(whole)
    assert len(found) == len(expected) == 5 * len([*whole.learner.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
