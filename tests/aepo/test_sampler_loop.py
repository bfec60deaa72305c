"""How the sampler drives an engine and tools: waves, overlap, failures, and that nothing outlives a call."""

from __future__ import annotations

import asyncio

import pytest
from rollout_toys import (
    ANSWER,
    SEARCH,
    Characters,
    ScriptedAgent,
    ScriptedEngine,
    ScriptedTools,
    question,
    settings,
    texts,
    tools_then,
)

from aepo.rollout.engine import GenerationRequest
from aepo.rollout.sampler import RolloutError, Sampler
from aepo.types import ToolResult

GRPO = settings(paths=3, fresh_paths=3)


def questions(count: int) -> list:
    return [question(f"q{i}") for i in range(count)]


def test_lockstep_engine_gets_all_paths_of_a_step_in_one_call() -> None:
    engine = ScriptedEngine(tools_then(2))
    Sampler(engine, ScriptedAgent(ScriptedTools(seconds=0.01)), GRPO).rollout(questions(4), 0)
    assert [len(wave) for wave in engine.waves] == [12, 12, 12]
    assert engine.releases == 1


def test_branches_join_the_next_call() -> None:
    engine = ScriptedEngine(tools_then(2))
    Sampler(engine, ScriptedAgent(ScriptedTools()), settings(paths=2)).rollout(questions(2), 0)
    # Alone; after the first result; the same path again with its new sibling; the sibling's last segment.
    assert [len(wave) for wave in engine.waves] == [2, 2, 4, 2]


def test_other_engines_get_paths_one_by_one_and_no_path_waits_for_anothers_tool() -> None:
    class SlowForOne(ScriptedTools):
        async def run(self, calls):
            self.seconds = 0.0 if self.calls else 0.3
            return await super().run(calls)

    engine = ScriptedEngine(tools_then(3), lockstep=False)
    finished: list[int] = []
    sampler = Sampler(engine, ScriptedAgent(SlowForOne()), settings(paths=1))
    trees = sampler.rollout(questions(4), 0, progress=lambda done, total: finished.append(done))
    assert {len(wave) for wave in engine.waves} == {1}
    # The first call takes 0.3 s; its path made its remaining requests when all others had ended.
    names = [Characters().decode(wave[0].token_ids)[:2] for wave in engine.waves]
    assert len(set(names[-3:])) == 1
    assert len(names) == 4 * 4
    assert len(trees) == 4
    assert finished[-1] == 4


def test_progress_counts_finished_paths() -> None:
    calls: list[tuple[int, int]] = []
    sampler = Sampler(ScriptedEngine(tools_then(1)), ScriptedAgent(ScriptedTools()), GRPO)
    sampler.rollout(questions(2), 0, progress=lambda *counts: calls.append(counts))
    assert calls[-1] == (6, 6)
    assert calls == sorted(calls)


class Breaks(ScriptedEngine):
    """Fails as soon as it is to continue q1 after a tool result."""

    async def generate(self, requests):
        if any(
            Characters().decode(request.token_ids).startswith("q1?") and len(self.waves) > 1 for request in requests
        ):
            raise MemoryError("no room for the cache")
        return await super().generate(requests)


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_failing_engine_loses_no_finished_tree(lockstep: bool) -> None:
    def script(text: str, seed: int) -> tuple[str, float, str]:
        return (f"{seed:x} {ANSWER}", 1.0, "stop") if text.startswith("q0") else tools_then(2)(text, seed)

    engine = Breaks(script, lockstep)
    sampler = Sampler(engine, ScriptedAgent(ScriptedTools(seconds=0.05)), settings(paths=1))
    with pytest.raises(RolloutError, match=r"no room for the cache .*1 of 2 trees were complete") as caught:
        sampler.rollout(questions(2), 0)
    assert [tree.question.id for tree in caught.value.trees] == ["q0"]
    assert isinstance(caught.value.__cause__, MemoryError)
    assert engine.releases == 1


