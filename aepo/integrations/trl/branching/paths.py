"""How a group of rows with one prompt grows into as many completions: all rules, no model, no tools.

The rules are those of our own rollouts (docs/rollout.md). A row of the batch is a path: a completion, and an
environment for its calls where there are environments.
"""

from __future__ import annotations

import copy
import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aepo.branching import BranchSettings, branch_chance, entropy_change, fresh_paths

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """The calls of one turn that went to the path's environment, and what the model read of each."""

    calls: tuple[Mapping[str, Any], ...]
    contents: tuple[Any, ...]


@dataclass(slots=True)
class Place:
    """Right after tool results, where a path may branch: what the path was there."""

    step: int  # turns with results up to here
    end: int  # tokens of the completion, the results' included
    messages: int
    calls: int
    failures: int
    entropy: float | None = None  # mean over the first tokens after it; None: not measured
    state: Any = None  # a fork of the environment, where a later call has changed it


@dataclass(slots=True)
class Path:
    """A completion that is being sampled. Tokens, mask and log-probs are those of the completion."""

    row: int
    prompt: list[int]
    completion: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 0 on tokens of results
    logprobs: list[float | None] = field(default_factory=list)  # 0.0 on tokens of results; empty: the engine has none
    messages: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)  # whose results were read
    rounds: int = 0  # of calls that were run, those included whose results did not fit
    calls: int = 0  # those before a branch included, so that a completion counts what is in it
    failures: int = 0
    first: int = 0  # tokens of the first segment
    initial_entropy: float | None = None  # mean over the first tokens of the first segment; None: not measured
    consecutive: int = 0  # places in a row, up to now, that branched
    branched_at: int | None = None  # turns with results that it shares with the path that it left
    undecided: deque[Place] = field(default_factory=deque)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.completion

    def add_segment(
        self, tokens: Sequence[int], logprobs: Sequence[float | None] | None, message: Message | None
    ) -> None:
        """What the model wrote next; message: the same as it reads, None where there is no token."""
        if not self.turns:
            self.first = len(tokens)
        elif tokens and len(self.turns) != self.branched_at:  # who left at a place is not asked about it again
            here = Place(len(self.turns), len(self.completion), len(self.messages), self.calls, self.failures)
            self.undecided.append(here)
        self.completion += tokens
        self.mask += [1] * len(tokens)
        self.logprobs += logprobs or ()
        if message is not None:
            self.messages.append(message)

    def add_results(self, tokens: Sequence[int], messages: Sequence[Message], turn: Turn) -> None:
        """The path reads what its calls returned; `tokens` end where the model writes on."""
        if self.logprobs:
            self.logprobs += [0.0] * len(tokens)
        self.completion += tokens
        self.mask += [0] * len(tokens)
        self.messages += messages
        self.turns.append(turn)

    def branch(self, place: Place, row: int) -> Path:
        """Another path that has read the same up to `place`, and goes on by itself."""
        return Path(
            row=row,
            prompt=self.prompt,
            completion=self.completion[: place.end],
            mask=self.mask[: place.end],
            logprobs=self.logprobs[: place.end],
            messages=copy.deepcopy(self.messages[: place.messages]),  # reward functions may change what they get
            turns=self.turns[: place.step],
            rounds=place.step,
            calls=place.calls,
            failures=place.failures,
            first=self.first,
            initial_entropy=self.initial_entropy,
            consecutive=self.consecutive,
            branched_at=place.step,
        )


@dataclass(slots=True)
class Seen:
    """What the rules met in one group."""

    fresh_paths: int = 0  # m
    chances: list[float] = field(default_factory=list)  # of every decision
    branches: int = 0
    refused: int = 0  # branches, for want of an environment in the right state
    root_entropies: list[float] = field(default_factory=list)
    tool_entropies: list[float] = field(default_factory=list)


class States(Protocol):
    """What calls run in: an environment per row, or nothing that calls change."""

    def branch(self, path: Path, place: Place, row: int) -> bool:
        """Bring the row's environment into the state of the path at the place. False: there is no branch."""
        ...

    def begin(self, row: int, prompt: list[int]) -> list[int]:
        """See that the row's environment is as `reset` leaves it; the prompt that it then has, mostly the same."""
        ...


