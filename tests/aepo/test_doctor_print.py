"""What `aepo doctor MODEL_DIR` prints: whole numbers on 80 columns, and what to change where settings do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from aepo import cli
from aepo.doctor import fit

MODEL = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PLANS = ("kept", "kept, ref", "recomputed", "recomputed, ref")


def doctor(directory: Path, *arguments: str) -> str:
    MODEL.save_pretrained(directory)
    done = CliRunner().invoke(cli.app, ["doctor", str(directory), *arguments], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_number_is_whole_on_80_columns(tmp_path: Path, dtype: str) -> None:
    settings = (f"model.dtype={dtype}", "train.gradient_checkpointing=true", "policy.kl_coef=0.1")
    page = doctor(tmp_path, *settings)
    record = json.loads(doctor(tmp_path, *settings, "--json"))
    assert "\u2026" not in page
    assert max(map(len, page.splitlines())) <= 80
    lines = {line.rstrip() for line in page.splitlines()}
    for shown in {dtype, "float32", "bfloat16"}:
        plans = [plan for plan in record["plans"] if plan["model.dtype"] == shown]
        assert len(plans) == len(PLANS)
        heading = next(line for line in lines if line.startswith(f"{shown}, GiB"))
        assert ("> recomputed, ref" in heading) == (shown == dtype)
        for label, part in (("activations", "activations"), ("masters and moments", "state"), ("host", "host")):
            numbers = [f"{plan['bytes'][part] / 2**30:,.2f}" for plan in plans]
            assert any(line.startswith(label) and line.split()[-4:] == numbers for line in lines), (shown, label)


def test_where_the_settings_do_not_fit_it_says_what_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = json.loads(doctor(tmp_path, "--json"))["plans"]
    without = [plan for plan in plans if plan["model.dtype"] == "float32" and not plan["reference"]]
    kept, again = sorted(without, key=lambda plan: plan["train.gradient_checkpointing"])
    assert kept["bytes"]["device"] > 1.2 * again["bytes"]["device"]
    between = (kept["bytes"]["device"] + again["bytes"]["device"]) / 2 / 2**30
    below = 0.9 * again["bytes"]["device"] / 2**30
    monkeypatch.setattr(fit, "GPUS", (1e-6, 2e-6, below, between, 24))
    page = " ".join(doctor(tmp_path, "rollout.paths=1", "train.questions=1").split())
    nothing = "1e-06 GiB, 2e-06 GiB: does not fit; weights, gradients, masters and moments alone take 0.00 GiB"
    assert nothing in page
    assert f"{between} GiB: fits with train.gradient_checkpointing=true" in page
    assert f"{below} GiB: fits with " in page
    assert " 24 GiB: fits" not in page
