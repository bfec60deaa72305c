"""The routes of `vllm serve`, on a real server. Its engine runs in processes of its own, so this is also the test of
what crosses between them."""

import asyncio
import contextlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import httpx
import pytest
import torch
import vllm.envs
from fastapi import FastAPI, Request
from vllm.v1.engine.exceptions import EngineDeadError

from aepo.rollout.engines.vllm.http import headers
from aepo.vllm import messages
from aepo.vllm.endpoints import Door, EntropyEndpoints, entropies, finish, update, withdraw
from aepo.vllm.endpoints import start as start_update
from aepo.vllm.messages import Refused, read_body, written
from aepo.vllm.weights.manifest import FileUpdateInfo, signed, signing_secret
from tests.aepo.engine_toys import VOCAB, prompts
from tests.integrations.server import KEY
from tests.integrations.toys import NATS, entropy


@pytest.fixture(scope="module")
def server(url):
    with httpx.Client(base_url=url, timeout=60, headers=headers()) as client:
        yield client


def complete(server, prompt, key=None, tokens=8, temperature=1.0, **more):
    body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": temperature, "ignore_eos": True, **more}
    body |= {"logprobs": VOCAB, "return_tokens_as_token_ids": True}
    body |= {"vllm_xargs": {"aepo_key": key}} if key else {}
    return server.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})


def post(server, route, **body):
    answer = server.post(f"/aepo/{route}", content=json.dumps(body))
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
        ("decisions", {"queries": {"good": {"alpha": -1, "initial_entropy": 1}}}, "alpha must be in [0, 1]; got -1"),
        ("forget", {"keys": ["\ud800"]}, "half of a surrogate pair"),
    ):
        code, answer = post(server, route, **body)
        assert code == 400
        assert message in answer["error"]
    for content in ("{", "[" * 100_000, '{"keys": NaN}', b"\xff", ""):
        assert server.post("/aepo/forget", content=content).status_code == 400
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
    answer = asyncio.run(entropies(Door(engine, [], None, None), {"keys": ["a"]}))
    assert written(answer) == b'{"entropies":{"a":[0.5,null]},"weight_version":"3"}'


def start(engine, host="127.0.0.1", uds=None, api_key=None):
    state = SimpleNamespace()
    asyncio.run(EntropyEndpoints().init_state(engine, state, SimpleNamespace(host=host, uds=uds, api_key=api_key)))
    return state.aepo


def test_a_server_without_the_other_flags():
    async def collective_rpc(method):
        raise NotImplementedError("no aepo_status")

    with pytest.raises(RuntimeError, match="needs --logits-processors"):
        start(SimpleNamespace(collective_rpc=collective_rpc))


class Worked:
    """An engine whose workers have accepted these versions; its steps raise `error`. What was called is kept."""

    def __init__(self, *versions, error=None):
        self.versions, self.error, self.called = versions, error, []

    async def collective_rpc(self, method):
        return list(self.versions) if method == "aepo_staged" else [0]

    def __getattr__(self, name):
        async def step(*arguments):
            self.called.append(name)
            if self.error is not None:
                raise self.error

        return step


def refused(handler, door, body=None):
    with pytest.raises(Refused) as refusal:
        asyncio.run(handler(door, body))
    return refusal.value.status, str(refusal.value)


def test_weights_are_loaded_where_all_workers_have_accepted_the_same():
    engine = Worked("3@a", "3@a")
    assert asyncio.run(finish(Door(engine, [], "/d", None), None)) == {"weight_version": "3@a"}
    assert engine.called == ["get_weight_version", "update_weight_version", "finish_weight_update"]
    for versions in ((None,), (None, "3@a"), ("3@a", None), ("3@a", "3@b")):
        engine = Worked(*versions)
        assert refused(finish, Door(engine, [], "/d", None))[0] == 409
        assert not engine.called


