"""Rollouts through `vllm serve`: the engine's HTTP replica on a real server, with the plugin's routes."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from aepo.config import VLLMConfig
from aepo.rollout.engines.vllm import start
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.engines.vllm.http import headers
from aepo.rollout.engines.vllm.replica import ReplicaError, ReplicaGoneError
from aepo.rollout.engines.vllm.weight_clients import RemoteWeightClient
from aepo.rollout.sampler import Sampler
from aepo.vllm.weights import WeightSender, WeightUpdateError
from tests.aepo.engine_toys import EOS, VOCAB, assert_is_the_models_own, prompts, request, weights_of
from tests.integrations.conftest import qwen
from tests.integrations.test_vllm_rollout import CONFIG, EXACT, Agent, Tools, generate, questions, shape, talkative


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return talkative()


@pytest.fixture(scope="module")
def engine(url, model) -> Iterator[VLLMEngine]:
    settings = VLLMConfig(endpoints=(url,))
    made = start.connect(eos_ids=[EOS], vocab_size=VOCAB, settings=settings, version=4, weights=weights_of(model))
    yield made
    made.close()


def assert_nothing_is_left(url: str) -> None:
    status = httpx.get(f"{url}/aepo/status", headers=headers()).json()
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
    engine.refresh(5, weights_of(model))
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


def test_weights_that_others_have_changed_are_noticed(model, engine, url) -> None:
    directory = Path(httpx.get(f"{url}/aepo/status", headers=headers()).json()["weights_dir"])
    WeightSender([RemoteWeightClient(url)], qwen(torch.float32), directory).send(77)
    with pytest.raises(ReplicaError, match=r"weights version 77@[0-9a-f]+, expected 5@"):
        generate(engine, request([1]))
    engine.refresh(5, weights_of(model))
    generate(engine, request([1]))
    engine.release()
    assert_nothing_is_left(url)


class Writes(RemoteWeightClient):
    """Writes to a file through a map, after the server has checked it. The time of a page's first write is known."""

    def update_weights(self, update_info) -> None:
        if not update_info["withdraw"]:
            (path,) = Path(self.directory, update_info["directory"]).glob("00000.*")
            with path.open("r+b") as file:
                self.map = mmap.mmap(file.fileno(), 0)
            self.map[-4096:] = self.map[-4096:]
        super().update_weights(update_info)

    def finish_weight_update(self, weight_version=None) -> None:
        self.map[-4096:] = bytes(4096)
        super().finish_weight_update(weight_version)


def test_a_server_with_a_part_of_new_weights_says_so(model, engine, url) -> None:
    def status() -> dict:
        return httpx.get(f"{url}/aepo/status", headers=headers()).json()

    client = Writes(url)
    client.directory = status()["weights_dir"]
    with pytest.raises(WeightUpdateError, match=r"a part of the new weights only: .*changed after its check"):
        WeightSender([client], qwen(torch.float32), Path(client.directory)).send(6)
    assert status()["weight_version"] == "partly-loaded"
    with pytest.raises(ReplicaError, match="an update of its weights did not finish, a part may be old"):
        generate(engine, request([1]))
    with pytest.raises(ReplicaError, match="an update of its weights did not finish, a part may be old"):
        connect(url)
    engine.refresh(7, weights_of(model))
    assert status()["weight_version"].startswith("7@")
    generate(engine, request([1]))
    engine.release()
    assert_nothing_is_left(url)


def connect(url: str, vocab_size: int = VOCAB) -> None:
    settings = VLLMConfig(endpoints=(url,))
    start.connect(eos_ids=[EOS], vocab_size=vocab_size, settings=settings, version=0, weights=None)


def test_what_does_not_fit_is_said_when_connecting(url) -> None:
    with pytest.raises(ValueError, match="vocabulary is 260, expected 261"):
        connect(url, VOCAB + 1)
    with pytest.raises(ReplicaGoneError, match="does not answer: /v1/models: ConnectError"):
        connect("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("key", "message"), [(None, "is not set, and the server has a key"), ("wrong", "is none of the server's keys")]
)
def test_a_key_that_is_not_the_servers(url, monkeypatch, key, message) -> None:
    monkeypatch.delenv("VLLM_API_KEY")
    if key:
        monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(ReplicaError, match=f"VLLM_API_KEY of this environment {message}"):
        connect(url)
    with pytest.raises(WeightUpdateError, match=message) as failure:
        WeightSender([RemoteWeightClient(url)], qwen(torch.float32)).send(78)
    assert "every replica keeps the weights" in str(failure.value)
    assert "wrong" not in str(failure.value)


def test_a_key_that_cannot_be_sent_is_not_shown(url, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")
    with pytest.raises(ValueError, match="VLLM_API_KEY: expected printable ASCII") as failure:
        connect(url)
    assert "secret" not in str(failure.value)


def test_weights_from_another_directory_are_refused(engine, url, tmp_path) -> None:
    with pytest.raises(WeightUpdateError, match=r"is not there, of .*: trainer and engine must see the same directory"):
        WeightSender([RemoteWeightClient(url)], qwen(torch.float32), tmp_path).send(79)
    assert not list(tmp_path.iterdir())
    generate(engine, request([1]))  # has the weights that it had
    engine.release()
