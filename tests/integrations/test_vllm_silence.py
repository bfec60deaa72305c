"""Servers that take a connection and never answer, or not what was asked. Real sockets, no engine."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gzip
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from aepo.config import VLLMConfig
from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines.vllm import remote as vllm_remote
from aepo.rollout.engines.vllm import start
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.engines.vllm.entropy_reader import EntropyReader
from aepo.rollout.engines.vllm.replica import Recorded, ReplicaError, ReplicaGoneError
from aepo.vllm.weights import WeightUpdateError
from tests.aepo.engine_toys import EOS, VOCAB, request, weights_of
from tests.integrations.test_vllm_rollout import generate

STATUS = {
    "vocab_size": VOCAB,
    "logprobs_mode": "processed_logprobs",
    "max_model_len": 100,
    "weights_dir": "/nowhere",
    "no_weights": None,
    "weight_version": "default",
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
        self.raw: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}  # writes all by itself
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
                if self.path in server.raw:
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        server.raw[self.path](self)
                    return
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
    monkeypatch.setattr(vllm_remote, "ANSWER", 1.5)
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    pair = Server(), Server()
    yield pair
    for server in pair:
        server.close()


def connect(*servers: Server, longest: float = 60.0) -> VLLMEngine:
    settings = VLLMConfig(endpoints=tuple(server.url for server in servers), request_timeout=longest)
    return start.connect(eos_ids=[EOS], vocab_size=VOCAB, settings=settings, version=1, weights=None)


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
    with pytest.raises(ReplicaGoneError, match=r"does not answer: /.* took more than [0-9.]+ s"):
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
    from aepo.rollout.engines.vllm import weight_clients as vllm_weight_clients

    monkeypatch.setattr(vllm_weight_clients, "ANSWER", 0.5)
    client = vllm_weight_clients.RemoteWeightClient(servers[0].url)
    manifest = {"withdraw": False, "files": [{"bytes": 4e6}, {"bytes": 1e6}]}
    for call, seconds in (
        (client.start_weight_update, "0.5"),
        (lambda: client.update_weights(manifest), "0.6"),  # files are read meanwhile, 50 MB/s at least
        (lambda: client.finish_weight_update("3"), "0.6"),
        (client.reset_prefix_cache, "0.5"),
        (lambda: client.update_weights({"withdraw": True}), "0.5"),
    ):
        with pytest.raises(ReplicaGoneError, match=rf"does not answer: /.* took more than {seconds} s"):
            call()
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
    from aepo.vllm import messages

    assert (vllm_remote.KEYS, vllm_remote.TOKENS) == (messages.KEYS, messages.TOKENS)


def drip(handler) -> None:
    """A byte every 50 ms, in the headers, for ever."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


