"""What flows between the stages of a training step: one frozen dataclass per edge.

    Question -> sampler -> RolloutTree -> Reward -> advantages -> PackedBatch -> loss

A value is made in one stage and never edited later. All entropies and log-probabilities are in nats, under the
sampling distribution (softmax of logits / temperature over the full vocabulary). This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TokenIds = tuple[int, ...]
Source = Literal["prompt", "model", "tool"]


@dataclass(frozen=True, slots=True)
class Question:
    """One task instance."""

    id: str
    text: str
    answer: str
    kind: str  # question family; success is also reported per family
    entities: tuple[str, ...]  # every entity on the way to the answer: splits share no answer path


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A request that the model wrote: `<tool>argument</tool>`."""

    tool: str
    argument: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What goes back to the model. A failed call has a short error text for the model and its kind in `error`."""

    text: str
    error: Literal["unknown_tool", "raised", "timeout", "empty"] | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens of one origin; the edge from the parent is "comes right after".

    Prompt: the root, id 0. Model: one generated segment, ending at a stop string, end-of-text or a length limit.
    Tool: one tool result, as the tokens that the model reads.
    """

    id: int
    parent: int | None
    source: Source
    token_ids: TokenIds
    logprobs: tuple[float, ...] = ()  # per token, model nodes only
    entropies: tuple[float, ...] = ()  # per token, model nodes only: entropy of the distribution it was drawn from
    version: int = 0  # weights that sampled the tokens, model nodes only
    finish_reason: Literal["stop", "eos", "length"] | None = None  # model nodes only
    call: ToolCall | None = None  # tool nodes only
    result: ToolResult | None = None  # tool nodes only


@dataclass(frozen=True, slots=True)
class Path:
    """One of the k trajectories of a question: the nodes from the root to `leaf`."""

    id: int
    leaf: int
    parent: int | None  # the path this one branched from; None: sampled fresh from the question
    branch_node: int | None  # the tool node it branched at; None: sampled fresh
    finish_reason: Literal["answered", "eos", "length", "tool_limit"]


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
class Reward:
    """Score of one path. `total` is what is optimised, the rest is for people."""

    total: float
    components: dict[str, float]
    success: bool
