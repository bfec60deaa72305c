"""The examples run as they stand, and do what they say."""

import copy
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import trainer_for
from transformers import Qwen3Config, Qwen3ForCausalLM

from aepo.own_loss import LossBatch
from aepo.run.log import read_records

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_drop_in_loss_teaches_the_digit(capsys):
    successes = runpy.run_path(str(EXAMPLES / "drop_in_loss.py"))["successes"]
    assert successes[0] < 0.2  # 100 of 1000 tokens are right: an untrained model finds one in ten
    assert successes[-1] > 0.95
    assert "step 20: success" in capsys.readouterr().out


def loss_batch(**changes: Any) -> LossBatch:
    """Two paths of three tokens and of one; ratios 1.5, 0.5, 1 and 2 to probabilities 0.3, 0.6, 0.5 and 0.01."""
    old = torch.tensor([0.3, 0.6, 0.5, 0.01], dtype=torch.float64).log()
    given = {"old_logprobs": old, "rollout_logprobs": old, "old_entropy": torch.ones(4), "ref_logprobs": None}
    given |= {"advantages": torch.tensor([2.0, -1.0, -3.0, 1.0]).double(), "cu_seqlens": torch.tensor([0, 3, 4])}
    given |= {"tokens": 8, "paths": 4, "max_tokens": 9, "entropy_stats": (1.0, 0.0), "temperature": 1.0}
    return LossBatch(**given | changes)


RATIOS = torch.tensor([1.5, 0.5, 1.0, 2.0], dtype=torch.float64)


def loss_and_slope(name: str, batch: LossBatch) -> tuple[float, torch.Tensor, dict[str, Any]]:
    function = runpy.run_path(str(EXAMPLES / "own_losses.py"))[name]
    logprobs = (batch.rollout_logprobs + RATIOS.log()).requires_grad_()
    loss, metrics = function(logprobs, torch.ones(4), batch)
    loss.backward()
    return loss.item(), logprobs.grad, metrics


def test_sapo_is_its_formula():
    """Of each token 4 / tau sigmoid(tau (r - 1)) A, means over the tokens of a path; d r = r d log p."""
    loss, slope, metrics = loss_and_slope("sapo", loss_batch())
    gates, slopes, share = [], [], [1 / 12, 1 / 12, 1 / 12, 1 / 4]  # of 4 paths, two are here
    for ratio, advantage, weight in zip(RATIOS.tolist(), (2.0, -1.0, -3.0, 1.0), share, strict=True):
        tau = 1.0 if advantage > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        gates.append(-4 / tau * gate * advantage * weight)
        slopes.append(-4 * gate * (1 - gate) * ratio * advantage * weight)
    assert loss == pytest.approx(math.fsum(gates), rel=1e-12)
    assert slope.tolist() == pytest.approx(slopes, rel=1e-12)
    assert slope[2].item() == pytest.approx(3 / 12, rel=1e-12), "at ratio 1 the slope is that of the ratio"
    assert 0 < metrics["slope"] < 1


def test_dppo_stops_what_moves_further_away():
    """By 0.2 of probability: 0.6 to 0.3 is more than that; 0.01 to 0.02 is little, whatever the ratio."""
    loss, slope, metrics = loss_and_slope("dppo", loss_batch())
    assert loss == pytest.approx(-(1.5 * 2 - 0 - 1 * 3 + 2 * 1) / 8, rel=1e-12)
    assert slope.tolist() == pytest.approx([-3 / 8, 0, 3 / 8, -2 / 8], rel=1e-12)
    assert metrics["stopped"] == 1 / 4
    back = loss_batch(advantages=torch.tensor([-2.0, 1.0, -3.0, -1.0]).double())  # the same moves, but back they may
    assert loss_and_slope("dppo", back)[2]["stopped"] == 0


def test_losses_of_ones_own_learn(capsys):
    successes = runpy.run_path(str(EXAMPLES / "own_losses.py"), run_name="__main__")["successes"]
    assert set(successes) == {"sapo", "dppo"}
    for name, success in successes.items():
        assert success[0] < 0.2, name
        assert success[-1] > 0.95, name
    assert "sapo, step 20: success" in capsys.readouterr().out


