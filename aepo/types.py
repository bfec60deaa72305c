"""What flows between the stages of a training step: one frozen dataclass per edge.

    Question -> sampler -> RolloutTree -> Response -> Reward -> ScoredTree -> advantages -> rows -> loss

A value is made in one stage and never edited later. All entropies and log-probabilities are in nats, under the
sampling distribution (softmax of logits / temperature over the full vocabulary). This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TokenIds = tuple[int, ...]
Source = Literal["prompt", "model", "tool"]
Message = Mapping[str, Any]
"""One of a dialogue, as chat templates take them: role and content, and what else the role has."""
ErrorKind = Literal["unknown_tool", "bad_arguments", "unparsed", "raised", "timeout", "empty"]
FinishReason = Literal["answered", "eos", "length", "tool_limit"]


@dataclass(frozen=True, slots=True)
class Question:
    """One task instance: a row of data."""

    id: str
    prompt: str | tuple[Message, ...]  # a text is what the user says
    answer: Any = None  # what a reward compares with; None: there is none
    kind: str = ""  # question family; success is also reported per family
    data: Mapping[str, Any] = field(default_factory=dict)  # the row's other columns, for rewards and environments

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a dialogue."""
        return ({"role": "user", "content": self.prompt},) if isinstance(self.prompt, str) else self.prompt

    @property
    def text(self) -> str:
        """What is asked, for people: the last message of the user."""
        said = [message for message in self.messages if message.get("role") == "user"] or self.messages
        return str(said[-1].get("content", "")) if said else ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A request that the model wrote. One that cannot be read has a `problem`, which goes back to the model."""

    tool: str  # "" where the name cannot be read
    arguments: Mapping[str, Any]  # by parameter name, JSON values
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What goes back to the model. A failed call has a short error text for the model and its kind in `error`."""

    text: str
    error: ErrorKind | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What a `ChatFormat` reads in one segment that the model wrote."""

    text: str  # all of it, with its tags, without the end-of-turn token
    content: str  # what is said around the calls
    calls: tuple[ToolCall, ...] = ()  # in the order in which they were written, those that cannot be read included
    answered: bool = False  # the path ends here, with an answer
    answer: str | None = None  # as the model wrote it; None: none was found
    well_formed: bool = True  # nothing but what the format allows


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens of one origin; the edge from the parent is "comes right after".

    Prompt: the root, id 0. Model: one generated segment, ending at a stop string, end-of-text or a length limit.
    Tool: the results of the calls of one segment, as the tokens that the model reads.
    """

    id: int
    parent: int | None
    source: Source
    token_ids: TokenIds
    logprobs: tuple[float, ...] = ()  # per token, model nodes only
    entropies: tuple[float, ...] = ()  # per token, model nodes only: entropy of the distribution it was drawn from
    version: int = 0  # weights that sampled the tokens, model nodes only
    finish_reason: Literal["stop", "eos", "length"] | None = None  # model nodes only
    calls: tuple[ToolCall, ...] = ()  # tool nodes only
    results: tuple[ToolResult, ...] = ()  # tool nodes only, one per call


@dataclass(frozen=True, slots=True)
class Path:
    """One of the k trajectories of a question: the nodes from the root to `leaf`."""

    id: int
    leaf: int
    parent: int | None  # the path this one branched from; None: sampled fresh from the question
    branch_node: int | None  # the tool node it branched at; None: sampled fresh
    finish_reason: FinishReason
    environment_reward: float | None = None  # what its environment says (get_reward), where there is one


@dataclass(frozen=True, slots=True)
class BranchDecision:
    """One evaluation of the branch rule, after the segment that follows tool node `node` on path `path`."""

    path: int
    node: int
    entropy: float  # mean over the window of the segment after `node`
    delta: float  # (entropy - initial entropy of the path) / log V
    alpha: float
    consecutive: int  # branch steps in a row on this path just before this one
    probability: float
    branched: bool  # probability > threshold and the question still had room
    refused: bool = False  # it would have branched, but the environment could not be brought into the same state


@dataclass(frozen=True, slots=True)
class BudgetDecision:
    """Entropy pre-monitoring: how many of the k paths start fresh."""

    root_entropy: float
    tool_entropy: float | None  # None: the probe called no tool
    fresh_paths: int


@dataclass(frozen=True, slots=True)
class RolloutTree:
    """All k distinct trajectories of one question; shared prefixes are shared nodes."""

    question: Question
    nodes: tuple[Node, ...]  # node i has id i; parents come before children
    paths: tuple[Path, ...]  # path i has id i
    decisions: tuple[BranchDecision, ...]
    budget: BudgetDecision | None  # None: the number of fresh paths was fixed by the configuration


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One path, flattened. The tuples below have one entry per token of prompt + model + tool nodes."""

    token_ids: TokenIds
    generated: tuple[bool, ...]  # True: the model wrote this token and is trained on it
    logprobs: tuple[float, ...]  # 0.0 where not generated
    entropies: tuple[float, ...]  # 0.0 where not generated
    steps: tuple[int, ...]  # index of the model segment, counted along the path; -1 where not generated
    anchors: tuple[TokenIds, ...]  # per step: the tokens the model had just read (GiGPO's anchor state)


@dataclass(frozen=True, slots=True)
class Response:
    """What a reward sees of one path: what the model wrote, its calls, and their results, as the model saw them."""

    text: str  # everything after the prompt, tool results included
    turns: tuple[Turn, ...]  # one per model segment
    results: tuple[tuple[ToolResult, ...], ...]  # of turn i; the last turn of a path has none
    finish_reason: FinishReason
    token_ids: TokenIds  # everything after the prompt
    environment_reward: float | None = None

    @property
    def answer(self) -> str | None:
        """As the model wrote it; None: it gave none."""
        return self.turns[-1].answer if self.turns and self.finish_reason == "answered" else None

    @property
    def well_formed(self) -> bool:
        """Every turn is what the format allows, and the last one answers."""
        return self.finish_reason == "answered" and all(turn.well_formed for turn in self.turns)

    @property
    def calls(self) -> Iterator[tuple[ToolCall, ToolResult]]:
        """The calls that were run, each with its result."""
        for turn, results in zip(self.turns, self.results, strict=False):
            yield from zip(turn.calls, results, strict=True)


@dataclass(frozen=True, slots=True)
class Reward:
    """Score of one path. `total` is what is optimised, the rest is for people."""

    total: float
    components: Mapping[str, float]
    success: bool


@dataclass(frozen=True, slots=True)
class ScoredTree:
    """A tree with the reward of every path."""

    tree: RolloutTree
    rewards: tuple[Reward, ...]
