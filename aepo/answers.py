"""Answers to questions, as evaluations count them and as files keep them.

A file of answers has one JSON line per question, {"step", "question": {"id", "text", "answer", "kind"}, "samples"},
where each of the samples has the fields of `Answer`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aepo.agents.protocol import ChatFormat
from aepo.rollout.tree import path_nodes
from aepo.run.files import whole_file
from aepo.scoring import read_responses
from aepo.types import FinishReason, Question, ScoredTree


@dataclass(frozen=True, slots=True)
class Answer:
    """One path of a question."""

    text: str  # what was written and read after the prompt
    answer: str | None  # as the model wrote it; None: none was found
    reward: float
    success: bool
    finish_reason: FinishReason
    tool_calls: int
    tool_failures: int
    tokens: int  # that the model wrote
    components: Mapping[str, float]  # of the reward


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    question: Question
    samples: tuple[Answer, ...]


def read_answers(scored: ScoredTree, chat_format: ChatFormat) -> AnsweredQuestion:
    """Every path as an answer; what paths share counts for each of them."""
    tree, samples = scored.tree, []
    for path, reward, response in zip(tree.paths, scored.rewards, read_responses(chat_format, tree), strict=True):
        nodes = path_nodes(tree, path.id)
        results = [result for node in nodes for result in node.results]
        samples.append(
            Answer(
                text=response.text,
                answer=response.answer,
                reward=reward.total,
                success=reward.success,
                finish_reason=path.finish_reason,
                tool_calls=len(results),
                tool_failures=sum(result.error is not None for result in results),
                tokens=sum(len(node.token_ids) for node in nodes if node.source == "model"),
                components=dict(reward.components),
            )
        )
    return AnsweredQuestion(tree.question, tuple(samples))


def write_answers(path: Path, step: int | None, answered: Iterable[AnsweredQuestion]) -> None:
    """The whole file or nothing. step: of the weights; None: not those of a run."""
    with whole_file(path) as file:
        for item in answered:
            asked = {name: getattr(item.question, name) for name in ("id", "text", "answer", "kind")}
            samples = [dataclasses.asdict(sample) for sample in item.samples]
            line = {"step": step, "question": asked, "samples": samples}
            text = json.dumps(line, default=str)  # str: dates and the like among the answers of the data
            file.write(f"{text}\n".encode())
