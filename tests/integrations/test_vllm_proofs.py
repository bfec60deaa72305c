"""The benchmark of proofs at toy sizes: it runs, its checks notice what is wrong, and its numbers are what they say."""

from __future__ import annotations

import json
import statistics

import pytest

from aepo.config import RolloutConfig, VLLMConfig
from aepo.rollout.engine import Generation
from aepo.rollout.tree import TreeBuilder
from aepo.types import BranchDecision, Path, Question, RolloutTree, ToolCall, ToolResult
from benchmarks import vllm_proofs
from benchmarks.proofs import branching, exactness, prefix_cache, step_cost, tool_latency
from benchmarks.proofs.agent import RandomPlayer, Search, questions, random_agent
from benchmarks.proofs.engines import launched
from benchmarks.proofs.result import Proof, ProofError, Table


@pytest.fixture
def in_this_process(monkeypatch):
    import vllm.envs

    vllm.envs.disable_envs_cache()  # other tests choose another runner, or processes
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def column(table: Table, name: str) -> list:
    return [row[list(table.columns).index(name)] for row in table.rows]


def assert_prints(proof: Proof) -> None:
    """On a terminal, and as Markdown from its JSON."""
    again = Proof.from_json(json.loads(json.dumps(proof.to_json())))
    assert again == proof
    for table in again.tables:
        assert table.rich().row_count == len(table.rows)
        assert table.title in again.markdown()


def test_exactness(in_this_process, monkeypatch):
    proof = exactness.prove(vocab=400, requests=2, tokens=3)
    (table,) = proof.tables
    assert column(table, "tokens") == [6] * len(exactness.TEMPERATURES)
    assert 0 < max(column(table, "max difference, float64 model")) < 2e-5
    assert all(low < high for low, high in zip(column(table, "lowest"), column(table, "highest"), strict=True))
    assert_prints(proof)
    monkeypatch.setattr(exactness, "LARGEST", 0.0)
    with pytest.raises(ProofError, match="an entropy differs by"):
        exactness.prove(vocab=400, requests=1, tokens=2)


def test_step_cost(in_this_process):
    proof = step_cost.prove(vocab=400, batches=(1, 3), steps=3, rounds=1)
    engine_table, alone = proof.tables
    assert column(engine_table, "B") == [1, 3, 1, 3]
    assert all(ms > 0 for provider in step_cost.PROVIDERS for ms in column(engine_table, provider))
    assert all(ms > 0 for ms in [*column(alone, "apply()"), *column(alone, "logprobs=10")])
    assert_prints(proof)


def test_prefix_cache_and_tool_latency(monkeypatch):
    """On one engine in a process of its own."""
    import vllm.envs

    vllm.envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    agent = random_agent()
    with launched(agent, VLLMConfig(max_num_seqs=16, enforce_eager=True, kv_cache_gib=0.05), [True]) as (engine,):
        proof = prefix_cache.compare(agent, {prefix_cache.WITH: engine}, count=2, rounds=1)
        (table,) = proof.tables
        for asked, computed in zip(column(table, "prefix tokens asked"), column(table, "computed"), strict=True):
            assert 0 < computed < asked
        assert_prints(proof)
        with pytest.raises(ProofError, match=r"without prefix cache: \d+\.\d% of the prefix tokens were not computed"):
            prefix_cache.compare(agent, {prefix_cache.WITHOUT: engine}, count=2, rounds=1)

        proof = tool_latency.compare(agent, engine, count=2, rounds=1, median=0.02, p95=0.1)
        (table,) = proof.tables
        assert column(table, "schedule") == ["lock-step", "asynchronous"] * 2
        seconds, longest = column(table, "seconds"), column(table, "tool seconds, longest path")
        assert all(wall > path > 0 for wall, path in zip(seconds, longest, strict=True))
        assert all(0 < share < 1 for share in column(table, "engine in use"))
        assert longest[0] == longest[1], "all fresh: the same calls in both schedules"
        assert_prints(proof)


