"""Drives an engine and tools until every question of a batch has its k paths.

One event loop serves both kinds of engine. A lockstep engine gets all paths that can go on in one call, after all
tools of the step have answered; the others get each path by itself, so that no path waits for another one's tool.
All state of a rollout lives in the objects of one call: nothing is carried from batch to batch.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

from aepo.agents.protocol import AgentError, Session
from aepo.config import RolloutConfig
from aepo.rollout.branching import BranchPoint, BranchRule, decide_branch, decide_budget, mean_entropy
from aepo.rollout.engine import Engine, Generation, GenerationRequest
from aepo.rollout.seeding import derive_seed, derive_uniform
from aepo.rollout.tree import TreeBuilder, check_tree, flatten
from aepo.types import (
    BranchDecision,
    BudgetDecision,
    FinishReason,
    Path,
    Question,
    RolloutTree,
    TokenIds,
    ToolResult,
    Trajectory,
    Turn,
)

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # finished paths, all paths of the batch


Judge = Callable[[RolloutTree], Coroutine[Any, Any, None] | None]  # begins to score a tree


class TextFormat(Protocol):
    """What the sampler needs of a `ChatFormat`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def stop_strings(self) -> tuple[str, ...]: ...

    def read(self, token_ids: Sequence[int], finish_reason: Literal["stop", "eos", "length"]) -> Turn: ...

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
        growths: list[_Growth] = []
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

    def _growth(self, question: Question, session: Session, seed: int) -> _Growth:
        prompt = self._agent.prompt_tokens(question, session.observation)
        positions, shared = self._engine.max_positions, self._agent.stateless is not None
        if len(prompt) >= positions:
            raise ValueError(
                f"question {question.id!r}: its prompt has {len(prompt)} tokens, expected fewer than the engine's "
                f"{positions} positions"
            )
        log_vocabulary = math.log(self._agent.format.vocab_size)
        return _Growth(question, prompt, session, shared, self._config, self._rule, log_vocabulary, positions, seed)


@dataclass(slots=True)
class _PathState:
    """A path that is being sampled. `stream` seeds it: a hash of where it comes from, not of when it was started."""

    stream: int
    node: int  # prompt or tool node from which the next segment starts
    id: int = -1  # set when it begins
    session: Session | None = None  # what its calls run in; set when it begins
    step: int = 0  # model segments so far = tool nodes read so far
    calls: int = 0  # tool results so far
    initial_entropy: float = math.nan  # of the first segment; set before it is used
    consecutive: int = 0  # steps in a row, up to now, that branched
    parent: _PathState | None = None
    branch_node: int | None = None
    decision: int | None = None  # index of the one that this path branched by
    undecided: deque[tuple[int, int, int]] = field(default_factory=deque)  # (tool node, step, segment after it)


