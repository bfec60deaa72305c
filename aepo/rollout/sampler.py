"""Drives an engine and tools until every question of a batch has its k paths.

One event loop serves both kinds of engine. A lockstep engine gets all paths that can go on in one call, after all
tools of the step have answered; the others get each path by itself, so that no path waits for another one's tool.
All state of a rollout lives in the objects of one call: nothing is carried from batch to batch.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from aepo.agents.protocol import AgentError, Session
from aepo.config import RolloutConfig
from aepo.interrupt import heard_by_main_thread
from aepo.rollout.branching import BranchRule
from aepo.rollout.engine import Engine, Generation
from aepo.rollout.growth import Growth, PathState
from aepo.types import FinishReason, Question, RolloutTree, TokenIds, ToolResult, Trajectory, Turn

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # finished paths, all paths of the batch
Judge = Callable[[RolloutTree], Coroutine[Any, Any, None] | None]  # begins to score a tree


class TextFormat(Protocol):
    """What the sampler needs of a `ChatFormat`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def stop_strings(self) -> tuple[str, ...]: ...

    def read(
        self,
        token_ids: Sequence[int],
        finish_reason: Literal["stop", "eos", "length"],
        *,
        before: Sequence[int] | None = None,
    ) -> Turn: ...

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds: ...


class Player(Protocol):
    """What the sampler needs of an `Agent`."""

    @property
    def format(self) -> TextFormat: ...

    @property
    def stateless(self) -> Session | None:
        """The session of all paths; None: every path has one of its own, from `open`."""
        ...

    def prompt_tokens(self, question: Question, observation: str | None) -> TokenIds: ...

    async def open(self, question: Question) -> Session: ...


class RolloutError(RuntimeError):
    """The engine failed; the cause is chained. What was finished by then is kept.

    trees: those that were complete. trajectories: of each other question with finished paths, by its id, those paths.
    """

    def __init__(self, message: str, trees: list[RolloutTree], trajectories: dict[str, list[Trajectory]]) -> None:
        super().__init__(message)
        self.trees = trees
        self.trajectories = trajectories


async def close_all(sessions: Sequence[Session]) -> None:
    """An environment that cannot be closed keeps nobody from going on."""
    for problem in await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True):
        if isinstance(problem, Exception):
            logger.warning("an environment could not be closed: %s: %s", type(problem).__name__, problem)


class Sampler:
    """Samples `config.paths` distinct paths per question; the rules are in docs/rollout.md.

    rule: the branch rule; None: that of the paper.
    """

    def __init__(self, engine: Engine, agent: Player, config: RolloutConfig, rule: BranchRule | None = None) -> None:
        self._engine = engine
        self._agent = agent
        self._config = config
        self._rule = rule

    def rollout(
        self,
        questions: Sequence[Question],
        seed: int,
        *,
        progress: Progress | None = None,
        judge: Judge | None = None,
    ) -> list[RolloutTree]:
        """`rollout_async` for callers without an event loop."""
        with heard_by_main_thread():
            return asyncio.run(self.rollout_async(questions, seed, progress=progress, judge=judge))

    async def rollout_async(
        self,
        questions: Sequence[Question],
        seed: int,
        *,
        progress: Progress | None = None,
        judge: Judge | None = None,
    ) -> list[RolloutTree]:
        """One tree per question, in order. Deterministic given `seed`, the weights and a lockstep engine.

        judge: called with each tree as soon as it is complete; the coroutine that it returns runs beside the rollouts
        that go on, and has ended when this returns. RolloutError: the engine failed; the trees that were complete are
        in the exception. ValueError: the same question twice (both would get the same random numbers), or one whose
        prompt fills the engine's context. What the judge or an environment raises is raised as it is.
        """
        if len({question.id for question in questions}) < len(questions):
            raise ValueError("questions must have different ids within one rollout")
        growths: list[Growth] = []
        sessions = await self._first_sessions(questions)
        try:
            growths += [self._growth(*pair, seed) for pair in zip(questions, sessions, strict=True)]
            await _Loop(self._engine, self._agent, growths, progress, judge).run()
        finally:
            self._engine.release()
            if self._agent.stateless is None:
                opened = [session for growth in growths for session in growth.sessions]
                await close_all([*opened, *sessions[len(growths) :]])
        return [growth.tree() for growth in growths]

    async def _first_sessions(self, questions: Sequence[Question]) -> list[Session]:
        """One per question, for its first path: what the environment says at the start is part of the prompt."""
        if (shared := self._agent.stateless) is not None:
            return [shared] * len(questions)
        opened = await asyncio.gather(*map(self._agent.open, questions), return_exceptions=True)
        sessions = [session for session in opened if not isinstance(session, BaseException)]
        for error in opened:
            if isinstance(error, BaseException):
                await close_all(sessions)
                raise error
        return sessions

    def _growth(self, question: Question, session: Session, seed: int) -> Growth:
        prompt = self._agent.prompt_tokens(question, session.observation)
        positions, shared = self._engine.max_positions, self._agent.stateless is not None
        if len(prompt) >= positions:
            raise ValueError(
                f"question {question.id!r}: its prompt has {len(prompt)} tokens, expected fewer than the engine's "
                f"{positions} positions"
            )
        log_vocabulary = math.log(self._agent.format.vocab_size)
        return Growth(question, prompt, session, shared, self._config, self._rule, log_vocabulary, positions, seed)


