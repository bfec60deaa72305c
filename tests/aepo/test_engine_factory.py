"""What engines leave when they cannot be made, and when they are closed with work under way; vLLM itself is not needed
for that (tests/integrations)."""

import asyncio
import resource
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from aepo.config import VLLMConfig, load_config
from aepo.parallel import OneProcess
from aepo.rollout.engines import make
from aepo.rollout.engines.make import make_engine
from aepo.rollout.engines.vllm import start
from aepo.rollout.engines.vllm.loop_thread import LoopThread
from tests.aepo.engine_toys import model, tokenizer, weights_of


@pytest.fixture
def made(tmp_path):
    """make_engine for vLLM on this machine, over a toy, in a directory of its own."""
    config = load_config(None, ["rollout.engine=vllm", f"run.dir={tmp_path / 'run'}"])
    language_model = SimpleNamespace(model=model(), tokenizer=tokenizer(), vocab_size=260)
    return lambda: make_engine(config, language_model, [256], 0, OneProcess())


def test_a_full_disk_is_one_line(made, tmp_path):
    """Here a limit on the size of files: writing fails after 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"^run.dir = .*/run: the weights that vLLM .* cannot be written: .*large"):
            made()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_weights_of_a_failed_start_go(made, tmp_path, monkeypatch, error):
    def launch(model_dir, **_):
        assert (model_dir / "model.safetensors").exists()
        raise error

    monkeypatch.setattr(make, "launch", launch)
    with pytest.raises(error):
        made()
    assert not list((tmp_path / "run").iterdir())


class Fleeting(OneProcess):
    """Hands out weights that are not those of the module, each gone when the next one comes."""

    def __init__(self, is_main):
        self.is_main = is_main

    def full_weights(self, of):
        with torch.no_grad():
            for parameter in of.parameters():
                parameter.add_(1.0)
            yield from weights_of(of)
            for parameter in of.parameters():
                parameter.sub_(1.0)


@pytest.mark.parametrize("is_main", [True, False])
def test_vllm_starts_from_the_whole_weights_which_the_main_process_writes(tmp_path, monkeypatch, is_main):
    found = {}

    def launch(model_dir, **_):
        found["names"] = sorted(path.name for path in model_dir.iterdir())
        found.update(load_file(model_dir / "model.safetensors") if is_main else {})

    monkeypatch.setattr(make, "launch", launch)
    config = load_config(None, ["rollout.engine=vllm", f"run.dir={tmp_path}"])
    of = model(tie_word_embeddings=True)
    language_model = SimpleNamespace(model=of, tokenizer=tokenizer(), vocab_size=260)
    make_engine(config, language_model, [256], 0, Fleeting(is_main))
    names = found.pop("names")
    if is_main:
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
        assert found.keys() == dict(of.named_parameters()).keys(), "a tied one once"
        assert all(torch.equal(found[name], parameter + 1.0) for name, parameter in of.named_parameters())
    else:
        assert names == []


@pytest.mark.parametrize("endpoints", ["", "http://a"])
def test_vllm_is_told_which_weights_it_has(tmp_path, monkeypatch, endpoints):
    """What it stamps on its segments is their version, and the seed is that of the run."""
    told = {}
    monkeypatch.setattr(make, "launch", lambda _, **arguments: told.update(launch=arguments))
    monkeypatch.setattr(make, "connect", lambda **arguments: told.update(connect=arguments))
    settings = ["rollout.engine=vllm", f"run.dir={tmp_path}", "run.seed=7", f"vllm.endpoints=[{endpoints}]"]
    config, of = load_config(None, settings), model()
    language_model = SimpleNamespace(model=of, tokenizer=tokenizer(), vocab_size=260)
    make_engine(config, language_model, [256], 3, OneProcess())
    expected = {"eos_ids": [256], "vocab_size": 260, "settings": config.vllm, "version": 3}
    if endpoints:
        weights = {names[0]: tensor for names, tensor in told["connect"].pop("weights")}
        assert all(torch.equal(weights[name], parameter) for name, parameter in of.named_parameters())
        assert told == {"connect": expected}
    else:
        assert told == {"launch": {**expected, "seed": 7}}


def test_endpoints_before_one_that_fails_are_closed(monkeypatch):
    vllm_remote = pytest.importorskip("aepo.rollout.engines.vllm.remote")
    closed = []

    class Connected:
        def __init__(self, url):
            self.url = url

        async def close(self):
            closed.append(self.url)

    async def connect(url, *_, **__):
        if url.endswith("c"):
            raise ConnectionError(url)
        return Connected(url)

    monkeypatch.setattr(vllm_remote.RemoteReplica, "connect", connect)
    settings = VLLMConfig(endpoints=("http://a", "http://b", "http://c"))
    threads = threading.active_count()
    with pytest.raises(ConnectionError, match="http://c"):
        start.connect(eos_ids=[], vocab_size=260, settings=settings, version=0, weights=None)
    assert closed == ["http://a", "http://b"]
    assert threading.active_count() == threads


class Named:
    """A replica whose server names this directory."""

    name, max_positions = "http://a", 100

    def __init__(self, weights_dir):
        self.shared_directory = lambda: weights_dir
        self.is_closed = False

    async def close(self):
        self.is_closed = True


def test_nothing_stays_open_where_a_guard_cannot_start(monkeypatch, tmp_path):
    vllm_remote = pytest.importorskip("aepo.rollout.engines.vllm.remote")
    pytest.importorskip("vllm")  # refresh imports it
    replica = Named(str(tmp_path))

    async def connect(*_, **__):
        return replica

    def refuse(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(vllm_remote.RemoteReplica, "connect", connect)
    monkeypatch.setattr("aepo.rollout.engines.vllm.start.OrphanGuard", refuse)
    threads = threading.active_count()
    with pytest.raises(OSError, match="no more processes"):
        start.connect(
            eos_ids=[],
            vocab_size=260,
            settings=VLLMConfig(endpoints=("http://a",)),
            version=0,
            weights=weights_of(model()),
        )
    assert replica.is_closed
    assert threading.active_count() == threads


def test_a_directory_that_only_a_server_has_ends_the_start(tmp_path):
    vllm_remote = pytest.importorskip("aepo.rollout.engines.vllm.remote")
    status = {"max_model_len": 9, "vocab_size": 260, "weights_dir": str(tmp_path / "made" / "by server")}
    replica = vllm_remote.RemoteReplica("http://a", status, "toy", [], 1.0)
    with pytest.raises(ConnectionError, match=r"^http://a: /aepo/status answered .*No such file or directory"):
        replica.shared_directory()
    assert not list(tmp_path.iterdir())


def test_a_loop_that_closes_ends_what_still_runs():
    cleaned = threading.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            cleaned.set()

    loop = LoopThread()
    running = [loop.submit(work()) for _ in range(3)]
    loop.close()
    assert cleaned.is_set()
    for future in running:
        with pytest.raises(CancelledError):
            future.result(1)
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(work())


def test_waiting_for_a_loop_has_a_limit_and_cancels_what_was_waited_for():
    loop, cancelled = LoopThread(), threading.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        loop.run(work(), 0.1)
    assert time.monotonic() - begin < 5
    assert cancelled.wait(5)
    loop.close()