class _Growth:
    """One question on its way to k paths: all rules, no waiting.

    `ready` are the paths that want the model, `opening` those that want a session of their own first.
    """

    def __init__(
        self,
        question: Question,
        prompt: TokenIds,
        session: Session,
        shared: bool,
        config: RolloutConfig,
        rule: BranchRule | None,
        log_vocabulary: float,
        max_positions: int,
        seed: int,
    ) -> None:
        self.builder = TreeBuilder(question, prompt)
        # A path ends where it has used up its own tokens or the engine's context.
        self._max_length = min(len(prompt) + config.max_tokens, max_positions)
        self.ready: list[_PathState] = []
        self.opening: list[_PathState] = []
        self.finished: dict[int, Path] = {}
        self.paths = config.paths
        self.sessions = [] if shared else [session]  # to be closed
        self._first_session: Session | None = session
        self.observation = session.observation
        self._shared = session if shared else None
        self._config = config
        self._rule = rule
        self._log_vocabulary = log_vocabulary
        self._stream = derive_seed(seed, question.id)
        self._started = 0  # paths, finished ones and those that wait for a session included
        self._begun = 0  # those that have a session; their ids are 0, 1, ...
        self._fresh = 0
        self._decisions: list[BranchDecision] = []
        self._budget: BudgetDecision | None = None
        self._probing = config.fresh_paths is None
        self._probe: _PathState | None = None  # the path that went ahead, once it has ended
        # With pre-monitoring the first path goes ahead alone: what it meets decides how many more start fresh.
        self._start_fresh(config.fresh_paths or 1)

    @property
    def complete(self) -> bool:
        return len(self.finished) == self.paths

    def tree(self) -> RolloutTree:
        tree = self._built()
        check_tree(tree, self.paths)
        return tree

    def finished_trajectories(self) -> list[Trajectory]:
        """Of a tree that will not be completed."""
        part = self._built()
        return [flatten(part, index) for index in range(len(part.paths))]

    def _built(self) -> RolloutTree:
        paths = [self.finished[index] for index in sorted(self.finished)]
        return self.builder.build(paths, self._decisions, self._budget)

    def begin(self, path: _PathState, session: Session) -> None:
        """The path has what its calls run in."""
        path.id, path.session = self._begun, session
        self._begun += 1
        self.ready.append(path)

    def refuse(self, path: _PathState) -> None:
        """No environment can be brought into the state that the path would begin in: there is no branch there."""
        assert path.decision is not None
        self._decisions[path.decision] = replace(self._decisions[path.decision], branched=False, refused=True)
        self._started -= 1
        self._start_what_is_left()

    def request(self, path: _PathState, stop: tuple[str, ...]) -> GenerationRequest:
        return GenerationRequest(
            token_ids=self.builder.tokens_to(path.node),
            max_new_tokens=min(self._max_length - self.builder.length_to(path.node), self._config.max_segment_tokens),
            temperature=self._config.temperature,
            seed=derive_seed(path.stream, "segment", path.step),
            stop=stop,
            group=self.builder.question.id,
        )

    def add_segment(self, path: _PathState, generation: Generation) -> int:
        """The path's next segment is there: its node, and the branch decision about the tool node before it."""
        node = self.builder.add_generation(path.node, generation)
        if path.step == 0:
            path.initial_entropy = mean_entropy(generation.entropies, self._config.entropy_window)
        elif path.node != path.branch_node:
            path.undecided.append((path.node, path.step, node))
        if not self._probing:
            # The path that went ahead takes its turn at every step with the others. Judged at once when its budget is
            # known it would use up the room: half of all branches left it (16 paths of up to 8 calls, random agent).
            if self._probe is not None:
                self._decide(self._probe, path.step)
            self._decide(path, path.step)
        path.step += 1
        return node

    def may_call(self, path: _PathState, calls: int) -> bool:
        return path.calls + calls <= self._config.max_tool_calls

    def add_results(
        self, path: _PathState, segment: int, tokens: TokenIds, turn: Turn, results: Sequence[ToolResult]
    ) -> bool:
        """The path reads the results and goes on; False: no token could be written after them."""
        if self.builder.length_to(segment) + len(tokens) >= self._max_length:
            return False
        path.node = self.builder.add_results(segment, tokens, turn.calls, results)
        path.calls += len(results)
        self.ready.append(path)
        return True

    def finish(self, path: _PathState, leaf: int, reason: FinishReason, reward: float | None) -> None:
        """reward: what the path's environment says."""
        parent = None if path.parent is None else path.parent.id
        self.finished[path.id] = Path(path.id, leaf, parent, path.branch_node, reason, reward)
        if self._probing:
            self._probing = False
            window = self._config.entropy_window
            after_tools = [mean_entropy(self._entropies(segment), window) for _, _, segment in path.undecided]
            self._budget = decide_budget(path.initial_entropy, after_tools, self._config)
            self._start_fresh(self._budget.fresh_paths - 1)
            self._probe = path
        self._start_what_is_left()

    def _start_what_is_left(self) -> None:
        while self._all_ended and self._probe is not None and self._probe.undecided:
            self._decide(self._probe, self._probe.undecided[0][1])  # nobody else has come as far
        if self._all_ended:  # what branching did not use starts fresh
            self._start_fresh(self.paths - self._started)

    @property
    def _all_ended(self) -> bool:
        return len(self.finished) == self._started

    def _entropies(self, segment: int) -> tuple[float, ...]:
        return self.builder.nodes[segment].entropies

    def _decide(self, path: _PathState, last_step: int) -> None:
        """Judge the tool nodes up to that step which the path has read since it was last judged, in order."""
        while path.undecided and path.undecided[0][1] <= last_step:
            node, step, segment = path.undecided.popleft()
            point = BranchPoint(
                entropies=self._entropies(segment),
                logprobs=self.builder.nodes[segment].logprobs,
                initial_entropy=path.initial_entropy,
                log_vocabulary=self._log_vocabulary,
                uniform=derive_uniform(path.stream, "alpha", step),
                consecutive=path.consecutive,
                room=self.paths - self._started,
                step=step,
            )
            decision = decide_branch(path.id, node, point, self._config, self._rule)
            self._decisions.append(decision)
            path.consecutive = path.consecutive + 1 if decision.branched else 0
            if decision.branched:
                self._start_branch(path, node, step)
            elif self._shared is None and path.session is not None:
                path.session.forget(step)

    def _start_branch(self, parent: _PathState, node: int, step: int) -> None:
        """A sibling that reads the same tool results and goes on by itself.

        The step at which it left belongs to both paths, so it starts with the parent's counter, that step included,
        and is not asked again about the tool node that made it.
        """
        branch = _PathState(
            stream=derive_seed(parent.stream, "branch", step),
            node=node,
            step=step,
            calls=self.builder.calls_to(node),
            initial_entropy=parent.initial_entropy,
            consecutive=parent.consecutive,
            parent=parent,
            branch_node=node,
            decision=len(self._decisions) - 1,
        )
        self._start(branch)

    def _start_fresh(self, count: int) -> None:
        for _ in range(count):
            self._start(_PathState(stream=derive_seed(self._stream, "fresh", self._fresh), node=0))
            self._fresh += 1

    def _start(self, path: _PathState) -> None:
        self._started += 1
        if self._shared is not None:
            self.begin(path, self._shared)
        elif self._first_session is not None:  # it was opened to make the prompt
            session, self._first_session = self._first_session, None
            self.begin(path, session)
        else:
            self.opening.append(path)