@pytest.fixture
def readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def rollout() -> dict[str, Any]:
    """What the README says that a rollout gives: two questions, eight answers to each, of several lengths."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        initializer_range=0.5,  # entropies that differ
    )
    length = torch.randint(7, 12, (16, 1))
    position = torch.arange(12)
    attention_mask = (position < length).long()
    completion_mask = attention_mask * (position >= 3) * (position != 6)  # three of the prompt, one of a tool
    return {
        "model": Qwen3ForCausalLM(config),
        "input_ids": torch.randint(1, 61, (16, 12)) * attention_mask,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "rewards": torch.randint(3, (16,)).float(),
    }


def loss_by_hand(names: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """AEPO's loss at the first update, in float64 and token by token, and its gradient for every parameter."""
    model = copy.deepcopy(names["model"]).double()
    model.zero_grad()
    log_p = model(names["input_ids"], attention_mask=names["attention_mask"]).logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    places = names["completion_mask"].nonzero().tolist()
    entropies = torch.stack([entropy[b, t - 1] for b, t in places])
    terms = []
    for b, t in places:
        group = names["rewards"][b // 8 * 8 : b // 8 * 8 + 8].double()
        advantage = (names["rewards"][b] - group.mean()) / group.std()
        advantage = advantage * (1 + 0.2 * (entropy[b, t - 1] - entropies.mean()) / entropies.std())
        logprob = log_p[b, t - 1, names["input_ids"][b, t]]
        terms.append((logprob - logprob.detach()).exp() * advantage)
    loss = -torch.stack(terms).mean()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("block", [0, 1], ids=["logits", "hidden states"])
def test_the_python_code_of_the_readme_trains_a_transformers_model(readme, block):
    """As it stands, and its loss and every gradient are those of the formula in float64."""
    assert len(readme) == 2
    names = rollout()
    truth, gradients = loss_by_hand(names)
    exec(readme[0], names)
    if block == 1:
        names["model"].zero_grad()
        exec(readme[1], names)
    assert names["metrics"]["valid_tokens"] == names["completion_mask"].sum()
    assert truth.abs() > 1e-3
    torch.testing.assert_close(names["loss"].double(), truth, rtol=1e-4, atol=1e-6)
    for name, parameter in names["model"].named_parameters():
        scale = gradients[name].abs().max().item()
        assert scale > 1e-6, name
        torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=0, atol=1e-4 * scale, msg=name)


@pytest.fixture
def own_loss_page() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_loss.md").read_text(encoding="utf-8"), re.S)


def test_the_page_on_losses_of_ones_own_trains_a_transformers_model(readme, own_loss_page):
    """Its first two blocks behind the README's: SAPO token by token in float64, and every gradient of both."""
    names = rollout()
    exec(readme[0], names)
    names["old_logprobs"] = names["old_logprobs"] - 0.3  # ratios of 1.35
    model = copy.deepcopy(names["model"]).double()
    model.zero_grad()
    log_p = model(names["input_ids"], attention_mask=names["attention_mask"]).logits.log_softmax(-1)
    terms = []
    for b, t in names["completion_mask"].nonzero().tolist():
        logprob, advantage = log_p[b, t - 1, names["input_ids"][b, t]], names["advantages"][b].item()
        tau = 1.0 if advantage > 0 else 1.05
        ratio = (logprob - logprob.detach() + 0.3).exp()
        terms.append(-4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage)
    truth = torch.stack(terms).mean()
    truth.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for block in own_loss_page[:2]:
        names["model"].zero_grad()
        exec(block, names)
        torch.testing.assert_close(names["loss"].double(), truth.detach(), rtol=1e-4, atol=1e-6)
        assert names["metrics"]["ratio_max"].item() == pytest.approx(math.exp(0.3), rel=1e-5)
        for name, parameter in names["model"].named_parameters():
            scale = gradients[name].abs().max().item()
            assert scale > 1e-6, name
            torch.testing.assert_close(parameter.grad.double(), gradients[name], rtol=0, atol=1e-4 * scale, msg=name)


def test_the_file_on_that_page_is_a_loss_of_the_trainer(own_loss_page, tmp_path, monkeypatch):
    assert len(own_loss_page) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "losses_of_the_page.py").write_text(own_loss_page[2])  # a name that no other test imports
    trainer_for(tmp_path / "run", "train.steps=1", "policy.loss=losses_of_the_page:sapo").train()
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    assert record["policy.gate"] == pytest.approx(2, abs=0.1), "4 / tau sigmoid(0), at ratio 1"


def test_every_example_is_tested():
    """The first two here, the last in test_your_trainer.py."""
    examples = ["drop_in_loss.py", "own_losses.py", "your_trainer.py"]
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == examples