def nested(depth):
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize("field", ["directory", "files", "tensors", "version", "nonces", "signature", "withdraw", "x"])
def test_a_manifest_that_vllm_cannot_pass_on_does_not_come_that_far(field):
    """It pickles: "maximum recursion depth exceeded", and has no half of a surrogate pair."""
    good = {**asdict(FileUpdateInfo(directory="x", version="1")), "signature": "0" * 64}
    for wrong in (nested(900), [nested(900)], "\ud800", ["\ud800"], {"\ud800": 1}):
        engine = Worked()
        app = FastAPI()
        app.state.aepo = Door(engine, [], "/d", None)
        EntropyEndpoints().attach_router(app)

        async def ask(app=app, wrong=wrong):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
                return await client.post("/aepo/weights/update", content=json.dumps({**good, field: wrong}))

        answer = asyncio.run(ask())
        assert (answer.status_code, engine.called) == (400, [])
        assert answer.json()["error"].isprintable()
        assert len(answer.json()["error"]) < 500


@pytest.mark.parametrize("handler", [start_update, update, finish, withdraw])
def test_a_server_that_takes_no_weights_takes_no_step(handler):
    engine = Worked("3@a")
    assert refused(handler, Door(engine, [], None, "started without a key"), {}) == (403, "started without a key")
    assert not engine.called


def test_what_a_worker_refuses_is_an_answer_and_its_death_is_not():
    assert refused(start_update, Door(Worked(error=ValueError("no room")), [], "/d", None)) == (409, "no room")
    with pytest.raises(EngineDeadError):  # vLLM ends the server
        asyncio.run(start_update(Door(Worked(error=EngineDeadError()), [], "/d", None), None))


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(messages, "BODY_SECONDS", 0.05)

    async def never():
        await asyncio.sleep(20)

    async def ask():
        return await asyncio.wait_for(read_body(Request({"type": "http", "method": "POST", "headers": []}, never)), 5)

    with pytest.raises(Refused, match=r"did not come within 0\.05 s") as refusal:
        asyncio.run(ask())
    assert refusal.value.status == 408


class Engine:
    """What init_state asks of an engine."""

    def __init__(self, backend="aepo_file"):
        self.told = []
        self.vllm_config = SimpleNamespace(weight_transfer_config=backend and SimpleNamespace(backend=backend))

    async def collective_rpc(self, method):
        return [{}]

    async def init_weight_transfer_engine(self, request):
        self.told.append(request.init_info)


@pytest.fixture
def environment(monkeypatch):
    for name in ("VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "AEPO_WEIGHTS_DIR"):
        monkeypatch.delenv(name, raising=False)
    vllm.envs.disable_envs_cache()
    return monkeypatch


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_a_server_in_a_network_needs_a_key_and_no_development_mode(environment, host):
    for keys in (None, [""]):
        with pytest.raises(RuntimeError, match="needs a key, --api-key or VLLM_API_KEY"):
            start(Engine(), host, api_key=keys)
    assert len(start(Engine(), host, api_key=["a", "b"]).digests) == 2
    environment.setenv("VLLM_API_KEY", "from the environment")
    assert len(start(Engine(), host).digests) == 1
    environment.setenv("VLLM_SERVER_DEV_MODE", "1")
    with pytest.raises(RuntimeError, match="VLLM_SERVER_DEV_MODE=1 lets everybody"):
        start(Engine(), host)


LOCAL = [{"host": host} for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost")] + [{"uds": "/x", "host": None}]


@pytest.mark.parametrize("place", LOCAL)
def test_a_server_of_one_machine_may_do_without(environment, place):
    environment.setenv("VLLM_SERVER_DEV_MODE", "1")
    environment.setenv("AEPO_WEIGHTS_DIR", "/tmp")
    engine = Engine()
    door = start(engine, **place)
    assert door.admits("")
    assert "started without a key" in door.no_weights
    assert engine.told == [{"secrets": [], "directory": "/tmp"}], "nobody else can tell it another secret"


def test_who_may_send_weights_is_settled_at_the_start(environment, tmp_path):
    for backend in ("nccl", None):
        assert "without --weight-transfer-config" in start(Engine(backend), api_key=["a"]).no_weights
    assert "without AEPO_WEIGHTS_DIR" in start(Engine(), api_key=["a"]).no_weights
    for wrong in ("weights", str(tmp_path / "none"), __file__):
        environment.setenv("AEPO_WEIGHTS_DIR", wrong)
        with pytest.raises(RuntimeError, match="expected the absolute path of a directory"):
            start(Engine(), api_key=["a"])
    environment.setenv("AEPO_WEIGHTS_DIR", str(tmp_path))
    engine = Engine()
    door = start(engine, api_key=["a", "b"])
    assert (door.weights_dir, door.no_weights) == (str(tmp_path), None)
    assert engine.told == [{"secrets": [signing_secret("a"), signing_secret("b")], "directory": str(tmp_path)}]
    assert [door.admits(words) for words in ("Bearer a", "bearer b", "Bearer c", "Bearer ", "Basic a", "a", "")] == [
        *(True, True, False, False, False, False, False)
    ]


STEPS = ("start", "update", "finish", "withdraw", "reset_prefix_cache")
POSTED = ("entropies", "decisions", "forget", *(f"weights/{step}" for step in STEPS))
ROUTES = [*(("POST", f"/aepo/{name}") for name in POSTED), ("GET", "/aepo/status")]


def test_the_routes_are_these():
    app = FastAPI()
    EntropyEndpoints().attach_router(app)
    found = [(method, route.path) for route in app.routes for method in getattr(route, "methods", ())]
    assert {one for one in found if one[1].startswith("/aepo")} == set(ROUTES)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_wants_the_key(server, method, path):
    for authorization in (None, b"Bearer", b"Bearer wrong", f"Basic {KEY}", KEY, b"Bearer \xe9", f"Bearer {KEY[:-1]}"):
        wrong = {} if authorization is None else {"Authorization": authorization}
        answer = httpx.request(method, server.base_url.join(path), headers=wrong, timeout=60)
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})


