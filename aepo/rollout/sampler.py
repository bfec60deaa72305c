"""Drives an engine and tools until every question of a batch has its k paths.

One event loop serves both kinds of engine. A lockstep engine gets all paths that can go on in one call, after all
tools of the step have answered; the others get each path by itself, so that no path waits for another one's tool.
All state of a rollout lives in the objects of one call: nothing is carried from batch to batch.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from aepo.config import RolloutConfig
from aepo.rollout.branching import decide_branch, decide_budget, mean_entropy
from aepo.rollout.engine import Engine, Generation, GenerationRequest
from aepo.rollout.seeding import derive_seed, derive_uniform
from aepo.rollout.tree import TreeBuilder, check_tree, flatten
from aepo.types import (
    BranchDecision,
    BudgetDecision,
    Path,
    Question,
    RolloutTree,
    TokenIds,
    ToolCall,
    ToolResult,
    Trajectory,
)

ANSWER_STOP = "</answer>"

FinishReason = Literal["answered", "eos", "length", "tool_limit"]
Progress = Callable[[int, int], None]  # finished paths, all paths of the batch


class Tools(Protocol):
    """What the sampler needs of a `ToolBox`."""

    @property
    def stop_strings(self) -> tuple[str, ...]: ...

    def parse(self, text: str) -> ToolCall | None: ...

    def run(self, calls: Sequence[ToolCall]) -> Awaitable[list[ToolResult]]: ...


class TextFormat(Protocol):
    """What the sampler needs of a `LanguageModel`: how text becomes tokens and back."""

    @property
    def vocab_size(self) -> int: ...

    def prompt_tokens(self, question_text: str) -> TokenIds: ...

    def tool_result_tokens(self, result_text: str) -> TokenIds: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class RolloutError(RuntimeError):
    """The engine failed; the cause is chained. What was finished by then is kept.

    trees: those that were complete. trajectories: of each other question with finished paths, by its id, those paths.
    """

    def __init__(self, message: str, trees: list[RolloutTree], trajectories: dict[str, list[Trajectory]]) -> None:
        super().__init__(message)
        self.trees = trees
        self.trajectories = trajectories


class Sampler:
    """Samples `config.paths` distinct paths per question; the rules are in docs/rollout.md."""

    def __init__(self, engine: Engine, toolbox: Tools, text_format: TextFormat, config: RolloutConfig) -> None:
        self._engine = engine
        self._toolbox = toolbox
        self._format = text_format
        self._config = config

    def rollout(
        self, questions: Sequence[Question], seed: int, *, progress: Progress | None = None
    ) -> list[RolloutTree]:
        """`rollout_async` for callers without an event loop."""
        return asyncio.run(self.rollout_async(questions, seed, progress=progress))

    async def rollout_async(
        self, questions: Sequence[Question], seed: int, *, progress: Progress | None = None
    ) -> list[RolloutTree]:
        """One tree per question, in order. Deterministic given `seed`, the weights and a lockstep engine.

        RolloutError: the engine failed; the trees that were complete are in the exception. ValueError: the same
        question twice (both would get the same random numbers), or one whose prompt fills the engine's context.
        """
        if len({question.id for question in questions}) < len(questions):
            raise ValueError("questions must have different ids within one rollout")
        positions = self._engine.max_positions
        growths = [_Growth(question, self._format, self._config, positions, seed) for question in questions]
        try:
            await _Loop(self._engine, self._toolbox, self._format, growths, progress).run()
        finally:
            self._engine.release()
        return [growth.tree() for growth in growths]


@dataclass(slots=True)
class _PathState:
    """A path that is being sampled. `stream` seeds it: a hash of where it comes from, not of when it was started."""

    id: int
    stream: int
    node: int  # prompt or tool node from which the next segment starts
    step: int = 0  # model segments so far = tool results read so far
    initial_entropy: float = math.nan  # of the first segment; set before it is used
    consecutive: int = 0  # steps in a row, up to now, that branched
    parent: int | None = None
    branch_node: int | None = None
    undecided: deque[tuple[int, int, float]] = field(default_factory=deque)  # (tool node, step, entropy after it)


class _Growth:
    """One question on its way to k paths: all rules, no waiting. `ready` are the paths that want the model."""

    def __init__(
        self, question: Question, text_format: TextFormat, config: RolloutConfig, max_positions: int, seed: int
    ) -> None:
        self.builder = TreeBuilder(question, text_format.prompt_tokens(question.text))
        if self.builder.length_to(0) >= max_positions:
            raise ValueError(
                f"question {question.id!r}: its prompt has {self.builder.length_to(0)} tokens, expected fewer than the "
                f"engine's {max_positions} positions"
            )
        # A path ends where it has used up its own tokens or the engine's context.
        self._max_length = min(self.builder.length_to(0) + config.max_tokens, max_positions)
        self.ready: list[_PathState] = []
        self.finished: dict[int, Path] = {}
        self.paths = config.paths
        self._config = config
        self._log_vocabulary = math.log(text_format.vocab_size)
        self._stream = derive_seed(seed, question.id)
        self._started = 0  # paths, finished ones included; their ids are 0, 1, ...
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
        paths = [self.finished[index] for index in sorted(self.finished)]
        tree = self.builder.build(paths, self._decisions, self._budget)
        check_tree(tree, self.paths)
        return tree

    def finished_trajectories(self) -> list[Trajectory]:
        """Of a tree that will not be completed."""
        paths = [self.finished[index] for index in sorted(self.finished)]
        part = self.builder.build(paths, self._decisions, self._budget)
        return [flatten(part, index) for index in range(len(paths))]

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
        """The path's next segment is there: its node, and the branch decision about the tool result before it."""
        node = self.builder.add_generation(path.node, generation)
        entropy = mean_entropy(generation.entropies, self._config.entropy_window)
        if path.step == 0:
            path.initial_entropy = entropy
        elif path.node != path.branch_node:
            path.undecided.append((path.node, path.step, entropy))
        if not self._probing:
            # The path that went ahead takes its turn at every step with the others. Judged at once when its budget is
            # known it would use up the room: half of all branches left it (16 paths of up to 8 calls, random agent).
            if self._probe is not None:
                self._decide(self._probe, path.step)
            self._decide(path, path.step)
        path.step += 1
        return node

    def may_call(self, path: _PathState) -> bool:
        return path.step <= self._config.max_tool_calls

    def add_tool_result(
        self, path: _PathState, segment: int, tokens: TokenIds, call: ToolCall | None, result: ToolResult
    ) -> None:
        """The path reads the result and goes on, or ends before it where no token could be written after it."""
        if self.builder.length_to(segment) + len(tokens) >= self._max_length:
            self.finish(path, segment, "length")
        else:
            path.node = self.builder.add_tool_result(segment, tokens, call, result)
            self.ready.append(path)

    def finish(self, path: _PathState, leaf: int, reason: FinishReason) -> None:
        self.finished[path.id] = Path(path.id, leaf, path.parent, path.branch_node, reason)
        if self._probing:
            self._probing = False
            tool_entropies = [entropy for _, _, entropy in path.undecided]
            self._budget = decide_budget(path.initial_entropy, tool_entropies, self._config)
            self._start_fresh(self._budget.fresh_paths - 1)
            self._probe = path
        while self._all_ended and self._probe is not None and self._probe.undecided:
            self._decide(self._probe, self._probe.undecided[0][1])  # nobody else has come as far
        if self._all_ended:  # what branching did not use starts fresh
            self._start_fresh(self.paths - self._started)

    @property
    def _all_ended(self) -> bool:
        return len(self.finished) == self._started

    def _decide(self, path: _PathState, last_step: int) -> None:
        """Judge the tool results up to that step which the path has read since it was last judged, in order."""
        while path.undecided and path.undecided[0][1] <= last_step:
            node, step, entropy = path.undecided.popleft()
            decision = decide_branch(
                path=path.id,
                node=node,
                entropy=entropy,
                initial_entropy=path.initial_entropy,
                log_vocabulary=self._log_vocabulary,
                uniform=derive_uniform(path.stream, "alpha", step),
                consecutive=path.consecutive,
                room=self.paths - self._started,
                config=self._config,
            )
            self._decisions.append(decision)
            path.consecutive = path.consecutive + 1 if decision.branched else 0
            if decision.branched:
                self._start_branch(path, node, step)

    def _start_branch(self, parent: _PathState, node: int, step: int) -> None:
        """A sibling that reads the same tool result and goes on by itself.

        The step at which it left belongs to both paths, so it starts with the parent's counter, that step included,
        and is not asked again about the tool result that made it.
        """
        branch = _PathState(
            id=self._started,
            stream=derive_seed(parent.stream, "branch", step),
            node=node,
            step=step,
            initial_entropy=parent.initial_entropy,
            consecutive=parent.consecutive,
            parent=parent.id,
            branch_node=node,
        )
        self._started += 1
        self.ready.append(branch)

    def _start_fresh(self, count: int) -> None:
        for _ in range(count):
            stream = derive_seed(self._stream, "fresh", self._fresh)
            self.ready.append(_PathState(id=self._started, stream=stream, node=0))
            self._started += 1
            self._fresh += 1


