"""Everything of the user's that a run needs, in one value: task, format, tools, environment, rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aepo.agents.protocol import ChatFormat, RewardFunction, Session, Task, dialogue
from aepo.types import Message, Question, TokenIds

if TYPE_CHECKING:
    from aepo.agents.tools.environment import EnvironmentTools
    from aepo.agents.tools.toolbox import ToolBox


@dataclass(frozen=True)
class Agent:
    """rewards: functions with their weights. chat: whether the model has a chat template."""

    task: Task
    format: ChatFormat
    toolbox: ToolBox
    environment: EnvironmentTools | None
    rewards: Mapping[RewardFunction, float]
    chat: bool

    @property
    def stateless(self) -> Session | None:
        """The session that all paths share; None: each has an environment of its own."""
        return self.toolbox.session if self.environment is None else None

    async def open(self, question: Question) -> Session:
        """A session for a path that starts from the question."""
        assert self.environment is not None
        return await self.environment.open(question)

    def prompt_tokens(self, question: Question, observation: str | None = None) -> TokenIds:
        """What the model reads first. observation: what the environment's reset returned."""
        messages = dialogue(self.task, question, chat=self.chat, observed=observation is not None)
        try:
            return self.format.prompt_tokens(messages if observation is None else _with(messages, observation))
        except ValueError as error:
            raise ValueError(f"question {question.id!r}: {error}") from error

    def close(self) -> None:
        """End what the tools hold. May be called twice."""
        self.toolbox.close()


def _with(messages: tuple[Message, ...], observation: str) -> tuple[Message, ...]:
    """What an environment says at the start stands at the end of the last message, as in TRL."""
    *before, last = messages
    content: Any = last.get("content") or ""
    if isinstance(content, str):
        content = f"{content}\n{observation}" if content else observation
    else:
        content = [*content, {"type": "text", "text": observation}]
    return (*before, {**last, "content": content})