def test_large_bodies_are_refused_before_they_are_read(server):
    large = b'{"keys": ["' + b"x" * (50 << 20) + b'"]}'
    pieces = (large[start : start + (1 << 16)] for start in range(0, len(large), 1 << 16))
    for content in (large, pieces):
        with contextlib.suppress(httpx.WriteError):  # the server may close before all is sent
            answer = server.post("/aepo/entropies", content=content)
            assert answer.status_code == 413
            assert len(answer.content) < 200
    status(server)


def test_many_keys_and_long_keys_are_refused_at_once(server):
    for keys, message in (
        ([str(i) for i in range(4097)], "body has 4097 keys, expected at most 4096"),
        ({"x" * 257: 1}, "a key of more than 256 characters"),
        (["x" * 1000], "a key of more than 256 characters"),
        ({"a": 1 << 20, "b": 1}, "more than 1048576 tokens"),
        ({"a": 1 << 62}, "more than 1048576 tokens"),
        ({"a": 10**400}, "an integer of more than 64 bits"),
    ):
        code, answer = post(server, "entropies", keys=keys)
        assert code == 400
        assert message in answer["error"]
    assert post(server, "decisions", queries={str(i): {} for i in range(4097)})[0] == 400
    assert complete(server, prompts(4)[0], "x" * 257).status_code == 400
    assert complete(server, prompts(4)[0], "\udfff").status_code == 400


def test_errors_do_not_repeat_a_body(server):
    marker = "secret" * 1000
    for route, body in (
        ("entropies", {"keys": marker}),
        ("entropies", {"keys": {"a": marker}}),
        ("forget", {"keys": [{"a": marker}]}),
        ("decisions", {"queries": marker}),
        ("decisions", {"queries": {"a": {marker: 1}}}),
        ("decisions", {"queries": {"a": {"alpha": marker, "initial_entropy": 1}}}),
        ("weights/update", {"directory": marker}),
        ("weights/update", {marker: 1}),
    ):
        answer = server.post(f"/aepo/{route}", content=json.dumps(body))
        assert answer.status_code in (400, 409), route
        assert len(answer.content) < 1500
        assert "secret" * 10 not in answer.text


NUMBERS = (2**63, -(2**63) - 1, 10**400, 2**63 - 1, -(2**63), 10**18, 1e308, -1e308, 5e-324, True, None, [], {}, "1")


