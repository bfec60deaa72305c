"""The routes of `vllm serve`, on a real server. Its engine runs in processes of its own, so this is also the test of
what crosses between them."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import torch

from aepo.vllm.endpoints import EntropyEndpoints, entropies
from tests.aepo.engine_toys import VOCAB, prompts
from tests.integrations.toys import NATS, entropy


@pytest.fixture(scope="module")
def server(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def complete(server, prompt, key=None, tokens=8, temperature=1.0, **more):
    body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": temperature, "ignore_eos": True, **more}
    body |= {"logprobs": VOCAB, "return_tokens_as_token_ids": True}
    body |= {"vllm_xargs": {"aepo_key": key}} if key else {}
    return server.post("/v1/completions", json=body)


def post(server, route, **body):
    answer = server.post(f"/aepo/{route}", json=body)
    return answer.status_code, answer.json()


def status(server):
    return server.get("/aepo/status").raise_for_status().json()


def truth(answer):
    """From the server's full-vocabulary log-probs, which are those at the request's temperature."""
    tokens = answer.raise_for_status().json()["choices"][0]["logprobs"]["top_logprobs"]
    assert {len(token) for token in tokens} == {VOCAB}
    return entropy(torch.tensor([list(token.values()) for token in tokens], dtype=torch.float64))


def test_entropies_and_decisions(server):
    """Requests at the same time, two of three tracked; a decision from a record that stays."""
    asked, temperatures = prompts(3, 17, 9), [1.0, 0.6, 0.0]
    with ThreadPoolExecutor(3) as pool:
        sent = [
            pool.submit(complete, server, prompt, f"k{i}" if i else None, 8 + i, temperatures[i])
            for i, prompt in enumerate(asked)
        ]
        done = [future.result() for future in sent]
    query = {"window": 4, "alpha": 0.5, "gamma": 0.2, "initial_key": "k2"}
    code, answer = post(server, "decisions", queries={"k1": query, "k2": {**query, "window": 11}})
    assert code == 200
    decided = answer["decisions"]
    assert decided["k2"] is None
    code, answer = post(server, "entropies", keys={"k1": 9, "k2": 10})
    assert code == 200
    values = answer["entropies"]
    for i in (1, 2):
        assert values[f"k{i}"] == pytest.approx(truth(done[i]), abs=NATS)
    assert decided["k1"]["entropy"] == pytest.approx(sum(values["k1"][:4]) / 4, rel=1e-12)
    assert type(decided["k1"]["branch"]) is bool
    now = status(server)
    assert (now["records"], now["tokens"], now["live"]) == (0, 0, 0)
    assert (now["runner"], now["vocab_size"], now["max_model_len"]) == ("v1", VOCAB, 256)


def test_problems_are_answers(server):
    complete(server, prompts(4)[0], "good").raise_for_status()
    assert post(server, "entropies", keys=["good", "nobody"]) == (
        409,
        {"problems": {"nobody": "unknown: never run, forgotten, or fetched before"}},
    )
    assert post(server, "forget", keys=["good", "nobody"]) == (200, {"forgotten": 1})
    for route, body, message in (
        ("entropies", {"keys": "good"}, "keys must be a collection of str"),
        ("entropies", {"key": ["good"]}, "body must be an object with 'keys'"),
        ("decisions", {"queries": {"good": {"alpha": 1}}}, r"queries['good']"),
        ("decisions", {"queries": ["good"]}, "queries must be a mapping"),
    ):
        code, answer = post(server, route, **body)
        assert code == 400
        assert message in answer["error"]
    assert server.post("/aepo/forget", content="{").status_code == 400
    assert post(server, "forget", keys=None) == (200, {"forgotten": 0})


def test_a_request_that_cannot_be_tracked(server):
    answer = complete(server, prompts(4)[0], "twins", n=2)
    assert answer.status_code == 400
    assert "n must be 1" in answer.text


def test_null_for_nan_and_ranks_that_do_not_sample():
    async def collective_rpc(method, args):
        return [None, {"values": {"a": [0.5, math.nan]}, "problems": {}}]

    async def get_weight_version():
        return "3"

    engine = SimpleNamespace(collective_rpc=collective_rpc, get_weight_version=get_weight_version)
    answer = asyncio.run(entropies(engine, {"keys": ["a"]}))
    assert answer == {"entropies": {"a": [0.5, None]}, "weight_version": "3"}


def test_a_server_without_the_other_flags():
    async def collective_rpc(method):
        raise NotImplementedError("no aepo_status")

    start = EntropyEndpoints().init_state(SimpleNamespace(collective_rpc=collective_rpc), SimpleNamespace(), None)
    with pytest.raises(RuntimeError, match="needs --logits-processors"):
        asyncio.run(start)
