"""The scripts of examples/trl as a user runs them, at toy size: one file, and the same file after one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from calling_toys import calling_model, calling_tokenizer
from trl_toys import make_model, make_tokenizer

FOLDER = Path(__file__).parents[2] / "examples/trl"
TINY = [
    "--use_cpu",
    "--bf16",
    "false",
    "--per_device_train_batch_size",
    "4",
    "--num_generations",
    "4",
    "--max_steps",
    "2",
    "--logging_steps",
    "1",
    "--report_to",
    "none",
    "--learning_rate",
    "1e-3",
]


def save(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(script: str, model: Path, out: Path, *more: str) -> list[dict]:
    """What the trainer logged."""
    arguments = ["--model_name_or_path", str(model), "--output_dir", str(out), "--save_strategy", "steps"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments, "--save_steps", "2", *TINY, *more],
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((out / "checkpoint-2/trainer_state.json").read_text())
    assert (out / "model.safetensors").exists()
    return [one for one in state["log_history"] if "loss" in one]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = make_tokenizer()
    return save(make_model(tokenizer), tokenizer, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def before(model, tmp_path_factory):
    return run("grpo.py", model, tmp_path_factory.mktemp("before"), "--max_completion_length", "24")


@pytest.mark.parametrize("script", ["grpo_patched.py", "grpo_aepo.py"])
def test_it_is_the_same_file_and_one_line(script):
    old = (FOLDER / "grpo.py").read_text().splitlines()
    new = (FOLDER / script).read_text().splitlines()
    assert len(new) == len(old) + 1
    [added] = [line for line in new if line not in old]
    assert added.startswith("from aepo.integrations.trl import ")
    new.remove(added)
    assert new == old


def test_after_one_line_the_same_losses(before, model, tmp_path):
    after = run("grpo_patched.py", model, tmp_path, "--max_completion_length", "24")
    assert [set(one) for one in after] == [set(one) for one in before]
    for name in ("loss", "grad_norm", "entropy", "reward"):
        # Float32 on both sides; the second step is taken with weights that the first one made.
        assert [one[name] for one in after] == pytest.approx([one[name] for one in before], rel=1e-4, abs=1e-6), name
    assert before[1]["grad_norm"] > 0


@pytest.mark.parametrize("preset", ["aepo", "grpo"])
def test_after_one_line_another_trainer(preset, before, model, tmp_path):
    logged = run("grpo_aepo.py", model, tmp_path, "--max_completion_length", "24", "--preset", preset)
    assert [one["reward"] for one in logged][:1] == [one["reward"] for one in before][:1]  # the first rollout is TRL's
    assert set(before[0]) < set(logged[0])
    assert ("policy/advantage_flips" in logged[0]) == (preset == "aepo")


def test_the_agent_branches(tmp_path):
    tokenizer = calling_tokenizer(["price"])
    folder = save(calling_model(tokenizer, ["price"], call=0.9), tokenizer, tmp_path / "model")
    rows = ("--per_device_train_batch_size", "8", "--num_generations", "8", "--max_completion_length", "160")
    rule = ("--branch_alpha", "0.7", "--fresh_paths", "2", "--preset", "aepo")
    logged = run("agent.py", folder, tmp_path / "out", *rows, *rule)
    assert [one["rollout/fresh_paths"] for one in logged] == [2, 2]
    assert sum(one["rollout/branches"] for one in logged) > 0
    assert sum(one["tools/call_frequency"] for one in logged) > 0