def test_finished_paths_of_a_tree_that_broke_are_kept() -> None:
    """Path 0 goes ahead alone and answers; the engine breaks at the others."""

    class BreaksLater(ScriptedEngine):
        async def generate(self, requests):
            if len(self.waves) == 3:
                raise ConnectionError("engine gone")
            return await super().generate(requests)

    sampler = Sampler(BreaksLater(tools_then(2)), ScriptedAgent(ScriptedTools()), settings(paths=3, fresh_paths=None))
    with pytest.raises(RolloutError, match=r"gone .0 of 1 trees were complete, and 1 paths of the others") as caught:
        sampler.rollout(questions(1), 0)
    assert caught.value.trees == []
    (trajectory,) = caught.value.trajectories["q0"]
    assert Characters().decode(trajectory.token_ids).endswith(ANSWER)
    assert sum(trajectory.generated) == len(trajectory.token_ids) - len("q0?[r][r]")


def test_nothing_is_carried_from_batch_to_batch() -> None:
    """Also not after a failure: the published code kept path state on the engine and crashed after some steps."""
    sampler = Sampler(Breaks(tools_then(2)), ScriptedAgent(ScriptedTools()), GRPO)
    first = sampler.rollout([question("q0")], 0)
    with pytest.raises(RolloutError):
        sampler.rollout([question("q1")], 0)
    assert sampler.rollout([question("q0")], 0) == first


def test_cancelling_stops_the_tools_and_releases_the_engine() -> None:
    engine = ScriptedEngine(tools_then(1))
    tools = ScriptedTools(seconds=60.0)

    async def cancelled() -> None:
        rollout = asyncio.ensure_future(
            Sampler(engine, ScriptedAgent(tools), GRPO).rollout_async(questions(1), 0),
        )
        await asyncio.sleep(0.05)
        rollout.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rollout
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(cancelled())
    assert tools.calls
    assert engine.releases == 1


def test_an_engine_that_fails_waits_for_no_tool_and_no_judge() -> None:
    """One path's tool and the judge of a finished tree would take a minute each."""

    def script(text: str, seed: int) -> tuple[str, float, str]:
        if text.startswith("q2"):
            raise ConnectionError("engine gone")
        return (ANSWER if text.startswith("q0") else SEARCH), 1.0, "stop"

    class Late(ScriptedEngine):
        async def generate(self, requests):
            name = Characters().decode(requests[0].token_ids)[:2]
            await asyncio.sleep({"q0": 0, "q1": 0, "q2": 0.1}[name])
            return await super().generate(requests)

    cancelled: list[str] = []

    async def minute(name: str) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    class Tools(ScriptedTools):
        async def run(self, calls):
            await minute("tool")

    async def rollout() -> None:
        sampler = Sampler(Late(script, lockstep=False), ScriptedAgent(Tools()), settings(paths=1))
        trees = sampler.rollout_async(questions(3), 0, judge=lambda tree: minute("judge"))
        with pytest.raises(RolloutError, match="engine gone"):
            await asyncio.wait_for(trees, 10)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(rollout())
    assert sorted(cancelled) == ["judge", "tool"]


def test_the_same_question_twice_is_refused() -> None:
    sampler = Sampler(ScriptedEngine(tools_then(1)), ScriptedAgent(ScriptedTools()), GRPO)
    with pytest.raises(ValueError, match="different ids"):
        sampler.rollout([question("q0"), question("q0")], 0)
    assert sampler.rollout([], 0) == []


def test_requests_carry_prefix_limits_and_stop_strings() -> None:
    engine = ScriptedEngine(tools_then(1))
    config = settings(paths=1, max_tokens=100, max_segment_tokens=70, temperature=0.7)
    tree = Sampler(engine, ScriptedAgent(ScriptedTools(ToolResult("r", None, 0.0))), config).rollout(questions(1), 5)[0]
    first, second = (wave[0] for wave in engine.waves)
    assert isinstance(first, GenerationRequest)
    assert Characters().decode(first.token_ids) == "q0?"
    assert Characters().decode(second.token_ids) == "q0?" + texts(tree)[0][: len(second.token_ids) - 3]
    assert second.token_ids[-3:] == tuple(map(ord, "[r]"))
    assert (first.max_new_tokens, second.max_new_tokens) == (70, 100 - (len(second.token_ids) - 3))
    assert first.temperature == 0.7
    assert first.stop == ("</search>", "</answer>")
    assert first.seed != second.seed
    assert {node.version for node in tree.nodes if node.source == "model"} == {3}
