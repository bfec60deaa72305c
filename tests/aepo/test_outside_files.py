"""The model's directory lies outside of a run, and may change under it: another reference, another tokenizer, another
end of texts. A run goes on with what it was begun with, or says in one line what is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import format_templates
import pytest
import torch
from door_toys import FILES, SMALL, aepo, save_chat_model, write_home
from transformers import AutoModelForCausalLM, AutoTokenizer

from aepo.parallel import OneProcess
from aepo.run.checkpoint_fit import _tokenizer_parts, weights_sha256
from aepo.run.files import read_facts, read_records

RESUME = ("train", "--resume", "run", "train.steps=2")
EVAL = ("eval", "run", "--questions", "1")
ROLLOUT = ("rollout", "run", "--questions", "1", "--out", "trees")
REFERENCES = {
    "a preset": ("policy.kl_coef=0.1",),
    "a loss of one's own": ("policy.loss=mine:loss", "policy.reference=true"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one step, without a reference and with each kind."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_home(home)
        save_chat_model(home / "qwen", "qwen")
        for name, settings in {"none": (), **REFERENCES}.items():
            done = aepo("train", *SMALL, *FILES, "train.steps=1", *settings, f"run.dir={name}")
            assert done.code == 0, done.output
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def begun(name: str) -> None:
    Path(name).rename("run")


def other_weights() -> None:
    model = AutoModelForCausalLM.from_pretrained("qwen")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained("qwen")


def edit_json(path: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content, indent=3))


def changed() -> list[str]:
    return read_facts(Path("run"))["resumed"][-1].get("changed", [])


def start() -> str:
    return read_facts(Path("run"))["starting_weights"]


@pytest.mark.parametrize("kind", REFERENCES)
def test_another_reference_is_refused(home: Path, kind: str) -> None:
    begun(kind)
    before, began = Path("run/run.json").read_text(), start()
    assert began == weights_sha256(AutoModelForCausalLM.from_pretrained("qwen", dtype=torch.float32), OneProcess())
    shutil.copytree("qwen", "as_it_was")
    other_weights()
    now = weights_sha256(AutoModelForCausalLM.from_pretrained("qwen", dtype=torch.float32), OneProcess())
    assert aepo(*RESUME).failure == (
        "model.name = 'qwen': expected the weights that run was begun with, which are its reference (SHA-256 "
        f"{began[:12]}..), got others ({now[:12]}..). Put them back, or give model.name in this command, to say that "
        "these are meant from here on"
    )
    assert Path("run/run.json").read_text() == before
    assert aepo(*EVAL).code == 0, "which has no reference"
    shutil.rmtree("qwen")
    Path("as_it_was").rename("qwen")
    done = aepo(*RESUME)
    assert done.code == 0, done.output
    assert changed() == ["train.steps was 1 and is 2"]


def test_another_reference_that_is_meant_is_said(home: Path) -> None:
    """As a reference that is set anew to a later state is."""
    begun("a preset")
    other_weights()
    done = aepo(*RESUME, "model.name=qwen")
    assert done.code == 0, done.output
    line = next(one for one in changed() if one.startswith("the frozen starting weights were "))
    assert f"not as in the run: {line}" in done.output
    assert start() == weights_sha256(AutoModelForCausalLM.from_pretrained("qwen", dtype=torch.float32), OneProcess())
    assert read_records(Path("run/metrics.jsonl"))[-1]["policy.kl"] > 1e-6
    assert aepo(*RESUME).code == 0
    assert changed() == []


def test_a_reference_that_is_rounded_is_another(home: Path) -> None:
    begun("a preset")
    done = aepo(*RESUME, "model.dtype=bfloat16")
    assert done.code == 0, done.output
    assert any(one.startswith("the frozen starting weights were ") for one in changed())


def test_a_run_that_had_no_reference(home: Path) -> None:
    """Its weights are those of the checkpoint, whatever the directory holds; a reference is that of the beginning."""
    begun("none")
    began = start()
    other_weights()
    assert aepo(*RESUME).code == 0
    assert (changed(), start()) == (["train.steps was 1 and is 2"], began)
    assert "expected the weights that run was begun with" in aepo(*RESUME, "policy.kl_coef=0.1").failure


def test_a_run_of_before_goes_on(home: Path) -> None:
    """It has no record of its reference; it has one from then on."""
    begun("a preset")
    edit_json("run/run.json", lambda facts: facts.pop("starting_weights"))
    other_weights()
    assert aepo(*RESUME).code == 0
    assert changed() == ["train.steps was 1 and is 2"]
    assert start() == weights_sha256(AutoModelForCausalLM.from_pretrained("qwen", dtype=torch.float32), OneProcess())


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def another_end(content: dict[str, Any]) -> None:
    content["eos_token"] = "<|endoftext|>"


TOKENIZER = {
    "two tokens are swapped": ("qwen/tokenizer.json", swap, "its vocabulary is not as in step_000001"),
    "another normaliser": (
        "qwen/tokenizer.json",
        lambda content: content.update(normalizer={"type": "NFC"}),
        "its normalizer is not as in step_000001",
    ),
    "another token ends texts": (
        "qwen/tokenizer_config.json",
        another_end,
        "its eos_token is not as in step_000001",
    ),
    "another end in the generation's settings": (
        "qwen/generation_config.json",
        lambda content: content.update(eos_token_id=5),
        "generation_config.json: eos_token_id was None, here it is 5",
    ),
}


@pytest.mark.parametrize("what", TOKENIZER)
def test_another_tokenizer_is_refused(home: Path, what: str) -> None:
    begun("none")
    file, change, expected = TOKENIZER[what]
    edit_json(file, change)
    for command in (RESUME, EVAL, ROLLOUT):
        assert aepo(*command).failure == (
            "model.name = 'qwen': expected the tokenizer that the run has trained with, got another one: "
            f"{expected}. Put the files of the run's back, which are in run/checkpoints/step_000001"
        )
    for path in Path("run/checkpoints/step_000001").iterdir():  # as it says
        if path.name.startswith(("token", "special", "added", "generation")):
            shutil.copy(path, "qwen")
    for command in (RESUME, EVAL, ROLLOUT):
        assert aepo(*command).code == 0


def test_another_chat_template_is_refused(home: Path) -> None:
    begun("none")
    path = Path("qwen/chat_template.jinja")
    path.write_text(path.read_text().replace("# Tools", "# My tools"))
    for command in (RESUME, EVAL, ROLLOUT):
        assert "another agent: format.chat_template was " in aepo(*command).failure


@pytest.mark.parametrize("name", ["qwen/config.json", "qwen/tokenizer.json", "qwen/tokenizer_config.json"])
def test_a_file_that_was_only_written_anew_is_no_other(home: Path, name: str) -> None:
    begun("none")
    edit_json(name, lambda content: content.update(dict(sorted(content.items()))))
    for command in (RESUME, EVAL):
        assert aepo(*command).code == 0


def test_another_configuration_is_refused(home: Path) -> None:
    begun("none")
    edit_json("qwen/config.json", lambda content: content.update(rms_norm_eps=0.1))
    for command in (RESUME, EVAL):
        assert "config.json: rms_norm_eps was 1e-06, here it is 0.1" in aepo(*command).failure


@pytest.mark.parametrize("family", ["qwen", "gemma", "mistral", "glm"])
def test_a_tokenizer_that_was_saved_and_used_is_the_same(tmp_path: Path, family: str) -> None:
    tokenizer = format_templates.family(family)
    tokenizer.save_pretrained(tmp_path)
    tokenizer("a b c", truncation=True, max_length=2)
    assert _tokenizer_parts(AutoTokenizer.from_pretrained(tmp_path)) == _tokenizer_parts(tokenizer)
