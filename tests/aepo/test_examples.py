"""The examples run as they stand, and do what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_drop_in_loss_teaches_the_digit(capsys):
    successes = runpy.run_path(str(EXAMPLES / "drop_in_loss.py"))["successes"]
    assert successes[0] < 0.2  # 100 of 1000 tokens are right: an untrained model finds one in ten
    assert successes[-1] > 0.95
    assert "step 20: success" in capsys.readouterr().out


def test_every_example_is_tested_here():
    assert [path.name for path in EXAMPLES.glob("*.py")] == ["drop_in_loss.py"]
