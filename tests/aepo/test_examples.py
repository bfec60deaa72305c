"""The examples run as they stand, and do what they say."""

import re
import runpy
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_drop_in_loss_teaches_the_digit(capsys):
    successes = runpy.run_path(str(EXAMPLES / "drop_in_loss.py"))["successes"]
    assert successes[0] < 0.2  # 100 of 1000 tokens are right: an untrained model finds one in ten
    assert successes[-1] > 0.95
    assert "step 20: success" in capsys.readouterr().out


def test_the_python_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    from_logits, from_hidden_states = blocks
    names = {
        "torch": torch,
        "model": torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 50)),
        "prompt": torch.arange(8),
        "token": torch.arange(8),
        "advantage": torch.linspace(-1, 1, 8),
        "mask": torch.ones(8, dtype=torch.int64),
    }
    exec(from_logits, names)
    head = names["model"][1]
    assert head.weight.grad.abs().sum() > 0
    head.weight.grad = None
    names |= {"head": head, "hidden": names["model"][0](names["prompt"])}
    exec(from_hidden_states, names)
    names["loss"].backward()
    assert head.weight.grad.abs().sum() > 0


def test_every_example_is_tested_here():
    assert [path.name for path in EXAMPLES.glob("*.py")] == ["drop_in_loss.py"]
