"""Servers that take a connection and never answer, or not what was asked. Real sockets, no engine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from aepo.config import VLLMConfig
from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines import vllm_http, vllm_remote
from aepo.rollout.engines.vllm import ReplicaGoneError, VLLMEngine
from tests.aepo.engine_toys import EOS, VOCAB, request
from tests.integrations.test_vllm_rollout import generate

STATUS = {
    "vocab_size": VOCAB,
    "logprobs_mode": "processed_logprobs",
    "max_model_len": 100,
    "weights_dir": "/nowhere",
    "no_weights": None,
}
COMPLETION = {
    "choices": [
        {"token_ids": [5], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "length", "stop_reason": None}
    ],
    "usage": {"prompt_tokens": 1, "prompt_tokens_details": None},
}


class Server:
    """Answers with `answers` by path; a path without one stays silent until the end."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[object], object]] = {
            "/v1/models": lambda _: {"data": [{"id": "toy"}]},
            "/aepo/status": lambda _: STATUS,
            "/v1/completions": lambda _: COMPLETION,
            "/aepo/entropies": lambda body: {"entropies": {k: [0.5] for k in body["keys"]}, "weight_version": "1"},
            "/aepo/forget": lambda _: {"forgotten": 0},
        }
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        self.over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.asked.append(self.path)
                server.keys.add(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path not in server.answers:
                    server.over.wait()
                    return
                answer = json.dumps(server.answers[self.path](json.loads(body or "null"))).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def servers(monkeypatch) -> Iterator[tuple[Server, Server]]:
    monkeypatch.setattr(vllm_remote, "HEARTBEAT", 0.2)
    monkeypatch.setattr(vllm_remote, "ANSWER", 0.5)
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    pair = Server(), Server()
    yield pair
    for server in pair:
        server.close()


def connect(*servers: Server, longest: float = 60.0) -> VLLMEngine:
    settings = VLLMConfig(endpoints=tuple(server.url for server in servers), request_timeout=longest)
    return VLLMEngine.connect(eos_ids=[EOS], vocab_size=VOCAB, model=None, settings=settings, version=1)


def ask(group: str) -> GenerationRequest:
    return replace(request([1]), group=group)


def test_every_request_has_the_key(servers):
    engine = connect(servers[0])
    generate(engine, request([1]))
    engine.release()
    engine.close()
    assert servers[0].keys == {"Bearer the-key"}


@pytest.mark.parametrize("path", ["/v1/models", "/aepo/status"])
def test_a_server_that_is_silent_from_the_start(servers, path):
    del servers[0].answers[path]
    with pytest.raises(ReplicaGoneError, match="does not answer: ReadTimeout"):
        connect(servers[0])


def test_others_take_over_from_a_server_that_falls_silent(servers):
    """In the middle of a segment: its status has no answer either."""
    silent, other = servers
    engine = connect(silent, other)
    del silent.answers["/v1/completions"], silent.answers["/aepo/status"]
    start = time.monotonic()
    results = generate(engine, *(ask(group) for group in "abcd"))
    assert time.monotonic() - start < 10
    assert [result.token_ids for result in results] == [(5,)] * 4
    assert other.asked.count("/v1/completions") == 4
    del other.answers["/v1/completions"], other.answers["/aepo/status"]
    with pytest.raises(ReplicaGoneError, match="no vLLM replica is left"):
        generate(engine, request([1]))
    engine.close()


def test_records_that_do_not_come(servers):
    silent, other = servers
    engine = connect(silent, other)
    del silent.answers["/aepo/entropies"]
    results = generate(engine, *(ask(group) for group in "ab"))
    assert [result.entropies for result in results] == [(0.5,)] * 2
    engine.close()


def test_a_slow_server_that_is_alive_is_waited_for(servers):
    slow = servers[0]
    slow.answers["/v1/completions"] = lambda _: time.sleep(2) or COMPLETION
    engine = connect(slow)
    asked = slow.asked.count("/aepo/status")
    generate(engine, *(ask(group) for group in "abcd"))
    assert 2 <= slow.asked.count("/aepo/status") - asked <= 12, "one question for all that wait"
    engine.close()


def test_a_segment_that_never_ends_on_a_server_that_is_alive(servers):
    lost, other = servers
    engine = connect(lost, other, longest=1.0)
    del lost.answers["/v1/completions"]
    generate(engine, *(ask(group) for group in "ab"))
    assert "/v1/completions" in lost.asked
    engine.close()


def test_a_silent_weight_update(servers, monkeypatch):
    from aepo.rollout.engines import vllm_weight_clients

    monkeypatch.setattr(vllm_weight_clients, "ANSWER", 0.5)
    client = vllm_weight_clients.RemoteWeightClient(servers[0].url)
    manifest = {"withdraw": False, "files": [{"bytes": 5e6}]}
    for call in (client.start_weight_update, lambda: client.update_weights(manifest), client.reset_prefix_cache):
        with pytest.raises(ReplicaGoneError, match="does not answer: ReadTimeout"):
            call()
    with pytest.raises(ReplicaGoneError):
        client.finish_weight_update("3")
    servers[0].answers["/aepo/weights/start"] = lambda _: {"nonces": ["n"]}
    assert client.start_weight_update() == ["n"]


def test_records_are_asked_for_in_messages_that_a_server_takes(servers, monkeypatch):
    monkeypatch.setattr(vllm_remote, "KEYS", 3)
    monkeypatch.setattr(vllm_remote, "TOKENS", 10)
    assert list(vllm_remote._parts({"a": 4, "b": 6, "c": 1, "d": 1, "e": 1, "f": 0, "g": 12})) == [
        {"a": 4, "b": 6},
        {"c": 1, "d": 1, "e": 1},
        {"f": 0},
        {"g": 12},
    ]

    async def use() -> None:
        replica = await vllm_remote.RemoteReplica.connect(servers[0].url, [EOS], VOCAB, updatable=True, longest=9.0)
        recorded = await replica.entropies(dict.fromkeys("abcdefg", 1))
        assert recorded.entropies.keys() == set("abcdefg")
        await replica.forget(list("abcdefg"))
        await replica.close()

    asyncio.run(use())
    assert servers[0].asked.count("/aepo/entropies") == servers[0].asked.count("/aepo/forget") == 3


def test_limits_are_those_of_the_routes():
    from aepo.vllm import endpoints

    assert (vllm_remote.KEYS, vllm_remote.TOKENS) == (endpoints.KEYS, endpoints.TOKENS)


def test_an_answer_that_is_no_json(servers, monkeypatch):
    class Page:
        status_code, text = 200, "<html>"
        request = type("Request", (), {"url": type("Url", (), {"path": "/v1/models"})})

        def json(self):
            raise ValueError("no JSON")

    with pytest.raises(ValueError, match="answered no JSON: is this a `vllm serve`"):
        vllm_http.content("http://a", Page())
