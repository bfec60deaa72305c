"""How one question grows into its k paths: all rules, no waiting. `sampler.py` does the waiting."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from aepo.agents.protocol import Session
from aepo.branching import mean_entropy
from aepo.config import RolloutConfig
from aepo.rollout.branching import BranchPoint, BranchRule, decide_branch, decide_budget
from aepo.rollout.engine import Generation, GenerationRequest
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


@dataclass(slots=True)
class PathState:
    """A path that is being sampled. `stream` seeds it: a hash of where it comes from, not of when it was started."""

    stream: int
    node: int  # prompt or tool node from which the next segment starts
    id: int = -1  # set when it begins
    session: Session | None = None  # what its calls run in; set when it begins
    step: int = 0  # model segments so far = tool nodes read so far
    calls: int = 0  # tool results so far
    initial_entropy: float = math.nan  # of the first segment; set before it is used
    consecutive: int = 0  # steps in a row, up to now, that branched
    parent: PathState | None = None
    branch_node: int | None = None
    decision: int | None = None  # index of the one that this path branched by
    undecided: deque[tuple[int, int, int]] = field(default_factory=deque)  # (tool node, step, segment after it)


class Growth:
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
        self.ready: list[PathState] = []
        self.opening: list[PathState] = []
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
        self._probe: PathState | None = None  # the path that went ahead, once it has ended
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

    def begin(self, path: PathState, session: Session) -> None:
        """The path has what its calls run in."""
        path.id, path.session = self._begun, session
        self._begun += 1
        self.ready.append(path)

    def refuse(self, path: PathState) -> None:
        """No environment can be brought into the state that the path would begin in: there is no branch there."""
        assert path.decision is not None
        self._decisions[path.decision] = replace(self._decisions[path.decision], branched=False, refused=True)
        self._started -= 1
        self._start_what_is_left()

    def request(self, path: PathState, stop: tuple[str, ...]) -> GenerationRequest:
        return GenerationRequest(
            token_ids=self.builder.tokens_to(path.node),
            max_new_tokens=min(self._max_length - self.builder.length_to(path.node), self._config.max_segment_tokens),
            temperature=self._config.temperature,
            seed=derive_seed(path.stream, "segment", path.step),
            stop=stop,
            group=self.builder.question.id,
        )

    def add_segment(self, path: PathState, generation: Generation) -> int:
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

    def may_call(self, path: PathState, calls: int) -> bool:
        return path.calls + calls <= self._config.max_tool_calls

    def add_results(
        self, path: PathState, segment: int, tokens: TokenIds, turn: Turn, results: Sequence[ToolResult]
    ) -> bool:
        """The path reads the results and goes on; False: no token could be written after them."""
        if self.builder.length_to(segment) + len(tokens) >= self._max_length:
            return False
        path.node = self.builder.add_results(segment, tokens, turn.calls, results)
        path.calls += len(results)
        self.ready.append(path)
        return True

    def finish(self, path: PathState, leaf: int, reason: FinishReason, reward: float | None) -> None:
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

    def _decide(self, path: PathState, last_step: int) -> None:
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

    def _start_branch(self, parent: PathState, node: int, step: int) -> None:
        """A sibling that reads the same tool results and goes on by itself.

        The step at which it left belongs to both paths, so it starts with the parent's counter, that step included,
        and is not asked again about the tool node that made it.
        """
        branch = PathState(
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
            self._start(PathState(stream=derive_seed(self._stream, "fresh", self._fresh), node=0))
            self._fresh += 1

    def _start(self, path: PathState) -> None:
        self._started += 1
        if self._shared is not None:
            self.begin(path, self._shared)
        elif self._first_session is not None:  # it was opened to make the prompt
            session, self._first_session = self._first_session, None
            self.begin(path, session)
        else:
            self.opening.append(path)
