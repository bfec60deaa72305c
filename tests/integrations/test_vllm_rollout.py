"""Rollouts on three real vLLM engines, each in processes of its own: the same trees as the transformers engine, exact
numbers, no waiting, weights, and what happens when something breaks. The last tests kill the engines.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import torch

from aepo.agents.tools.toolbox import ToolBox
from aepo.config import RolloutConfig, VLLMConfig
from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines.vllm import local as vllm_local
from aepo.rollout.engines.vllm import start
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.engines.vllm.orphans import marked
from aepo.rollout.engines.vllm.replica import ReplicaError, ReplicaGoneError
from aepo.rollout.engines.vllm.weight_clients import LocalWeightClient
from aepo.rollout.sampler import RolloutError, Sampler
from aepo.rollout.tree import path_nodes
from aepo.types import Question, RolloutTree, TokenIds, ToolCall, ToolResult, Turn
from aepo.vllm.weights import WeightUpdateError, write
from tests.aepo.engine_toys import EOS, TAG, VOCAB, assert_is_the_models_own, prompts, request, weights_of
from tests.aepo.engine_toys import engine as transformers_engine
from tests.integrations.conftest import qwen

# float32 in both engines against float64: the largest difference seen was 3e-6.
EXACT = 2e-5


def talkative() -> torch.nn.Module:
    """Closes a search tag in about every fourth token, so that paths use tools; ends texts now and then."""
    made = qwen(torch.float32)
    with torch.no_grad():
        made.lm_head.weight[TAG] *= 4.0
        made.lm_head.weight[EOS] *= 2.0
    return made.eval()


class Bytes:
    """Questions and results as bytes; for text that a random model writes, bytes that are none are replaced."""

    vocab_size = VOCAB
    stop_strings = ("</search>", "</answer>")

    def read(self, token_ids: Sequence[int], finish_reason: str, *, before: Sequence[int] | None = None) -> Turn:
        text = "".join("</search>" if token == TAG else chr(min(token, 127)) for token in token_ids)
        return Turn(text, text, (ToolCall("search", {"query": "x"}),) if "</search>" in text else ())

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        return tuple(results[0].text.encode())


class Tools:
    """Answers every call at once, but for the first one where it is to wait for `others`."""

    observation = None

    def __init__(self, others: asyncio.Event | None = None) -> None:
        self.others = others

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        others, self.others = self.others, None
        if others is not None:
            await asyncio.wait_for(others.wait(), 60)
        return [ToolResult("(r)", None, 0.0) for _ in calls]


class Agent:
    """Bytes, and one session for all paths."""

    format = Bytes()

    def __init__(self, tools: object) -> None:
        self.stateless = tools

    def prompt_tokens(self, question: Question, observation: str | None) -> TokenIds:
        return tuple(question.text.encode())


def questions(count: int) -> list[Question]:
    return [Question(f"q{i}", f"question {i}: " + "what else? " * (3 + i), "y", "toy") for i in range(count)]


CONFIG = RolloutConfig(
    paths=4, fresh_paths=2, branch_alpha=1.0, max_tokens=100, max_segment_tokens=24, max_tool_calls=4
)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return talkative()


@pytest.fixture(scope="module")
def in_processes():
    """Engines of their own processes, not in this one as elsewhere here; none of them is left in the end."""
    import vllm.envs

    vllm.envs.disable_envs_cache()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_USE_V2_MODEL_RUNNER="0")
    yield
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    assert not engine_processes()


@pytest.fixture(scope="module")
def engine(model, model_dir, tmp_path_factory, in_processes):
    path = tmp_path_factory.mktemp("talkative")
    model.save_pretrained(path)
    for file in Path(model_dir).glob("token*"):
        (path / file.name).write_bytes(file.read_bytes())
    settings = VLLMConfig(replicas=3, max_num_seqs=16, enforce_eager=True, kv_cache_gib=0.05)
    made = start.launch(path, eos_ids=[EOS], vocab_size=VOCAB, settings=settings, version=7, seed=0)
    yield made
    made.close()


def engine_processes() -> list[int]:
    """Children of this process that run an engine, oldest first."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "EngineCore" in line]