@pytest.mark.parametrize("name", ["alpha", "gamma", "penalty", "threshold", "window", "consecutive", "initial_entropy"])
def test_no_number_of_a_query_ends_the_server(server, name):
    complete(server, prompts(4)[0], "asked").raise_for_status()
    for number in NUMBERS:
        code, answer = post(server, "decisions", queries={"asked": {"alpha": 0.5, "initial_entropy": 1, name: number}})
        assert (code, *answer) in ((200, "decisions"), (400, "error")), (number, answer)
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            assert answer == {"error": "body has an integer of more than 64 bits"}
        if number is not None:  # all that there are
            assert post(server, "entropies", keys={"asked": number})[0] in (400, 409)
    answer = server.post("/aepo/decisions", content='{"queries": {"asked": {"alpha": 1e999, "initial_entropy": 1}}}')
    assert answer.status_code == 400
    assert len(post(server, "entropies", keys={"asked": 8})[1]["entropies"]["asked"]) == 8


def test_no_field_of_a_signed_update_ends_the_server(server):
    before = status(server)["weight_version"]
    for field, wrong in (
        *(("version", version) for version in (5, 1.5, True, None, "", "x" * 100_000, "\x1b[31m\n", "\ud800", ["1"])),
        *(("tensors", count) for count in (-1, True, 2**62, "1")),
        *(("files", files) for files in ({}, [5], [{"name": "a"}], [{"name": "a", "bytes": True, "sha256": "0" * 64}])),
        *(("directory", name) for name in ("..", "\ud800", 5, "x" * 300)),
    ):
        server.post("/aepo/weights/withdraw")  # what never came to a worker has left the update open
        nonces = server.post("/aepo/weights/start").raise_for_status().json()["nonces"]
        info = FileUpdateInfo(**{"directory": "x", "version": "1", field: wrong})
        manifest = asdict(signed(info, nonces, signing_secret(KEY)))
        code, answer = post(server, "weights/update", **manifest)
        assert code in (400, 409), (field, wrong)
        assert answer["error"].isprintable()
        assert len(answer["error"]) < 500
        assert server.post("/aepo/weights/finish").status_code == 409
        complete(server, prompts(4)[0], tokens=2).raise_for_status()
    assert status(server)["weight_version"] == before


def test_the_pool_is_never_full_for_good(server):
    """Requests whose records nobody fetches, over twice what the pool holds."""
    capacity = status(server)["capacity"]
    assert capacity == 2000
    for number in range(24):  # one token each, and room for 200
        any_token = {"stop_token_ids": list(range(VOCAB))}
        complete(server, prompts(4)[0], f"left-{number}", tokens=200, **any_token).raise_for_status()
    assert status(server)["tokens"] <= capacity
    code, answer = post(server, "entropies", keys=["left-0"])
    assert (code, answer["problems"]["left-0"].partition(":")[0]) == (409, "expired")
    assert len(post(server, "entropies", keys={"left-23": 1})[1]["entropies"]["left-23"]) == 1
    post(server, "forget", keys=None)


def test_vllms_own_routes_for_weights_are_not_there(server):
    for path in ("/update_weights", "/collective_rpc", "/start_weight_update", "/update_weight_version"):
        assert server.post(path, json={}).status_code == 404


def test_steps_of_an_update_out_of_order(server):
    assert server.post("/aepo/weights/finish").status_code == 409
    good = {**asdict(FileUpdateInfo(directory="x", version="1")), "signature": "0" * 64}
    assert server.post("/aepo/weights/update", json=good).status_code == 409
    assert server.post("/aepo/weights/update", json={"directory": "x"}).status_code == 400
    assert server.post("/aepo/weights/update", json={"withdraw": True}).status_code == 400
    for more in ({"directory": None}, {"signature": "x"}, {"signature": None}, {"withdraw": True}, {"more": 1}):
        assert server.post("/aepo/weights/update", json={**good, **more}).status_code == 400
    for more in ({"directory": "y"}, {"signature": "1" * 64}):
        (nonce,) = server.post("/aepo/weights/start").raise_for_status().json()["nonces"]
        answer = server.post("/aepo/weights/update", json={**good, **more, "nonces": [nonce]})
        assert (answer.status_code, "not signed with the key" in answer.text) == (409, True), answer.text
    server.post("/aepo/weights/start").raise_for_status()
    assert server.post("/aepo/weights/finish").status_code == 409
    assert server.post("/aepo/weights/withdraw").status_code == 200
    assert status(server)["no_weights"] is None