class _Loop:
    """Waits for generations, tools and environments, and hands them on in the order in which they were asked for."""

    def __init__(
        self,
        engine: Engine,
        agent: Player,
        growths: list[_Growth],
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

    def _session_of(self, growth: _Growth, path: _PathState) -> Awaitable[Session | None]:
        if path.parent is None:
            return self._agent.open(growth.builder.question)
        assert path.parent.session is not None
        return path.parent.session.branch(path.step)

    def _on_session(self, growth: _Growth, path: _PathState, session: Session | None) -> None:
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

    def _on_segments(self, part: list[tuple[_Growth, _PathState]], generations: list[Generation]) -> None:
        for (growth, path), generation in zip(part, generations, strict=True):
            segment = growth.add_segment(path, generation)
            if generation.finish_reason == "length":
                self._finish(growth, path, segment, "length")
                continue
            turn = self._format.read(generation.token_ids, generation.finish_reason)
            if turn.answered:
                self._finish(growth, path, segment, "answered")
            elif not turn.calls:
                self._finish(growth, path, segment, "eos")
            elif not growth.may_call(path, len(turn.calls)):
                self._finish(growth, path, segment, "tool_limit")
            else:
                assert path.session is not None
                self._start(path.session.run(turn.calls), partial(self._on_results, growth, path, segment, turn))

    def _on_results(
        self, growth: _Growth, path: _PathState, segment: int, turn: Turn, results: list[ToolResult]
    ) -> None:
        if not growth.add_results(path, segment, self._format.result_tokens(turn, results), turn, results):
            self._finish(growth, path, segment, "length")

    def _finish(self, growth: _Growth, path: _PathState, leaf: int, reason: FinishReason) -> None:
        if self._agent.stateless is not None:
            self._finished(growth, path, leaf, reason, None)
        else:
            assert path.session is not None
            self._start(path.session.reward(), partial(self._finished, growth, path, leaf, reason))

    def _finished(
        self, growth: _Growth, path: _PathState, leaf: int, reason: FinishReason, reward: float | None
    ) -> None:
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