def launch(model_dir: str, **changes) -> VLLMEngine:
    settings = VLLMConfig(**{"max_num_seqs": 16, "enforce_eager": True, "kv_cache_gib": 0.05, **changes})
    return start.launch(Path(model_dir), eos_ids=[EOS], vocab_size=VOCAB, settings=settings, version=0, seed=0)


@pytest.fixture
def temporary(monkeypatch) -> Iterator[Path]:
    """Where engines that start now have their files; short, as the paths of sockets must be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", path)
        yield Path(path)


def generate(engine: VLLMEngine, *requests: GenerationRequest) -> list:
    """As the sampler does: one call per request, all at the same time."""

    async def all_of_them():
        return await asyncio.gather(*(engine.generate([one]) for one in requests))

    return [generation for (generation,) in asyncio.run(all_of_them())]


def leftovers(engine: VLLMEngine) -> list[dict]:
    """What the replicas still hold of requests: records of entropies, unfinished requests."""
    from aepo.vllm import entropy_status_async

    async def ask():
        return [await entropy_status_async(replica._llm) for replica in engine._alive]

    unfinished = [replica._llm.get_num_unfinished_requests() for replica in engine._alive]
    return [{**status, "unfinished": count} for status, count in zip(engine._loop.run(ask()), unfinished, strict=True)]


def assert_nothing_is_left(engine: VLLMEngine) -> None:
    for left in leftovers(engine):
        assert (left["records"], left["tokens"], left["unfinished"]) == (0, 0, 0)


def shape(tree: RolloutTree) -> list:
    """Everything about a tree that does not depend on which path was faster: paths as texts with how they ended."""
    nodes = [[(node.source, node.token_ids, node.finish_reason) for node in path_nodes(tree, p.id)] for p in tree.paths]
    return sorted((path, tree.paths[i].finish_reason, tree.paths[i].parent is None) for i, path in enumerate(nodes))


def test_logprobs_and_entropies_are_the_models_own(model, engine) -> None:
    """Temperatures, greedy, continued segments; both replicas; against one uncached forward in float64."""
    truth = qwen(torch.float64)
    truth.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    temperatures = [1.0, 0.6, 0.0, 1.7]
    wave = [
        replace(request(tokens, 8 + i, seed=2**64 - 1 - i, temperature=temperatures[i % 4]), group=f"g{i}")
        for i, tokens in enumerate(prompts(1, 7, 30, 2, 19, 40, 3, 64))
    ]
    for _ in range(3):
        results = generate(engine, *wave)
        assert len({engine._homes[one.group].name for one in wave}) == 3
        for asked, got in zip(wave, results, strict=True):
            assert got.version == 7
            assert_is_the_models_own(truth, asked, got, EXACT)
        wave = [
            replace(asked, token_ids=asked.token_ids + got.token_ids + (40, 41), seed=asked.seed - 100)
            for asked, got in zip(wave, results, strict=True)
        ]
    engine.release()
    assert_nothing_is_left(engine)


@pytest.mark.parametrize(
    "changes", [{}, {"fresh_paths": None, "paths": 3}, {"fresh_paths": 4}], ids=["arpo", "aepo", "grpo"]
)
def test_greedy_trees_are_those_of_the_transformers_engine(model, engine, changes) -> None:
    config = replace(CONFIG, temperature=0.0, **changes)
    ours = Sampler(engine, Agent(Tools()), config).rollout(questions(6), seed=3)
    theirs = Sampler(transformers_engine(model), Agent(Tools()), config).rollout(questions(6), seed=3)
    assert [shape(tree) for tree in ours] == [shape(tree) for tree in theirs]
    assert [tree.budget is None for tree in ours] == [tree.budget is None for tree in theirs]
    for one, other in zip(ours, theirs, strict=True):
        if one.budget is not None:
            assert one.budget.fresh_paths == other.budget.fresh_paths
            assert one.budget.root_entropy == pytest.approx(other.budget.root_entropy, abs=EXACT)
    called = sum(node.source == "tool" for tree in ours for node in tree.nodes)
    assert called >= 6
    assert_nothing_is_left(engine)


def test_a_path_is_the_same_whatever_else_is_in_the_batch(engine) -> None:
    """Its seeds are its own: alone, and among twelve others, on any replica."""
    config = replace(CONFIG, fresh_paths=4)
    together = Sampler(engine, Agent(Tools()), config).rollout(questions(4), seed=1)
    alone = Sampler(engine, Agent(Tools()), config).rollout(questions(4)[2:3], seed=1)
    assert shape(together[2]) == shape(alone[0])
    assert len({tuple(node.token_ids for node in path_nodes(together[2], path)) for path in range(4)}) > 1


def test_a_slow_tool_holds_up_its_own_path_alone(engine) -> None:
    """The first call is answered when all other paths have ended, which they could not if they waited for it."""
    others = asyncio.Event()

    def progress(finished: int, total: int) -> None:
        if finished == total - 1:
            others.set()

    sampler = Sampler(engine, Agent(Tools(others)), replace(CONFIG, fresh_paths=4))
    trees = sampler.rollout(questions(4), seed=1, progress=progress)
    assert sum(node.source == "tool" for tree in trees for node in tree.nodes) > 10


def test_a_tool_service_that_is_down_is_told_to_the_model(engine) -> None:
    """Nothing listens on the port. Every call fails, every path goes on with an error text and ends as paths do."""

    class Down:
        name, timeout, description = "search", 5.0, "Nobody answers."
        parameters: ClassVar[dict] = {"type": "object", "properties": {"query": {"type": "string"}}}

        def __call__(self, query: str) -> str:
            return httpx.get("http://127.0.0.1:9/").text

    class DownTools(Tools):
        box = ToolBox([Down()])

        async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
            return await self.box.run(calls)

    trees = Sampler(engine, Agent(DownTools()), replace(CONFIG, max_tokens=200)).rollout(questions(3), seed=1)
    results = [result for tree in trees for node in tree.nodes for result in node.results]
    assert len(results) > 6
    refused = "error: ConnectError: [Errno 111] Connection refused"
    assert {(result.error, result.text) for result in results} == {("raised", refused)}
    assert all(len(tree.paths) == 4 for tree in trees)
    assert_nothing_is_left(engine)


def test_branches_find_their_prefix_in_the_cache(engine) -> None:
    """Requests of a group go to one replica. Blocks have 32 tokens: of 150 shared ones, 128 are computed once."""
    prompt = prompts(150)[0]
    asked = [replace(request(prompt, 4, seed=i), group="one question") for i in range(6)]
    generate(engine, asked[0])
    before = replace(engine.counters)
    generate(engine, *asked[1:])
    assert engine.counters.asked - before.asked == 5 * 150
    assert engine.counters.prefilled - before.prefilled == 5 * (150 - 128)
    engine.release()


def test_paths_end_where_the_context_does(engine) -> None:
    """256 positions: also inside a tool result."""
    long = Question("long", "x" * 200, "y", "toy")
    config = replace(CONFIG, max_tokens=1000, max_tool_calls=100)
    (tree,) = Sampler(engine, Agent(Tools()), config).rollout([long], seed=0)
    lengths = [sum(len(node.token_ids) for node in path_nodes(tree, path.id)) for path in tree.paths]
    assert max(lengths) <= 256
    assert "length" in {path.finish_reason for path in tree.paths}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request([]), "token_ids is empty"),
        (request([1] * 250, new=7), "250 tokens . 7 new ones, but the model has 256 positions"),
        (request([VOCAB]), "token ids 260..260, expected 0..259"),
        (request([1], stop=("",)), "empty stop string"),
    ],
)
def test_bad_requests_are_named(engine, bad, message) -> None:
    with pytest.raises(ValueError, match=rf"requests\[1\]: .*{message}"):
        asyncio.run(engine.generate([request([1]), bad]))


def test_cancelling_aborts_in_the_engines_and_leaves_nothing(engine) -> None:
    async def cancelled() -> None:
        work = [asyncio.ensure_future(engine.generate([request([i], new=250, seed=i)])) for i in range(10)]
        await asyncio.sleep(0.15)
        for task in work:
            task.cancel()
        results = await asyncio.gather(*work, return_exceptions=True)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(cancelled())
    engine.release()
    assert_nothing_is_left(engine)
    generate(engine, request([1]))
    engine.release()


def test_a_request_that_others_abort_is_made_again_with_the_same_result(engine) -> None:
    asked = replace(request([5, 6, 7], new=240, seed=11), group="aborted")
    (expected,) = generate(engine, asked)

    async def abort_it() -> list:
        work = asyncio.ensure_future(engine.generate([asked]))
        await asyncio.sleep(0.05)
        (replica,) = {engine._homes["aborted"]}
        (key,) = engine._open
        engine._loop.run(replica._llm.abort(key))
        return await work

    (got,) = asyncio.run(abort_it())
    assert got.token_ids == expected.token_ids
    engine.release()
    assert_nothing_is_left(engine)


def test_refresh_sends_the_weights_and_a_foreign_version_is_noticed(model, engine) -> None:
    asked = [replace(request(prompts(70)[0], 12, seed=i), group=f"g{i}") for i in range(4)]
    generate(engine, *asked)
    engine.release()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    engine.refresh(8, weights_of(model))
    truth = qwen(torch.float64)
    truth.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    for one, got in zip(asked, generate(engine, *asked), strict=True):
        assert got.version == 8
        assert_is_the_models_own(truth, one, got, EXACT)  # also: no key or value of the old weights
    engine.release()
    replica = engine._alive[0]
    engine._loop.run(replica._llm.update_weight_version("99"))
    with pytest.raises(ReplicaError, match="sampled with weights version 99, expected 8@"):
        generate(engine, *asked)
    engine._loop.run(replica._llm.update_weight_version(engine._stamp))
    engine.release()
    assert_nothing_is_left(engine)


def test_an_engine_with_a_part_of_the_new_weights_samples_nothing_until_a_refresh(model, engine, monkeypatch) -> None:
    """A file is written to through a map, after its check: on /dev/shm no time of it tells."""
    written, finish, maps = write.write, LocalWeightClient.finish_weight_update, []

    def write_and_map(directory, weights):
        info = written(directory, weights)
        with (directory / "00000.safetensors").open("r+b") as file:
            maps.append(mmap.mmap(file.fileno(), 0))
        maps[0][-4096:] = maps[0][-4096:]
        return info

    def harm_and_finish(self, weight_version=None):
        maps[0][-4096:] = bytes(4096)
        finish(self, weight_version)

    with monkeypatch.context() as patched:
        patched.setattr(write, "write", write_and_map)
        patched.setattr(LocalWeightClient, "finish_weight_update", harm_and_finish)
        with pytest.raises(WeightUpdateError, match="a part of the new weights only"):
            engine.refresh(9, weights_of(model))
    with pytest.raises(ReplicaError, match="an update of its weights did not finish, a part may be old"):
        generate(engine, request([1]))
    engine.refresh(9, weights_of(model))
    assert generate(engine, request([1]))[0].version == 9
    engine.release()
    assert_nothing_is_left(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_model_len": 99999},
            r"vLLM refuses vllm.max_model_len: User-specified max_model_len \(99999\) is",
        ),
        (
            {"kv_cache_gib": 1e-5},
            r"vllm.kv_cache_gib = 1e-05: keys and values of one sequence of 256 positions .* 0.000366 GiB$",
        ),
    ],
)
def test_a_failed_start_is_one_line_and_leaves_nothing(
    in_processes, model, model_dir, temporary, changes, message
) -> None:
    before = engine_processes()
    with pytest.raises(ValueError, match=message) as caught:
        launch(model_dir, **changes)
    assert "\n" not in str(caught.value)
    assert engine_processes() == before
    assert not list(temporary.iterdir())


def test_an_engine_that_is_killed_while_it_starts_is_not_said_to_have_told_why(
    in_processes, model, model_dir, temporary
) -> None:
    """Nothing of its own stands above then."""

    def kill() -> None:
        while not (directories := list(temporary.iterdir())) or not (found := marked(str(directories[0]))):
            time.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)

    before = engine_processes()
    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(ValueError, match=r"^vLLM's engine ended while it started.*, unless it was killed") as caught:
        launch(model_dir)
    thread.join()
    assert str(caught.value).isprintable()
    assert engine_processes() == before
    assert not list(temporary.iterdir())


def test_ctrl_c_while_engines_start_is_prompt_and_leaves_nothing(in_processes, model, model_dir, temporary) -> None:
    """When the first of their processes is there, long before they can answer."""
    sent: list[float] = []

    def interrupt() -> None:
        while not (directories := list(temporary.iterdir())) or not marked(str(directories[0])):
            time.sleep(0.01)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = engine_processes()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        launch(model_dir, replicas=2)
    assert time.monotonic() - sent[0] < 10
    thread.join()
    assert engine_processes() == before
    assert not list(temporary.iterdir())


def test_close_while_requests_run_on_a_silent_engine(in_processes, model, model_dir, temporary) -> None:
    """One that is alive and does not answer: a refresh ends by itself, close kills it, and the rollout ends."""
    before = engine_processes()
    made = launch(model_dir)
    (process,) = set(engine_processes()) - set(before)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(vllm_local, "HEARTBEAT", 0.5)
        patch.setattr(vllm_local, "ANSWER", 1.0)
        os.kill(process, signal.SIGSTOP)
        with pytest.raises(WeightUpdateError, match=r"replica 0.*has not answered for 1 s"):
            made.refresh(1, weights_of(model))
        patch.undo()
        rollout = pool.submit(generate, made, request([1]))
        while not made._open:
            time.sleep(0.01)
        begin = time.monotonic()
        made.close()
        assert time.monotonic() - begin < 30
        with pytest.raises(asyncio.CancelledError):
            rollout.result(10)
    made.close()
    made.release()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        made.refresh(2, weights_of(model))
    assert engine_processes() == before
    assert not list(temporary.iterdir())


def test_a_rollout_survives_a_killed_replica_and_keeps_what_is_finished_without_any(model, engine) -> None:
    """In this order, since nothing brings an engine back."""
    sampler = Sampler(engine, Agent(Tools()), replace(CONFIG, fresh_paths=4))
    expected = Sampler(engine, Agent(Tools()), replace(CONFIG, fresh_paths=4)).rollout(questions(6), seed=1)
    first, second, third = engine_processes()

    def kill_at(process: int, finished: int):
        def progress(done: int, total: int) -> None:
            if done >= finished and process in engine_processes():
                os.kill(process, signal.SIGKILL)

        return progress

    trees = sampler.rollout(questions(6), seed=1, progress=kill_at(first, 2))
    assert [shape(tree) for tree in trees] == [shape(tree) for tree in expected]
    assert len(engine._alive) == 2
    assert_nothing_is_left(engine)
    os.kill(second, signal.SIGKILL)
    engine.refresh(9, weights_of(model))
    assert len(engine._alive) == 1
    (got,) = generate(engine, request([1]))
    assert got.version == 9
    engine.release()

    with pytest.raises(
        RolloutError, match=r"no vLLM replica is left of( replica \d,?){3}; .* process has died"
    ) as caught:
        sampler.rollout(questions(6), seed=1, progress=kill_at(third, 3))
    assert isinstance(caught.value.__cause__, ReplicaGoneError)
    kept = 4 * len(caught.value.trees) + sum(map(len, caught.value.trajectories.values()))
    assert kept >= 3
