"""Environments: state that the tool calls of one path change, and how a branch gets a state of its own.

A branch continues in a `fork()` of the state at the branch, where the environment has that method; else in a new
instance, reset with the same row, on which the recorded calls are repeated and must give the same results; else there
is no branch. docs/environments.md is the user's side of it.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from aepo.agents.tools.environment_instances import NOT_TOOLS, SHOWN_CHARS, EnvironmentFailed, Instances
from aepo.agents.tools.text import cut
from aepo.agents.tools.toolbox import ToolBox, schema_of_tool
from aepo.types import Question, ToolCall, ToolResult

Turn = tuple[tuple[ToolCall, ToolResult], ...]


class EnvironmentTools:
    """The tools of a task with an environment: the public methods of its class, and the stateless ones of `toolbox`.

    environment: a class as in `aepo.agents.protocol.Environment`. Its methods are tools as `FunctionTool` makes them,
        in alphabetical order, as in TRL. ValueError where it cannot be used.
    timeout: seconds for a call of any method, of `reset`, `fork`, `get_reward` and `close` too.

    counters: sessions opened, branches forked and replayed, and branches refused; `refusals` counts their reasons.
    """

    stateful = True

    def __init__(self, environment: type, toolbox: ToolBox, timeout: float) -> None:
        self.instances = Instances(environment, toolbox, timeout)
        self._toolbox = toolbox
        name, methods = self.instances.name, self.instances.methods
        for twice in methods.keys() & toolbox.tools.keys():
            raise ValueError(f"two tools are called {twice!r}: {name}.{twice} and {toolbox.tools[twice]!r}")
        if not methods and not toolbox.tools:
            raise ValueError(f"environment {name} has no tool: expected a public method besides {', '.join(NOT_TOOLS)}")
        self.counters: Counter[str] = Counter(opened=0, forked=0, replayed=0, refused=0)
        self.refusals: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """Of the class."""
        return self.instances.name

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What chat templates take as `tools`."""
        return [*map(schema_of_tool, self.instances.methods.values()), *self._toolbox.schemas]

    def check(self, question: Question) -> None:
        """ValueError where `reset` needs a column that the question does not have."""
        self.instances.check(question)

    async def open(self, question: Question) -> EnvironmentSession:
        """What the calls of a new path run in; `EnvironmentFailed` where the environment cannot be made or reset."""
        session = await self.begin(question)
        self.counters["opened"] += 1
        return session

    async def begin(self, question: Question) -> EnvironmentSession:
        """A session right after `reset`, not counted."""
        return EnvironmentSession(self, question, *await self.instances.make(question))

    def refuse(self, failure: EnvironmentFailed) -> None:
        """Count a branch that cannot be made; the first one of each reason is told."""
        self.counters["refused"] += 1
        self.refusals[failure.reason] += 1
        if self.refusals[failure.reason] == 1:
            warnings.warn(f"no branch: {failure}; more of this kind are only counted", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Close the stateless tools. Sessions are closed by who opened them."""
        self._toolbox.close()


class EnvironmentSession:
    """One path's instance; implements `aepo.agents.protocol.Session`.

    The state after a turn (one call of `run`) is kept as a fork, made when the next turn begins, unless it was
    forgotten before. So a path that nobody may branch from any more is not forked.
    """

    def __init__(
        self,
        tools: EnvironmentTools,
        question: Question,
        instance: Any,
        observation: str | None,
        record: Sequence[Turn] = (),
    ) -> None:
        self.observation = observation
        self._tools = tools
        self._instances = tools.instances
        self._question = question
        self._instance = instance
        self._record = list(record)  # of every turn, its calls of the environment
        self._states: dict[int, Any] = {}  # number of turns -> a fork, or why there is none
        self._forgotten = 0  # the state before the first turn is one reset away
        self._released: list[Any] = []  # forks that are not needed any more, to be closed
        self._lost = False  # the instance's state is unknown: a call was given up on, and may still change it
        self._lock = asyncio.Lock()  # one at a time touches the instance and its forks

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """The calls one after the other: each sees what the one before it did."""
        async with self._lock:
            await self._keep_state()
            await self._release_forgotten()
            try:
                results = [await self._run_one(call) for call in calls]
            except BaseException:  # cancelled, and the record does not say what was done
                self._lost = True
                raise
            turn = [(call, result) for call, result in zip(calls, results, strict=True) if self._changes(call)]
            self._record.append(tuple(turn))
            return results

    async def branch(self, turns: int) -> EnvironmentSession | None:
        """A session in the state after the first `turns` turns, with its own instance; None: refused, and counted."""
        if not 0 <= turns <= len(self._record):
            raise ValueError(f"turns must be 0 to {len(self._record)}, got {turns}")
        by_fork = self._instances.forks and turns > 0
        try:
            session = await (self._fork(turns) if by_fork else self._repeat(self._record[:turns]))
        except EnvironmentFailed as failure:
            self._tools.refuse(failure)
            return None
        self._tools.counters["forked" if by_fork else "replayed"] += 1
        return session

    def forget(self, turns: int) -> None:
        """Drop the states after `turns` turns and before."""
        self._forgotten = max(self._forgotten, turns)
        for kept in [number for number in self._states if number <= turns]:
            self._released.append(self._states.pop(kept))

    async def reward(self) -> float | None:
        """What `get_reward` returns; None where there is no such method."""
        async with self._lock:
            return await self._instances.reward(self._instance, self._question)

    async def close(self) -> None:
        """Close the instance and its forks. May be called twice."""
        async with self._lock:
            self.forget(len(self._record))
            if self._instance is not None:
                self._released.append(self._instance)
                self._instance = None
            await self._release_forgotten()

    def _changes(self, call: ToolCall) -> bool:
        return call.problem is None and call.tool in self._instances.methods

    async def _run_one(self, call: ToolCall) -> ToolResult:
        if self._lost and self._changes(call):
            return ToolResult("error: the environment does not respond", "timeout", 0.0)
        result = await self._instances.call(self._instance, call)
        self._lost = self._lost or (self._changes(call) and result.error == "timeout")
        return result

    async def _keep_state(self) -> None:
        """Before the instance changes: a fork of it, if somebody may branch here."""
        turns = len(self._record)
        if self._instances.forks and turns > self._forgotten and turns not in self._states:
            try:
                self._states[turns] = await self._fork_instance()
            except EnvironmentFailed as failure:  # who asks for the branch is told
                self._states[turns] = failure

    async def _release_forgotten(self) -> None:
        while self._released:
            state = self._released.pop()
            if not isinstance(state, EnvironmentFailed):
                await self._instances.release(state, self._question)

    async def _fork_instance(self) -> Any:
        if self._lost:
            raise self._instances.failure("fork", self._question, "is not possible", ": a call did not end")
        return await self._instances.fork(self._instance, self._question)

    async def _fork(self, turns: int) -> EnvironmentSession:
        async with self._lock:
            if turns in self._states:
                state = self._states[turns]
                if isinstance(state, EnvironmentFailed):
                    raise state
                instance = await self._instances.fork(state, self._question)
            elif turns == len(self._record):
                instance = await self._fork_instance()
            else:
                raise self._instances.failure("fork", self._question, "came too late", f": turn {turns} was forgotten")
        return EnvironmentSession(self._tools, self._question, instance, self.observation, self._record[:turns])

    async def _repeat(self, record: Sequence[Turn]) -> EnvironmentSession:
        """A new instance on which the same calls have given the same results."""
        if any(result.error == "timeout" for turn in record for _, result in turn):
            raise self._instances.failure("fork", self._question, "is missing", ", and a call timed out")
        session = await self._tools.begin(self._question)
        try:
            self._compare("reset", self.observation, session.observation)
            for turn in record:
                again = await session.run([call for call, _ in turn])
                for (call, first), second in zip(turn, again, strict=True):
                    self._compare(call.tool, (first.error, first.text), (second.error, second.text))
        except BaseException:
            await session.close()
            raise
        return session

    def _compare(self, method: str, first: object, second: object) -> None:
        if first != second:
            results = f": {cut(repr(first), SHOWN_CHARS)}, then {cut(repr(second), SHOWN_CHARS)}"
            raise self._instances.failure(method, self._question, "gave another result when it was repeated", results)
