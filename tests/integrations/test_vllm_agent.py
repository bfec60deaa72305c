"""An agent of a user's own on vLLM: a chat model with a template, several calls per turn, an environment that branches.

The same trees as on the transformers engine, and the commands as a user runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aepo import cli
from aepo.agents.agent import Agent
from aepo.config import Config, load_config
from aepo.load import load_agent
from aepo.models.language_model import LanguageModel
from aepo.parallel import OneProcess
from aepo.rollout.engine import Engine
from aepo.rollout.engines.make import make_engine
from aepo.rollout.sampler import Sampler
from aepo.rollout.tree import path_nodes
from aepo.run.log import read_records
from aepo.types import RolloutTree
from tests.integrations.commands import members, start, wait_until
from tests.integrations.own_agent import Account
from tests.integrations.saver import PLANS, TEXT_END, TURN_END, save_saver, write_questions
from tests.integrations.test_vllm_rollout import EXACT, shape

PAY = "task.tools=[tests.integrations.own_agent:pay]"
ACCOUNT = "task.environment=tests.integrations.own_agent:Account"
LIMITS = (
    "rollout.paths=4",
    "rollout.max_tokens=300",
    "rollout.branch_alpha=1.0",
    "vllm.enforce_eager=true",
    "vllm.max_num_seqs=16",
    "vllm.kv_cache_gib=0.05",
    "log.tensorboard=false",
)


@pytest.fixture(scope="module")
def saver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saver")
    save_saver(path)
    write_questions(path / "plans.jsonl")
    return path


def settings(saver: Path, *overrides: str) -> list[str]:
    data = saver / "plans.jsonl"
    rewards = "task.rewards=[tests.integrations.own_agent:as_planned]"
    return ["task.name=files", f"task.train={data}", f"task.heldout={data}", rewards, *LIMITS, *overrides]


def config(saver: Path, *overrides: str) -> Config:
    return load_config(None, settings(saver, *overrides))


@pytest.fixture(scope="module")
def language_model(saver: Path) -> LanguageModel:
    return LanguageModel.from_directory(saver, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def engines(saver: Path, language_model: LanguageModel, tmp_path_factory) -> Iterator[tuple[Engine, Engine]]:
    """vLLM in processes of its own, and transformers: as `aepo train` makes them."""
    import vllm.envs

    vllm.envs.disable_envs_cache()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_USE_V2_MODEL_RUNNER="0")
    directory = tmp_path_factory.mktemp("run")
    with closing(load_agent(config(saver, PAY), language_model)) as agent:
        eos_ids = agent.format.eos_ids
    on_vllm, reference = (
        make_engine(
            config(saver, PAY, f"rollout.engine={name}", f"run.dir={directory}"),
            language_model,
            eos_ids,
            0,
            OneProcess(),
        )
        for name in ("vllm", "huggingface")
    )
    yield on_vllm, reference
    on_vllm.close()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def grown(engine: Engine, agent: Agent, config: Config, **changes: object) -> list[RolloutTree]:
    return Sampler(engine, agent, replace(config.rollout, **changes)).rollout(agent.task.train, seed=3)


def segments(trees: list[RolloutTree]) -> Iterator[tuple[tuple[int, ...], str | None]]:
    return ((node.token_ids, node.finish_reason) for tree in trees for node in tree.nodes if node.source == "model")


@pytest.mark.parametrize("world", [PAY, ACCOUNT], ids=["function", "environment"])
@pytest.mark.parametrize("changes", [{}, {"fresh_paths": 4}], ids=["aepo", "grpo"])
def test_greedy_trees_are_those_of_the_transformers_engine(engines, saver, language_model, world, changes) -> None:
    chosen = config(saver, world)
    with closing(load_agent(chosen, language_model)) as agent:
        assert agent.format.name == "chat"
        ours, theirs = (grown(engine, agent, chosen, temperature=0.0, **changes) for engine in engines)
    assert [shape(tree) for tree in ours] == [shape(tree) for tree in theirs]
    assert [tree.nodes[0] for tree in ours] == [tree.nodes[0] for tree in theirs]
    for one, other in zip(ours, theirs, strict=True):
        if one.budget is not None:
            assert one.budget.fresh_paths == other.budget.fresh_paths
            assert one.budget.root_entropy == pytest.approx(other.budget.root_entropy, abs=EXACT)
    calls = [len(node.calls) for tree in ours for node in tree.nodes if node.source == "tool"]
    assert max(calls) == 3
    assert min(calls) == 1


def test_branch_decisions_are_those_of_the_transformers_engine(engines, saver, language_model) -> None:
    """One fresh path and room for one branch: who is faster plays no part."""
    chosen = config(saver, ACCOUNT)
    with closing(load_agent(chosen, language_model)) as agent:
        ours, theirs = (
            grown(engine, agent, chosen, temperature=0.0, paths=2, fresh_paths=1, branch_threshold=0.9)
            for engine in engines
        )
    for one, other in zip(ours, theirs, strict=True):
        decisions, expected = ([(d.path, d.node, d.branched) for d in tree.decisions] for tree in (one, other))
        assert decisions == expected
        assert [d.delta for d in one.decisions] == pytest.approx([d.delta for d in other.decisions], abs=EXACT)
    assert any(decision.branched for tree in ours for decision in tree.decisions)


def test_a_turn_ends_with_its_token_on_both_engines(engines, saver, language_model) -> None:
    """The end-of-turn token is the template's, the end of text the model's own; each is the last of its segment."""
    chosen = config(saver, PAY)
    names = {language_model.tokenizer.convert_tokens_to_ids(text): text for text in (TURN_END, TEXT_END)}
    for engine in engines:
        with closing(load_agent(chosen, language_model)) as agent:
            assert agent.format.eos_ids == tuple(sorted(names))
            trees = grown(engine, agent, chosen, fresh_paths=4, max_segment_tokens=60)
        ended = set()
        for tokens, reason in segments(trees):
            assert names.keys().isdisjoint(tokens[:-1])
            assert (reason == "eos") == (tokens[-1] in names)
            ended.add(names.get(tokens[-1], reason))
        assert ended == {TURN_END, TEXT_END, "length"}


def test_every_path_on_vllm_continues_its_own_world(engines, saver, language_model) -> None:
    """Each result says what was paid on the path before it; forked environments are closed."""
    chosen = config(saver, ACCOUNT, "rollout.paths=8")
    on_vllm, _ = engines
    assert not on_vllm.lockstep
    with closing(load_agent(chosen, language_model)) as agent:
        trees = grown(on_vllm, agent, chosen, fresh_paths=2)
        counters = agent.environment.counters
    assert counters["forked"] == sum(path.parent is not None for tree in trees for path in tree.paths) > 4
    assert counters["replayed"] == counters["refused"] == 0
    assert Account.open == 0
    longest = 0
    for tree in trees:
        for path in tree.paths:
            paid = []
            for node in path_nodes(tree, path.id):
                for call, result in zip(node.calls, node.results, strict=True):
                    if result.error is None:
                        paid.append(call.arguments["coins"])
                        assert result.text == f"{sum(paid)} in {len(paid)}"
            if path.finish_reason != "length":  # results that no longer fit are not in the tree
                assert path.environment_reward == sum(paid)
            longest = max(longest, sum(bool(node.calls) for node in path_nodes(tree, path.id)))
    assert longest >= 2, "a branch from a state that is not the first"


@pytest.mark.slow
def test_commands_with_vllm_give_what_they_give_without(saver, tmp_path) -> None:
    """`aepo eval` on both engines, and `aepo rollout` of a model with tags, at the same time."""
    out = tmp_path / "out"
    on_vllm, without = (
        ("eval", saver, *settings(saver, PAY, f"rollout.engine={name}"), "--json", "-", "--answers")
        for name in ("vllm", "huggingface")
    )
    ours = start(*on_vllm, tmp_path / "vllm", stderr=subprocess.PIPE)
    tiny = start(
        "rollout", "tiny", *settings(saver, PAY, "rollout.engine=vllm", "rollout.max_tokens=40"),
        "warm_start.steps=2", f"model.cache_dir={tmp_path / 'cache'}", "--out", out, "--questions", "2",
    )  # fmt: skip
    theirs = CliRunner().invoke(cli.app, [*map(str, without), f"{tmp_path / 'hf'}"])
    numbers, expected = json.loads(finished(ours)), json.loads(theirs.stdout)  # and nothing else on standard output
    assert list(numbers) == list(expected)
    same = numbers.keys() - {"seconds", "changed"}
    assert {key: numbers[key] for key in same} == {key: expected[key] for key in same}
    assert numbers["tool_calls"] > 1
    answers, expected = (read_records(tmp_path / name) for name in ("vllm", "hf"))
    assert [line["question"]["id"] for line in answers] == list(PLANS)
    assert texts(answers) == texts(expected)

    finished(tiny)
    (trees,) = (out / "trees").glob("*.json")
    assert [len(one["tree"]["paths"]) for one in json.loads(trees.read_text())["trees"]] == [4, 4]
    assert len(read_records(out / "answers.jsonl")) == 2
    assert (out / "rollout.html").is_file()


def finished(process: subprocess.Popen[str]) -> str:
    """What it wrote to standard output; it has succeeded and left no process."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (output, errors)
    assert wait_until(lambda: not members(process.pid), 20), members(process.pid)
    return output


def texts(answers: list[dict[str, Any]]) -> list[list[str]]:
    return [[sample["text"] for sample in line["samples"]] for line in answers]
