"""What a task is: questions, the tools they need, and a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from aepo.tools.protocol import Tool
from aepo.types import Question, Reward


class Task(Protocol):
    name: str
    train: Sequence[Question]
    heldout: Sequence[Question]  # shares no answer path with `train`
    tools: Sequence[Tool]

    def reward(self, question: Question, response: str, finish_reason: str) -> Reward:
        """Score the text of one path after the prompt (model and tool text as the model saw it)."""
        ...