class _Loop:
    """Waits for generations and tools, and hands them on in the order in which they were asked for."""

    def __init__(
        self,
        engine: Engine,
        toolbox: Tools,
        text_format: TextFormat,
        growths: list[_Growth],
        progress: Progress | None,
    ) -> None:
        self._engine = engine
        self._toolbox = toolbox
        self._format = text_format
        self._growths = growths
        self._progress = progress
        self._stop = (*toolbox.stop_strings, ANSWER_STOP)
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
        except Exception as error:
            trees = [growth.tree() for growth in self._growths if growth.complete]
            others = [growth for growth in self._growths if growth.finished and not growth.complete]
            kept = {growth.builder.question.id: growth.finished_trajectories() for growth in others}
            raise RolloutError(
                f"{error} ({len(trees)} of {len(self._growths)} trees were complete, "
                f"and {sum(map(len, kept.values()))} paths of the others)",
                trees,
                kept,
            ) from error
        finally:
            for task in self._pending:
                task.cancel()
            await asyncio.gather(*self._pending, return_exceptions=True)

    def _submit(self) -> None:
        if self._engine.lockstep and self._pending:
            return  # tools are at work: what is ready waits for them, so that one call carries all paths
        wave = [(growth, path) for growth in self._growths for path in sorted(growth.ready, key=lambda path: path.id)]
        for growth in self._growths:
            growth.ready.clear()
        for part in [wave] if self._engine.lockstep else [[entry] for entry in wave]:
            if part:
                requests = [growth.request(path, self._stop) for growth, path in part]
                self._start(self._engine.generate(requests), partial(self._on_segments, part))

    def _start(self, work: Awaitable[Any], handle: Callable[[Any], None]) -> None:
        self._pending[asyncio.ensure_future(work)] = handle

    def _on_segments(self, part: list[tuple[_Growth, _PathState]], generations: list[Generation]) -> None:
        for (growth, path), generation in zip(part, generations, strict=True):
            segment = growth.add_segment(path, generation)
            if generation.finish_reason != "stop":
                growth.finish(path, segment, generation.finish_reason)
                continue
            text = self._format.decode(generation.token_ids)
            if ANSWER_STOP in text:
                growth.finish(path, segment, "answered")
            elif not growth.may_call(path):
                growth.finish(path, segment, "tool_limit")
            elif (call := self._toolbox.parse(text)) is not None:
                self._start(self._toolbox.run([call]), partial(self._on_tool_result, growth, path, segment, call))
            else:  # a closing tag that closes nothing
                unparsed = ToolResult("error: the closing tag has no opening tag before it", "unknown_tool", 0.0)
                self._on_tool_result(growth, path, segment, None, [unparsed])

    def _on_tool_result(
        self, growth: _Growth, path: _PathState, segment: int, call: ToolCall | None, results: list[ToolResult]
    ) -> None:
        tokens = self._format.tool_result_tokens(results[0].text)
        growth.add_tool_result(path, segment, tokens, call, results[0])

    def _report_progress(self) -> None:
        if self._progress is not None:
            finished = sum(len(growth.finished) for growth in self._growths)
            self._progress(finished, sum(growth.paths for growth in self._growths))
