"""The examples run as they stand, and do what they say."""

import copy
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_drop_in_loss_teaches_the_digit(capsys):
    successes = runpy.run_path(str(EXAMPLES / "drop_in_loss.py"))["successes"]
    assert successes[0] < 0.2  # 100 of 1000 tokens are right: an untrained model finds one in ten
    assert successes[-1] > 0.95
    assert "step 20: success" in capsys.readouterr().out


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


def test_every_example_is_tested_here():
    assert [path.name for path in EXAMPLES.glob("*.py")] == ["drop_in_loss.py"]