class _Loop:
    """Waits for generations, tools and environments, and hands them on in the order in which they were asked for."""

    def __init__(
        self,
        engine: Engine,
        agent: Player,
        growths: list[Growth],
        progress: Progress | None,
        judge: Judge | None,
    ) -> None:
        self._engine = engine
        self._agent = agent
        self._format = agent.format
        self._growths = growths
        self._progress = progress
        self._judge = judge
        self._aside: list[asyncio.Task[None]] = []  # nothing waits for these before the end
        self._pending: dict[asyncio.Task[Any], Callable[[Any], None]] = {}

    async def run(self) -> None:
        wait_for = asyncio.ALL_COMPLETED if self._engine.lockstep else asyncio.FIRST_COMPLETED
        try:
            self._submit()
            while self._pending:
                done, _ = await asyncio.wait(self._pending, return_when=wait_for)
                for task in [task for task in self._pending if task in done]:
                    self._pending.pop(task)(task.result())
                self._report_progress()
                self._submit()
            await asyncio.gather(*self._aside)
        except AgentError:  # of the user's own code: it says all there is to say
            raise
        except Exception as error:
            raise self._failure(error) from error
        finally:
            unfinished = [*self._pending, *self._aside]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    def _failure(self, error: Exception) -> RolloutError:
        trees = [growth.tree() for growth in self._growths if growth.complete]
        others = [growth for growth in self._growths if growth.finished and not growth.complete]
        kept = {growth.builder.question.id: growth.finished_trajectories() for growth in others}
        return RolloutError(
            f"{error} ({len(trees)} of {len(self._growths)} trees were complete, "
            f"and {sum(map(len, kept.values()))} paths of the others)",
            trees,
            kept,
        )

    def _submit(self) -> None:
        for growth in self._growths:
            for path in growth.opening:
                self._start(self._session_of(growth, path), partial(self._on_session, growth, path))
            growth.opening.clear()
        if self._engine.lockstep and self._pending:
            return  # tools are at work: what is ready waits for them, so that one call carries all paths
        wave = [(growth, path) for growth in self._growths for path in sorted(growth.ready, key=lambda path: path.id)]
        for growth in self._growths:
            growth.ready.clear()
        for part in [wave] if self._engine.lockstep else [[entry] for entry in wave]:
            if part:
                requests = [growth.request(path, self._format.stop_strings) for growth, path in part]
                self._start(self._engine.generate(requests), partial(self._on_segments, part))

    def _start(self, work: Awaitable[Any], handle: Callable[[Any], None]) -> None:
        self._pending[asyncio.ensure_future(work)] = handle

    def _session_of(self, growth: Growth, path: PathState) -> Awaitable[Session | None]:
        if path.parent is None:
            return self._agent.open(growth.builder.question)
        assert path.parent.session is not None
        return path.parent.session.branch(path.step)

    def _on_session(self, growth: Growth, path: PathState, session: Session | None) -> None:
        if session is None:
            growth.refuse(path)
            return
        growth.sessions.append(session)
        if path.parent is None and session.observation != growth.observation:
            raise AgentError(
                f"question {growth.builder.question.id!r}: reset of the environment returned {session.observation!r}, "
                f"and before that {growth.observation!r}; expected the same text for the same row"
            )
        growth.begin(path, session)

    def _on_segments(self, part: list[tuple[Growth, PathState]], generations: list[Generation]) -> None:
        for (growth, path), generation in zip(part, generations, strict=True):
            segment = growth.add_segment(path, generation)
            if generation.finish_reason == "length":
                self._finish(growth, path, segment, "length")
                continue
            before = growth.builder.nodes[path.node].token_ids
            turn = self._format.read(generation.token_ids, generation.finish_reason, before=before)
            if turn.answered:
                self._finish(growth, path, segment, "answered")
            elif not turn.calls:
                self._finish(growth, path, segment, "eos")
            elif not growth.may_call(path, len(turn.calls)):
                self._finish(growth, path, segment, "tool_limit")
            else:
                assert path.session is not None
                self._start(path.session.run(turn.calls), partial(self._on_results, growth, path, segment, turn))

    def _on_results(self, growth: Growth, path: PathState, segment: int, turn: Turn, results: list[ToolResult]) -> None:
        if not growth.add_results(path, segment, self._format.result_tokens(turn, results), turn, results):
            self._finish(growth, path, segment, "length")

    def _finish(self, growth: Growth, path: PathState, leaf: int, reason: FinishReason) -> None:
        if self._agent.stateless is not None:
            self._finished(growth, path, leaf, reason, None)
        else:
            assert path.session is not None
            self._start(path.session.reward(), partial(self._finished, growth, path, leaf, reason))

    def _finished(self, growth: Growth, path: PathState, leaf: int, reason: FinishReason, reward: float | None) -> None:
        growth.finish(path, leaf, reason, reward)
        if not growth.complete:
            return
        if growth.sessions:
            self._aside.append(asyncio.ensure_future(close_all(growth.sessions)))
            growth.sessions = []
        if self._judge is not None and (work := self._judge(growth.tree())) is not None:
            self._aside.append(asyncio.ensure_future(work))

    def _report_progress(self) -> None:
        if self._progress is not None:
            finished = sum(len(growth.finished) for growth in self._growths)
            self._progress(finished, sum(growth.paths for growth in self._growths))
