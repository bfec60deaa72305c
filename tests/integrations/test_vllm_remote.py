"""Rollouts through `vllm serve`: the engine's HTTP replica on a real server, with the plugin's routes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
import torch

from aepo.config import VLLMConfig
from aepo.rollout.engines.vllm import ReplicaGoneError, VLLMEngine
from aepo.rollout.sampler import Sampler
from tests.aepo.engine_toys import EOS, VOCAB, assert_is_the_models_own, prompts, request
from tests.integrations.conftest import qwen
from tests.integrations.test_vllm_rollout import CONFIG, EXACT, Agent, Tools, generate, questions, shape, talkative


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return talkative()


@pytest.fixture(scope="module")
def engine(url, model) -> Iterator[VLLMEngine]:
    settings = VLLMConfig(endpoints=(url,))
    made = VLLMEngine.connect(eos_ids=[EOS], vocab_size=VOCAB, model=model, settings=settings, version=4)
    yield made
    made.close()


def assert_nothing_is_left(url: str) -> None:
    status = httpx.get(f"{url}/aepo/status").json()
    assert (status["records"], status["tokens"]) == (0, 0)


def double(model: torch.nn.Module) -> torch.nn.Module:
    truth = qwen(torch.float64)
    truth.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    return truth


def test_exact_numbers_under_the_trainers_weights(model, engine, url) -> None:
    temperatures = [1.0, 0.6, 0.0]
    asked = [
        request(p, 10, seed=2**64 - 1 - i, temperature=temperatures[i % 3]) for i, p in enumerate(prompts(1, 30, 64))
    ]
    for one, got in zip(asked, generate(engine, *asked), strict=True):
        assert got.version == 4
        assert_is_the_models_own(double(model), one, got, EXACT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    engine.refresh(5)
    for one, got in zip(asked, generate(engine, *asked), strict=True):
        assert got.version == 5
        assert_is_the_models_own(double(model), one, got, EXACT)
    engine.release()
    assert_nothing_is_left(url)


def test_greedy_trees_are_those_of_the_transformers_engine(model, engine, url) -> None:
    from tests.aepo.engine_toys import engine as transformers_engine

    config = replace(CONFIG, temperature=0.0)
    ours = Sampler(engine, Agent(Tools()), config).rollout(questions(3), seed=3)
    theirs = Sampler(transformers_engine(model), Agent(Tools()), config).rollout(questions(3), seed=3)
    assert [shape(tree) for tree in ours] == [shape(tree) for tree in theirs]
    assert engine.counters.prefilled < engine.counters.asked
    assert_nothing_is_left(url)


def test_weights_that_others_have_changed_are_noticed(engine, url) -> None:
    httpx.post(f"{url}/update_weight_version", json={"new_version": "77"}).raise_for_status()
    with pytest.raises(RuntimeError, match="weights version 77, expected 5"):
        generate(engine, request([1]))
    httpx.post(f"{url}/update_weight_version", json={"new_version": "5"}).raise_for_status()
    engine.release()
    assert_nothing_is_left(url)


def connect(url: str, vocab_size: int = VOCAB) -> None:
    settings = VLLMConfig(endpoints=(url,))
    VLLMEngine.connect(eos_ids=[EOS], vocab_size=vocab_size, model=None, settings=settings, version=0)


def test_what_does_not_fit_is_said_when_connecting(url) -> None:
    with pytest.raises(ValueError, match="vocabulary is 260, expected 261"):
        connect(url, VOCAB + 1)
    with pytest.raises(ReplicaGoneError, match="does not answer: ConnectError"):
        connect("http://127.0.0.1:9")