def test_branching():
    limits = RolloutConfig(paths=8, max_tokens=200, max_segment_tokens=32, max_tool_calls=2)
    model = random_agent()
    proof = branching.compare([("random", model, RandomPlayer(model, Search()), limits, questions(2))], sweep=1)
    rules, penalties = proof.tables
    assert column(rules, "rule") == ["ARPO", "ARPO + penalty", "AEPO"]
    assert column(rules, "branches / question")[0] > 0
    assert len(penalties.rows) == 2 * len(branching.PENALTIES)
    assert_prints(proof)


def hand_made_tree() -> RolloutTree:
    """Paths 0 and 1 are fresh; 2, 3 and 4 left path 0, and 5 left path 2."""
    builder = TreeBuilder(Question("q", "q", "", "toy"), (1,))

    def write(parent: int) -> int:
        return builder.add_generation(parent, Generation((2,), (0.0,), (0.0,), "stop", 0))

    def read(parent: int) -> int:
        return builder.add_results(parent, (3,), [ToolCall("search", {})], [ToolResult("r", None, 1.5)])

    first, second = read(write(0)), write(0)
    third = read(write(first))
    paths = [Path(0, write(first), None, None, "eos"), Path(1, second, None, None, "eos")]
    paths.append(Path(2, write(third), 0, first, "eos"))
    paths += [Path(i, write(first), 0, first, "eos") for i in (3, 4)]
    paths.append(Path(5, write(third), 2, third, "eos"))
    decisions = [BranchDecision(0, first, 1.0, 0.0, 0.9, n, 0.9, branched) for n, branched in ((0, True), (1, False))]
    return builder.build(paths, decisions, None)


def test_shares_of_a_hand_made_tree():
    assert branching.shares([hand_made_tree()]) == [4, 2, 0.75, 1.0, 0.75, 1, 1]
    assert branching.calls_per_path([hand_made_tree()]) == pytest.approx((1 + 0 + 2 + 1 + 1 + 2) / 6)
    assert tool_latency.Run([hand_made_tree()], 1, 1, 1, 1).longest_path == 3.0
    assert tool_latency.same_paths([hand_made_tree()], [hand_made_tree()]) == 1.0


def test_delays_are_lognormal_and_the_calls_own():
    tools = Search(0.3, 2.0, seed=1)
    delays = sorted(tools.delay(f"call {i}") for i in range(4000))
    assert statistics.median(delays) == pytest.approx(0.3, rel=0.1)
    assert delays[3800] == pytest.approx(2.0, rel=0.15)
    assert tools.delay("call 7") == Search(0.3, 2.0, seed=1).delay("call 7") != Search(0.3, 2.0).delay("call 7")
    assert Search().delay("call 7") == 0.0


def test_tables_as_markdown():
    table = Table("T", {"who": "", "ms": ".1f"}, [["a", 1.25], ["b", None]], "Note.")
    assert table.markdown() == "**T**\n\n| who | ms |\n| --- | ---: |\n| a | 1.2 |\n| b |  |\n\nNote."


def test_the_command_prints_a_file_and_refuses_other_names(tmp_path, capsys):
    proof = Proof("It is so.", "seen", [Table("T", {"n": "d"}, [[1]])])
    facts = dict.fromkeys(("cpu", "cores", "omp_threads", "vllm", "torch", "python", "commit"), "x")
    vllm_proofs.write(tmp_path / "a.json", {"machine": facts, "proofs": {"exactness": proof.to_json()}})
    vllm_proofs.main(markdown=tmp_path / "a.json")
    assert "### exactness\n\nIt is so.\n\nChecked: seen\n\n**T**" in capsys.readouterr().out
    with pytest.raises(vllm_proofs.typer.BadParameter, match="got speed"):
        vllm_proofs.main(only="speed")
