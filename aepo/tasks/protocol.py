"""What a task is: questions, the tools they need, and a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from aepo.tools.protocol import Tool
from aepo.types import Question, Reward


class Task(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def train(self) -> Sequence[Question]: ...

    @property
    def heldout(self) -> Sequence[Question]:
        """Shares no answer path with `train`."""
        ...

    @property
    def tools(self) -> Sequence[Tool]: ...

    def reward(self, question: Question, response: str, finish_reason: str) -> Reward:
        """Score the text of one path after the prompt (model and tool text as the model saw it)."""
        ...
