"""Paths with an environment of their own: what branches continue, what is refused, what is closed; and the judge."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

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
    tools_then,
)

from aepo.agents.protocol import AgentError
from aepo.rollout.sampler import RolloutError, Sampler
from aepo.rollout.tree import check_tree, path_nodes
from aepo.types import Question, RolloutTree, ToolCall, ToolResult


class Counter:
    """An environment that counts its calls, and remembers which path made them."""

    def __init__(self, world: World, count: int = 0, observation: str | None = "o") -> None:
        self.observation = observation
        self.world = world
        self.counts = [*range(count + 1)]  # after every turn
        self.forgotten = 0
        self.closed = 0

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        assert not self.closed
        await asyncio.sleep(self.world.seconds)
        results = [ToolResult(str(self.counts[-1] + i + 1), None, 0.0) for i in range(len(calls))]
        self.counts.append(self.counts[-1] + len(calls))
        return results

    async def branch(self, turns: int) -> Counter | None:
        assert self.forgotten < turns < len(self.counts)
        if turns in self.world.refused:
            return None
        return self.world.made(Counter(self.world, turns, None))

    def forget(self, turns: int) -> None:
        self.forgotten = max(self.forgotten, turns)

    async def reward(self) -> float:
        return float(self.counts[-1])

    async def close(self) -> None:
        self.closed += 1


class World:
    """An agent whose paths each have a `Counter`."""

    stateless = None
    format = Characters()

    def __init__(self, refused: Sequence[int] = (), seconds: float = 0.0, observations: Sequence[str] = ()) -> None:
        self.refused = refused
        self.seconds = seconds
        self.sessions: list[Counter] = []
        self._observations = list(observations)

    def prompt_tokens(self, asked: Question, observation: str | None) -> tuple[int, ...]:
        return self.format.prompt_tokens(f"{asked.text}{observation}")

    async def open(self, asked: Question) -> Counter:
        observation = self._observations.pop(0) if self._observations else "o"
        return self.made(Counter(self, observation=observation))

    def made(self, session: Counter) -> Counter:
        self.sessions.append(session)
        return session


def grown(world: World, config, tool_calls: int = 3, lockstep: bool = True, count: int = 2) -> list[RolloutTree]:
    engine = ScriptedEngine(tools_then(tool_calls), lockstep)
    return Sampler(engine, world, config).rollout([question(f"q{i}") for i in range(count)], 0)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("fresh_paths", [None, 1, 3])
def test_every_path_sees_a_world_in_which_only_its_own_calls_were_made(fresh_paths, lockstep: bool) -> None:
    world = World(seconds=0.001)
    config = settings(paths=6, fresh_paths=fresh_paths)
    for tree in grown(world, config, lockstep=lockstep):
        check_tree(tree, 6)
        assert any(path.parent is not None for path in tree.paths)
        for path in tree.paths:
            seen = [result.text for node in path_nodes(tree, path.id) for result in node.results]
            assert seen == ["1", "2", "3"]
            assert path.environment_reward == 3.0
        assert Characters().decode(tree.nodes[0].token_ids).endswith("o?")
    assert len(world.sessions) == 12
    assert {session.closed for session in world.sessions} == {1}


@pytest.mark.parametrize("lockstep", [True, False])
def test_where_the_world_cannot_follow_there_is_no_branch_and_it_is_counted(lockstep: bool) -> None:
    world = World(refused=(1, 3))
    for tree in grown(world, settings(paths=5), lockstep=lockstep):
        check_tree(tree, 5)
        depth = {
            d.node: sum(n.source == "tool" for n in path_nodes(tree, d.path) if n.id <= d.node) for d in tree.decisions
        }
        assert {depth[d.node] for d in tree.decisions if d.refused} == {1, 3}
        assert {depth[d.node] for d in tree.decisions if d.branched} == {2}
        assert not any(d.refused and d.branched for d in tree.decisions)
    nowhere = grown(World(refused=(1, 2, 3)), settings(paths=3), lockstep=lockstep)
    assert all(path.parent is None for tree in nowhere for path in tree.paths)
    assert all(d.refused for tree in nowhere for d in tree.decisions[:1])


def test_states_that_nobody_will_branch_from_are_forgotten() -> None:
    world = World()
    grown(world, settings(paths=3, fresh_paths=3, branch_alpha=0.0))
    assert {session.forgotten for session in world.sessions} == {3}


def test_a_reset_that_says_something_else_to_the_next_path_is_an_error() -> None:
    world = World(observations=["a", "a", "b"])
    with pytest.raises(AgentError, match=r"question 'q0'.*'b'.*'a'.*the same text for the same row"):
        grown(world, settings(paths=3, fresh_paths=3), count=1)
    assert {session.closed for session in world.sessions} == {1}


def test_nothing_stays_open_after_a_failure() -> None:
    class Breaks(ScriptedEngine):
        async def generate(self, requests):
            if len(self.waves) == 2:
                raise MemoryError("no room")
            return await super().generate(requests)

    world = World()
    with pytest.raises(RolloutError, match="no room"):
        Sampler(Breaks(tools_then(3)), world, settings(paths=4, fresh_paths=2)).rollout([question()], 0)
    assert world.sessions
    assert {session.closed for session in world.sessions} == {1}


def test_an_environment_that_cannot_be_opened_closes_those_that_were() -> None:
    class Fails(World):
        async def open(self, asked: Question) -> Counter:
            if asked.id == "q1":
                raise AgentError("reset of the environment failed")
            return await super().open(asked)

    world = Fails()
    with pytest.raises(AgentError, match="reset of the environment failed"):
        grown(world, settings(paths=2))
    assert [session.closed for session in world.sessions] == [1]


def test_the_judge_works_while_other_questions_go_on() -> None:
    events: list[str] = []

    def script(text: str, seed: int) -> tuple[str, float, str]:
        last = 0 if text.startswith("q0") else 3
        events.append(f"segment of {text[:2]}")
        return f"{seed:x} " + (SEARCH if text.count("[") < last else ANSWER), 1.0, "stop"

    def judge(tree: RolloutTree):
        async def slow() -> None:
            events.append(f"judging {tree.question.id}")
            await asyncio.sleep(0.05)
            events.append(f"judged {tree.question.id}")

        return slow()

    sampler = Sampler(ScriptedEngine(script), ScriptedAgent(ScriptedTools(seconds=0.01)), settings(paths=1))
    trees = sampler.rollout([question("q0"), question("q1")], 0, judge=judge)
    assert len(trees) == 2
    assert events.index("judging q0") < len(events) - 1 - events[::-1].index("segment of q1")
    assert {"judged q0", "judged q1"} <= set(events)


def test_what_the_judge_raises_is_raised() -> None:
    async def broken() -> None:
        raise AgentError("the judge is broken")

    sampler = Sampler(ScriptedEngine(tools_then(1)), ScriptedAgent(ScriptedTools()), settings(paths=1))
    with pytest.raises(AgentError, match="the judge is broken"):
        sampler.rollout([question()], 0, judge=lambda tree: broken())


def test_a_prompt_that_cannot_be_made_leaves_no_environment_open() -> None:
    class Fails(World):
        def prompt_tokens(self, asked: Question, observation: str | None) -> tuple[int, ...]:
            if asked.id == "q1":
                raise AgentError("this row has no prompt")
            return super().prompt_tokens(asked, observation)

    world = Fails()
    with pytest.raises(AgentError, match="this row has no prompt"):
        grown(world, settings(paths=2), count=3)
    assert [session.closed for session in world.sessions] == [1, 1, 1]
