"""Everything of the user's that a run needs, in one value: task, format, tools, environment, rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aepo.agents.protocol import ChatFormat, RewardFunction, Session, Task, blamed, shown
from aepo.agents.tools.functions import FunctionTool
from aepo.registry import plain, resolve
from aepo.types import Message, Question, TokenIds

if TYPE_CHECKING:
    from aepo.agents.tools.environment import EnvironmentTools
    from aepo.agents.tools.toolbox import ToolBox

NOT_IN_2 = ("task.data.train_data", "task.data.heldout_data")
"""What run.json of version 2 did not have."""


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
        with blamed(f"task {self.task.name}: messages of question {question.id!r}", self.task.messages):
            messages = self.task.messages(question, chat=self.chat)
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


def agent_facts(agent: Agent) -> dict[str, Any]:
    """What a run remembers of its agent (run.json), and what a later one of the same run must agree with."""
    environment = agent.environment
    return {
        "task": {
            "name": agent.task.name,
            "train_questions": len(agent.task.train),
            "heldout_questions": len(agent.task.heldout),
            "system": agent.task.system,
            "data": _identity(agent.task.identity, f"task {agent.task.name}"),
        },
        "format": dict(agent.format.identity),
        "tools": {
            schema["function"]["name"]: _tool_facts(schema["function"], agent.toolbox)
            for schema in (environment or agent.toolbox).schemas
        },
        "environment": None if environment is None else environment.name,
        "rewards": {_full_name(function): weight for function, weight in agent.rewards.items()},
    }


def agent_parts(agent: Agent) -> dict[str, list[Any]]:
    """What the agent is made of, for `aepo.own_code.code_of`."""
    named = [agent.format.identity.get(key) for key in ("name", "calls")]
    own = [resolve(name, "format") for name in named if isinstance(name, str) and ":" in name]
    parts = {f"task {agent.task.name}": [agent.task], f"format {named[0]}": [agent.format, *own]}
    for name, tool in agent.toolbox.tools.items():
        thing = tool.function if isinstance(tool, FunctionTool) else tool
        parts[f"tool {name}"] = [thing, *getattr(tool, "files", ())]
    if agent.environment is not None:
        parts[f"environment {agent.environment.name}"] = [agent.environment.instances.environment]
    return parts | {f"reward {_full_name(function)}": [function] for function in agent.rewards}


def _full_name(function: RewardFunction) -> str:
    """As settings name it: functions of one name in two modules are two."""
    found = plain(function)
    return f"{found.__module__}:{found.__qualname__}"


def _tool_facts(schema: Mapping[str, Any], toolbox: ToolBox) -> dict[str, Any]:
    """A hash of what the model reads of it, in its order, and what it says itself (methods of environments nothing)."""
    name = schema["name"]
    identity = _identity(getattr(toolbox.tools.get(name), "identity", {}), f"tool {name}")
    return {**identity, "schema": hashlib.sha256(json.dumps(schema, default=str).encode()).hexdigest()}


def _identity(given: Any, whose: str) -> dict[str, Any]:
    """As run.json will have it: with lists for tuples. ValueError: it has no such form."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(given)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{whose}: identity = {shown(given)}: expected JSON values by name: {error}") from None
    return found


def changes(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What of `present` (`agent_facts`) is not as it was recorded in run.json, each with what was and what is."""
    found = []
    for key, now in present.items():  # run.json knows more than the agent
        was = recorded.get(key)
        found += _tool_changes(was or (), now) if key == "tools" else _changes(was, now, key)
    return found


def _tool_changes(recorded: Collection[str], present: Mapping[str, Any]) -> list[str]:
    """Of the names, whose order a model reads, too; else of what both have. recorded: names alone in version 2."""
    if list(recorded) != list(present):
        return [f"tools was {list(recorded)} and is {list(present)}"]
    return _changes(recorded, present, "tools") if isinstance(recorded, Mapping) else []


def _changes(was: Any, now: Any, name: str) -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = [key for key in dict.fromkeys([*was, *now]) if key in was or f"{name}.{key}" not in NOT_IN_2]
        return [change for key in keys for change in _changes(was.get(key), now.get(key), f"{name}.{key}")]
    return [] if was == now else [f"{name} was {_shown(was)} and is {_shown(now)}"]


def _shown(value: Any) -> str:
    """Of a hash the beginning."""
    is_hash = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{value[:12]}.." if is_hash else repr(value)