class Group:
    """Rows of one prompt on their way to a completion each.

    rows: indices in the batch. prompt: its tokens. fresh: how many start from it, None: pre-monitoring decides, after
    the first row has gone ahead alone.

    `ready` are the paths that want the model.
    """

    def __init__(
        self,
        rows: Sequence[int],
        prompt: list[int],
        fresh: int | None,
        settings: BranchSettings,
        log_vocabulary: float,
        states: States,
    ) -> None:
        self.ready: list[Path] = []
        self.finished: dict[int, Path] = {}
        self.seen = Seen()
        self._rows = rows
        self._prompt = prompt
        self._settings = settings
        self._log_vocabulary = log_vocabulary
        self._states = states
        self._free = deque(rows)  # rows without a path
        self._started = 0
        self._probing = fresh is None and len(rows) > 1
        self._probe: Path | None = None  # the path that went ahead, once it has ended
        if self._probing:
            self._start_fresh(1)
        else:
            self._begin(min(fresh or 1, len(rows)))

    @property
    def complete(self) -> bool:
        return len(self.finished) == len(self._rows)

    def undecided(self, path: Path) -> bool:
        """Whether the path has places that the rule is about to be asked about, so that entropies are needed.

        Of the path that goes ahead only when it has ended: then all of its own are read in one pass.
        """
        if self._probing:
            return path.row in self.finished and bool(path.undecided)
        return bool(self._free and path.undecided)

    def measured(self, path: Path, initial: bool, places: Sequence[Place]) -> None:
        """Note entropies that were measured for the first time."""
        if initial and path.initial_entropy is not None:
            self.seen.root_entropies.append(path.initial_entropy)
        self.seen.tool_entropies += [place.entropy for place in places if place.entropy is not None]

    def decide(self, path: Path) -> None:
        """Ask the rule about the place before the path's newest segment."""
        if self._probing:
            return
        step = len(path.turns)
        # The path that went ahead takes its turn at every step with the others. Judged at once when its budget is
        # known it would use up the rows that are left: half of all branches left it in our own rollouts.
        if self._probe is not None:
            self._decide(self._probe, step)
        self._decide(path, step)

    def finish(self, path: Path) -> None:
        self.finished[path.row] = path

    def go_on(self) -> None:
        """Start what can start now that paths have ended; their entropies are measured."""
        if self._probing and self._all_ended:
            [self._probe] = self.finished.values()
            self._probing = False
            self._begin(self._budget(self._probe), started=1)
        while self._all_ended and self._probe is not None and self._probe.undecided:
            self._decide(self._probe, self._probe.undecided[0].step)  # nobody else has come as far
        if self._all_ended:  # what branching did not use starts fresh
            self._start_fresh(len(self._free))

    @property
    def _all_ended(self) -> bool:
        return len(self.finished) == self._started

    def _budget(self, probe: Path) -> int:
        after_tools = [_known(place.entropy) for place in probe.undecided]
        root = _known(probe.initial_entropy) if after_tools else math.nan
        return fresh_paths(len(self._rows), root, after_tools, self._settings.budget_beta)

    def _begin(self, fresh: int, started: int = 0) -> None:
        self.seen.fresh_paths = fresh
        self._start_fresh(fresh - started)

    def _decide(self, path: Path, last_step: int) -> None:
        """Judge the places up to that step which the path has not been judged at, in order."""
        while path.undecided and path.undecided[0].step <= last_step:
            place = path.undecided.popleft()
            if not self._free:
                continue
            chance = self._chance(path, place)
            self.seen.chances.append(chance)
            branches = chance > self._settings.branch_threshold
            # Of the path, and of the place: a branch starts with it, and counts the place that it left at.
            path.consecutive = path.consecutive + 1 if branches else 0
            if branches:
                self._start_branch(path, place)

    def _chance(self, path: Path, place: Place) -> float:
        rule = self._settings
        change = entropy_change(_known(place.entropy), _known(path.initial_entropy), self._log_vocabulary)
        # The trainer's seed and its checkpoints cover Python's own random numbers, as they do those that sample tokens.
        alpha = random.random() if rule.branch_alpha == "uniform" else float(rule.branch_alpha)
        return branch_chance(
            change,
            alpha=alpha,
            gamma=rule.branch_gamma,
            penalty=rule.branch_penalty,
            consecutive=path.consecutive,
        )

    def _start_branch(self, path: Path, place: Place) -> None:
        row = self._free.popleft()
        if self._states.branch(path, place, row):
            self.seen.branches += 1
            self._start(path.branch(place, row))
        else:
            self.seen.refused += 1
            self._free.append(row)

    def _start_fresh(self, count: int) -> None:
        for _ in range(count):
            row = self._free.popleft()
            self._start(Path(row, self._states.begin(row, self._prompt)))

    def _start(self, path: Path) -> None:
        self._started += 1
        self.ready.append(path)


def _known(entropy: float | None) -> float:
    assert entropy is not None, "asked about a place whose entropies were not measured"
    return entropy
