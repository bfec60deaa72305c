"""rollout.engine=package.module:function: an engine of the user's own, in one file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import config_for, outcome, same, trainer_for, weights
from trainer_toys import ToyLanguageModel, toy_agent

from aepo.agents.protocol import AgentError
from aepo.config import load_config
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.trainer import Trainer

OWN = f"rollout.engine={__name__}:make"
MADE: list[Mine] = []


class Mine:
    """Generates with a copy of the weights that it is handed, as a server would."""

    lockstep = True

    def __init__(self, config: Any, language_model: Any, eos_ids: tuple[int, ...], version: int, weights: Any) -> None:
        self.copy = ToyLanguageModel(seed=5)
        self.inner = HuggingFaceEngine(self.copy.model, language_model.tokenizer, eos_ids, version=version)
        self.max_positions = 64
        self.closed = 0
        self.versions: list[int] = []
        self.refresh(version, weights)
        MADE.append(self)

    async def generate(self, requests: Any) -> Any:
        return await self.inner.generate(requests)

    def release(self) -> None:
        self.inner.release()

    def refresh(self, version: int, weights: Any) -> None:
        state = {name: tensor.clone() for names, tensor in weights for name in names}
        self.copy.model.load_state_dict(state)
        self.inner.refresh(version, iter(()))
        self.versions.append(version)

    def close(self) -> None:
        self.closed += 1


def make(config, language_model, eos_ids, version, weights):
    return Mine(config, language_model, eos_ids, version, weights)


def half(config, language_model, eos_ids, version, weights):
    return object()


def gone(config, language_model, eos_ids, version, weights):
    raise ConnectionRefusedError("nobody is there")


def short(config, language_model):
    return None


def test_a_run_with_it_is_that_of_the_trainers_own_engine(tmp_path: Path) -> None:
    """It has the same weights in every step; old log-probs are computed again."""
    settings = ("train.steps=3", "policy.old_logprobs=recompute")
    own, usual = trainer_for(tmp_path / "own", *settings, OWN), trainer_for(tmp_path / "usual", *settings)
    assert own.engine is MADE[-1]
    own.train()
    usual.train()
    assert MADE[-1].versions == [0, 1, 2, 3]
    assert MADE[-1].closed == 1
    assert same(weights(own), weights(usual))
    assert outcome(tmp_path / "own") == outcome(tmp_path / "usual")
    for ours, handed in zip(own.learner.model.parameters(), MADE[-1].copy.model.parameters(), strict=True):
        assert torch.equal(ours, handed)
    facts = json.loads((tmp_path / "own" / "run.json").read_text())
    assert Path(__file__).name in facts["code"]


def test_it_is_resumed_with_the_weights_of_its_step(tmp_path: Path) -> None:
    settings = ("train.steps=2", OWN)
    trainer_for(tmp_path / "run", *settings).train()
    resumed = trainer_for(tmp_path / "run", "train.steps=3", OWN, resume_step=2)
    assert MADE[-1].versions == [2]
    for ours, handed in zip(resumed.learner.model.parameters(), MADE[-1].copy.model.parameters(), strict=True):
        assert torch.equal(ours, handed)
    resumed.train()
    assert MADE[-1].versions == [2, 3]


def test_old_log_probs_are_the_trainers_unless_said_otherwise() -> None:
    assert load_config(overrides=[OWN]).recomputes_old_logprobs
    assert not load_config(overrides=[OWN, "policy.old_logprobs=engine"]).recomputes_old_logprobs


def test_a_prompt_must_fit_into_what_it_serves(tmp_path: Path) -> None:
    class Short(Mine):
        max_positions = property(lambda self: 2, lambda self, value: None)  # type: ignore[assignment]

    globals()["shorter"] = Short
    config = config_for(tmp_path / "run", f"rollout.engine={__name__}:shorter")
    with pytest.raises(ValueError, match=re.escape(f"max_positions of rollout.engine = {__name__}:shorter")):
        Trainer(config, toy_agent(), ToyLanguageModel())
    assert MADE[-1].closed == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("half", ValueError, "expected an engine .* got object without lockstep, max_positions, generate"),
        ("gone", AgentError, r"rollout.engine: gone failed: ConnectionRefusedError: nobody is there .*test_own_engine"),
        ("short", ValueError, "expected a function .*config, language_model, eos_ids, version, weights.* it is short"),
        ("nothing", ValueError, "rollout.engine = .*nothing"),
    ],
)
def test_what_is_wrong_with_it_is_said(tmp_path: Path, name: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        trainer_for(tmp_path / "run", f"rollout.engine={__name__}:{name}")
    assert not (tmp_path / "run").exists()


def test_another_word_is_none() -> None:
    message = r"rollout\.engine = 'vlm': expected huggingface, vllm, or package\.module:function: did you mean 'vllm'"
    with pytest.raises(ValueError, match=message):
        load_config(overrides=["rollout.engine=vlm"])