def drip_body(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def endless(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        handler.wfile.write(b" " * 65536)


def said(status: int, body: bytes, *headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    head = "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers])
    return lambda handler: handler.wfile.write(head.encode() + b"\r\n\r\n" + body)


@pytest.mark.parametrize("slow", [drip, drip_body])
@pytest.mark.parametrize("path", ["/v1/models", "/aepo/status", "/aepo/entropies", "/v1/completions"])
def test_a_server_that_drips_is_given_up(servers, path, slow):
    """The time is that of the whole answer, not of a silence."""
    start = time.monotonic()
    if path in ("/v1/models", "/aepo/status"):
        servers[0].raw[path] = slow
        with pytest.raises(ReplicaGoneError, match=r"does not answer: .* took more than 1.5 s"):
            connect(servers[0])
    else:
        engine = connect(*servers, longest=3.0)
        servers[0].raw[path] = slow
        results = generate(engine, *(ask(group) for group in "ab"))
        assert [result.token_ids for result in results] == [(5,)] * 2
        assert path in servers[0].asked
        engine.close()
    assert time.monotonic() - start < 20


def test_a_weight_update_that_drips(servers, monkeypatch):
    from aepo.rollout.engines.vllm import weight_clients as vllm_weight_clients

    monkeypatch.setattr(vllm_weight_clients, "ANSWER", 0.5)
    client = vllm_weight_clients.RemoteWeightClient(servers[0].url)
    servers[0].raw["/aepo/weights/start"] = drip
    with pytest.raises(ReplicaGoneError, match=r"/aepo/weights/start took more than 0.5 s"):
        client.start_weight_update()


@pytest.mark.parametrize("path", ["/v1/models", "/aepo/status", "/aepo/entropies", "/v1/completions"])
def test_an_endless_answer(servers, monkeypatch, path):
    monkeypatch.setattr(vllm_remote, "ANSWER", 20)  # the size is what ends it
    message = f"{servers[0].url}: {path} answered more than [0-9]+ bytes"
    if path in ("/v1/models", "/aepo/status"):
        servers[0].raw[path] = endless
        with pytest.raises(ReplicaError, match=message):
            connect(servers[0])
        return
    engine = connect(servers[0])
    servers[0].raw[path] = endless
    with pytest.raises(ReplicaError, match=message):
        generate(engine, request([1]))
    engine.close()


SHAPES = (None, [], {}, "x", 1, {"data": []}, {"data": [{}]}, {"data": [{"id": 1}]}, {"choices": []}, {"choices": 1})


def garbage() -> Iterator[Callable[[BaseHTTPRequestHandler], None]]:
    yield said(200, b"<html>")
    yield said(200, b"\xff\xfe\xff")
    yield said(200, b"[" * 100_000)
    yield said(200, gzip.compress(b"{}"), "Content-Encoding: gzip")
    yield said(200, b"no gzip", "Content-Encoding: gzip")
    yield said(302, b"", "Location: http://elsewhere/")
    yield said(418, b'{"error": {"message": "two\\nlines \\u001b[2J"}}')
    for shape in SHAPES:
        yield said(200, json.dumps(shape).encode())


@pytest.mark.parametrize("path", ["/v1/models", "/aepo/status", "/aepo/entropies", "/v1/completions"])
def test_answers_of_the_wrong_shape_name_server_and_route(servers, path):
    for answer in garbage():
        server = Server()
        try:
            if path in ("/v1/models", "/aepo/status"):
                server.raw[path] = answer
                with pytest.raises(ReplicaError) as failure:
                    connect(server)
            else:
                engine = connect(server)
                server.raw[path] = answer
                with pytest.raises(ReplicaError) as failure:
                    generate(engine, request([1]))
                engine.close()
        finally:
            server.close()
        text = str(failure.value)
        assert server.url in text
        assert path in text
        assert text.isprintable(), text


def at(holder: object, *path: object, value: object) -> dict:
    """A copy with another value there."""
    changed = found = copy.deepcopy(holder)
    for name in path[:-1]:
        found = found[name]
    found[path[-1]] = value
    return changed


CHOICE = ("choices", 0)
WRONG = {
    "no tokens": at(COMPLETION, *CHOICE, "token_ids", value=[]),
    "more tokens than asked for": at(
        at(COMPLETION, *CHOICE, "token_ids", value=[5] * 99),
        *(*CHOICE, "logprobs", "token_logprobs"),
        value=[-0.5] * 99,
    ),
    "outside the vocabulary": at(COMPLETION, *CHOICE, "token_ids", value=[VOCAB]),
    "negative": at(COMPLETION, *CHOICE, "token_ids", value=[-1]),
    "truth for a number": at(COMPLETION, *CHOICE, "token_ids", value=[True]),
    "text for a number": at(COMPLETION, *CHOICE, "token_ids", value=["5"]),
    "fraction for a token": at(COMPLETION, *CHOICE, "token_ids", value=[5.0]),
    "log-prob above 0": at(COMPLETION, *CHOICE, "logprobs", "token_logprobs", value=[0.1]),
    "log-prob as text": at(COMPLETION, *CHOICE, "logprobs", "token_logprobs", value=["-1"]),
    "log-prob null": at(COMPLETION, *CHOICE, "logprobs", "token_logprobs", value=[None]),
    "huge log-prob": at(COMPLETION, *CHOICE, "logprobs", "token_logprobs", value=[-(10**400)]),
    "too many log-probs": at(COMPLETION, *CHOICE, "logprobs", "token_logprobs", value=[-0.5, -0.5]),
    "no log-probs": at(COMPLETION, *CHOICE, "logprobs", value=None),
    "unknown end": at(COMPLETION, *CHOICE, "finish_reason", value="error"),
    "no end": at(COMPLETION, *CHOICE, "finish_reason", value=None),
    "end of another kind": at(COMPLETION, *CHOICE, "stop_reason", value=[]),
    "another prompt": at(COMPLETION, "usage", "prompt_tokens", value=2),
    "no usage": at(COMPLETION, "usage", value=None),
    "more cached than asked": at(COMPLETION, "usage", "prompt_tokens_details", value={"cached_tokens": 2}),
    "cached as text": at(COMPLETION, "usage", "prompt_tokens_details", value={"cached_tokens": "1"}),
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_completions_that_cannot_be_right(servers, answer):
    engine = connect(servers[0])
    servers[0].answers["/v1/completions"] = lambda _: answer
    with pytest.raises(ReplicaError, match=f"{servers[0].url}: /v1/completions answered what cannot be right"):
        generate(engine, request([1]))
    engine.close()


@pytest.mark.parametrize("row", [[], [0.5, 0.5], [-0.1], [math.log(VOCAB) + 0.1], ["0.5"], [True], "x", None])
def test_entropies_that_cannot_be_right(servers, row):
    engine = connect(servers[0])
    answer = {"weight_version": "1"}
    servers[0].answers["/aepo/entropies"] = lambda body: {"entropies": dict.fromkeys(body["keys"], row), **answer}
    with pytest.raises(ReplicaError, match="/aepo/entropies answered what cannot be right"):
        generate(engine, request([1]))
    engine.close()


@pytest.mark.parametrize("answer", [{"entropies": {}}, {"entropies": {"other": [0.5]}}, {}, []])
def test_records_without_the_keys_reach_all_who_wait(servers, answer):
    """Not a rollout that hangs."""
    engine = connect(servers[0])
    servers[0].answers["/aepo/entropies"] = lambda _: answer
    with pytest.raises(ReplicaError, match="/aepo/entropies"):
        generate(engine, *(ask(group) for group in "abc"))
    engine.close()


def test_whatever_reading_records_raises_reaches_all_who_wait():
    class Replica:
        async def entropies(self, lengths):
            return Recorded({}, "1")

    async def use() -> list[object]:
        reader = EntropyReader(Replica())
        reads = asyncio.gather(*(reader.read(key, 1) for key in "ab"), return_exceptions=True)
        return await asyncio.wait_for(reads, 5)

    assert [type(error) for error in asyncio.run(use())] == [KeyError, KeyError]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/completions", at(COMPLETION, *CHOICE, "logprobs", "token_logprobs", value=[-9999.0])),
        ("/aepo/entropies", None),
        ("/v1/completions", None),
    ],
)
def test_logits_that_are_not_finite(servers, path, answer):
    engine = connect(servers[0])
    if path == "/aepo/entropies":
        servers[0].answers[path] = lambda body: {"entropies": {k: [None] for k in body["keys"]}, "weight_version": "1"}
    elif answer is None:
        words = b'{"error": {"message": "Out of range float values are not JSON compliant: nan"}}'
        servers[0].raw[path] = said(400, words)
    else:
        servers[0].answers[path] = lambda _: answer
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(engine, request([1]))
    engine.close()


def test_records_that_cannot_be_dropped_do_not_hide_the_error(servers, caplog):
    engine = connect(servers[0])
    servers[0].answers["/v1/completions"] = lambda _: {}
    servers[0].raw["/aepo/forget"] = said(400, b"no")
    with pytest.raises(ReplicaError, match="/v1/completions"):
        generate(engine, request([1]))
    engine.release()
    assert "refused /aepo/forget with status 400: no" in caplog.text
    engine.close()


class Updated(Server):
    """Takes weights, and keeps the version of whoever has sent some last, as `vllm serve` does."""

    def __init__(self, weights_dir: Path) -> None:
        super().__init__()
        self.version = "0"
        self.calls: list[str] = []
        self.answers["/aepo/status"] = lambda _: {**STATUS, "weights_dir": str(weights_dir)}
        self.answers["/aepo/entropies"] = lambda body: {
            "entropies": {key: [0.5] for key in body["keys"]},
            "weight_version": self.version,
        }
        staged = []
        self.answers |= {
            "/aepo/weights/start": lambda _: self.calls.append("start") or {"nonces": ["n"]},
            "/aepo/weights/update": lambda body: (
                self.calls.append("update") or staged.append(body["version"]) or {"ok": 1}
            ),
            "/aepo/weights/finish": lambda _: setattr(self, "version", staged[-1]) or {"weight_version": self.version},
            "/aepo/weights/withdraw": lambda _: self.calls.append("withdraw") or {},
            "/aepo/weights/reset_prefix_cache": lambda _: {"success": True},
        }


@pytest.fixture
def updated(tmp_path, servers, monkeypatch) -> Iterator[Updated]:
    monkeypatch.setattr(vllm_remote, "ANSWER", 60.0)  # all of them do answer
    server = Updated(tmp_path)
    yield server
    server.close()


def trainer(server: Server, version: int = 3, weights_dir: str | None = None) -> VLLMEngine:
    settings = VLLMConfig(endpoints=(server.url,), weights_dir=weights_dir)
    return start.connect(
        eos_ids=[EOS], vocab_size=VOCAB, settings=settings, version=version, weights=weights_of(torch.nn.Linear(2, 2))
    )


def test_two_trainers_at_the_same_step_do_not_take_each_others_weights(updated):
    one = trainer(updated)
    assert generate(one, request([1]))[0].version == 3
    other = trainer(updated)  # a second run, or the same one again
    generate(other, request([1]))
    with pytest.raises(ReplicaError, match=r"weights version 3@[0-9a-f]{12}, expected 3@[0-9a-f]{12}: they were"):
        generate(one, request([1]))
    one.refresh(3, weights_of(torch.nn.Linear(2, 2)))
    generate(one, request([1]))
    with pytest.raises(ReplicaError, match="changed by somebody else"):
        generate(other, request([1]))
    one.close()
    other.close()


def test_a_server_that_has_loaded_other_weights(updated):
    engine = trainer(updated)
    updated.answers["/aepo/weights/finish"] = lambda _: {"weight_version": "3@another"}
    with pytest.raises(WeightUpdateError, match=r"loaded weights version 3@another, expected 4@[0-9a-f]{12}"):
        engine.refresh(4, weights_of(torch.nn.Linear(2, 2)))
    engine.close()


@pytest.mark.parametrize("step", ["start", "update", "finish", "reset_prefix_cache"])
@pytest.mark.parametrize("answer", [None, [], {"nonces": []}, {"nonces": [1]}, {"weight_version": 3}, {"success": 1}])
def test_weight_answers_of_the_wrong_shape(updated, step, answer):
    engine = trainer(updated)
    right = updated.answers[f"/aepo/weights/{step}"]
    updated.answers[f"/aepo/weights/{step}"] = lambda body: right(body) and answer
    if step == "update" and isinstance(answer, dict):
        engine.refresh(4, weights_of(torch.nn.Linear(2, 2)))  # says nothing that is needed
    else:
        with pytest.raises(WeightUpdateError, match=f"{updated.url}: /aepo/weights/{step} answered what cannot be"):
            engine.refresh(4, weights_of(torch.nn.Linear(2, 2)))
    engine.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_reach_nobody(updated, tmp_path, value):
    engine = trainer(updated)
    updated.calls.clear()
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.bias, value)
    with pytest.raises(WeightUpdateError, match="weight 'bias' is not finite; every replica keeps the weights"):
        engine.refresh(4, weights_of(model))
    assert updated.calls == []
    assert not list(tmp_path.iterdir())
    torch.nn.init.zeros_(model.bias)
    engine.refresh(4, weights_of(model))
    assert generate(engine, request([1]))[0].version == 4
    engine.close()


@pytest.mark.parametrize(
    "named", ["/", "//", "~", "", "relative/dir", "TMP/made/by/server", "/proc/x", "/dev/null", "/x" * 9000]
)
def test_a_server_does_not_say_where_directories_are_made(updated, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    status = {**STATUS, "weights_dir": named.replace("TMP", str(tmp_path))}
    updated.answers["/aepo/status"] = lambda _: status
    before = loops()
    with pytest.raises(ReplicaError, match=f"{updated.url}: /aepo/status answered .*'weights_dir' is '") as failure:
        trainer(updated)
    assert len(str(failure.value)) < 1500
    assert not list(tmp_path.iterdir())
    assert updated.calls == []
    assert loops() == before


def test_a_directory_of_ones_own_stands_in_for_that_of_the_server(updated, tmp_path):
    updated.answers["/aepo/status"] = lambda _: {**STATUS, "weights_dir": "/elsewhere"}
    trainer(updated, weights_dir=str(tmp_path / "mine")).close()
    assert updated.calls[:2] == ["start", "update"]
    assert (tmp_path / "mine").is_dir()


HOSTILE = "x\x1b[31m\n" * 30_000


CHANGES = {
    "mode": {"logprobs_mode": HOSTILE},
    "vocabulary": {"vocab_size": 10**4000},
    "positions": {"max_model_len": -(10**4000)},
    "lists": {"weights_dir": [[HOSTILE] * 9] * 9},
    "directory": {"weights_dir": HOSTILE},
    "why none": {"weights_dir": None, "no_weights": HOSTILE},
    "an object": {"no_weights": {HOSTILE: 1}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_words_of_a_status_are_one_short_line(updated, change):
    right = updated.answers["/aepo/status"](None)
    updated.answers["/aepo/status"] = lambda _: {**right, **change}
    with pytest.raises((ReplicaError, ValueError), match=updated.url) as failure:
        trainer(updated)
    assert_short(failure.value)


@pytest.mark.parametrize(("path", "answer"), [
    ("/v1/completions", at(COMPLETION, *CHOICE, "finish_reason", value=HOSTILE)),
    ("/v1/completions", at(COMPLETION, *CHOICE, "token_ids", value=[HOSTILE])),
    ("/v1/completions", at(COMPLETION, "usage", "prompt_tokens", value=10**4000)),
    ("/v1/completions", at(COMPLETION, "usage", "prompt_tokens_details", value={"cached_tokens": 10**4000})),
    ("/v1/completions", at(COMPLETION, *CHOICE, "logprobs", "token_logprobs", value=[-(10**4000)])),
    ("/aepo/entropies", {"entropies": {HOSTILE: [0.5]}}),
    ("/aepo/entropies", {"weight_version": HOSTILE}),
    ("/aepo/weights/start", {"nonces": [HOSTILE, 1]}),
    ("/aepo/weights/update", [HOSTILE]),
    ("/aepo/weights/finish", {"weight_version": HOSTILE}),
    ("/aepo/weights/reset_prefix_cache", {"success": HOSTILE}),
])  # fmt: skip
def test_words_of_any_other_answer_are_one_short_line(updated, monkeypatch, path, answer):
    monkeypatch.setattr(vllm_remote, "ANSWER_BYTES", 1 << 23)
    engine = trainer(updated)
    right = updated.answers[path]
    updated.answers[path] = lambda body: right(body) and ({**right(body), **answer} if path[-1] == "s" else answer)
    with pytest.raises((ReplicaError, WeightUpdateError), match=updated.url) as failure:
        engine.refresh(4, weights_of(torch.nn.Linear(2, 2))) if "weights" in path else generate(engine, request([1]))
    engine.close()
    assert_short(failure.value)


def test_words_of_what_is_no_http_are_one_short_line(updated):
    for raw in (b"HTTP/1.1 200 OK\r\n" + b"\x1b[31m" * 9000 + b"\r\n\r\n", HOSTILE.encode()):
        updated.raw["/v1/models"] = lambda handler, raw=raw: handler.wfile.write(raw)
        with pytest.raises(ReplicaError, match=updated.url) as failure:
            trainer(updated)
        assert_short(failure.value)
    for status in (302, 409, 500):
        updated.raw["/v1/models"] = said(status, HOSTILE.encode())
        with pytest.raises(ReplicaError, match=f"status {status}") as failure:
            trainer(updated)
        assert_short(failure.value)


def assert_short(error: Exception) -> None:
    text = str(error)
    assert len(text) < 1500
    assert text.isprintable(), text


def test_nothing_stays_open_where_the_guard_cannot_start(updated, monkeypatch):
    clients = []

    def refuse(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(start, "OrphanGuard", refuse)
    made = vllm_remote.http_client
    monkeypatch.setattr(vllm_remote, "http_client", lambda url: clients.append(made(url)) or clients[-1])
    before = loops()
    with pytest.raises(OSError, match="no more processes"):
        trainer(updated)
    assert [client.is_closed for client in clients] == [True] * 3
    assert loops() == before


def loops() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "aepo-vllm"}


def test_a_url_that_cannot_be_one(servers):
    from aepo.rollout.engines.vllm.weight_clients import RemoteWeightClient

    for url in ("http://[::1", "http://h:99999", "http://"):
        with pytest.raises(ReplicaError, match=re.escape(url)):
            RemoteWeightClient(url).start_weight_update()
