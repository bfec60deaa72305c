"""What a run remembers of its agent (run.json), and how another one differs from it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from aepo.agents.agent import Agent
from aepo.agents.protocol import RewardFunction, blamed, shown
from aepo.agents.tools.functions import FunctionTool
from aepo.agents.tools.toolbox import ToolBox
from aepo.registry import plain, resolve

MEANT_BY = {
    "task": tuple(f"task.{name}" for name in ("name", "options", "seed", "train", "heldout", "columns", "system")),
    "tools": ("task.tools", "task.environment", "task.name", "task.options"),
    "environment": ("task.environment", "task.name", "task.options"),
    "rewards": ("task.rewards", "task.environment", "task.name", "task.options"),
    "format": ("format.", "task.tools", "task.environment", "task.name", "task.options"),
    "long_prompts_dropped": ("task.", "format.", "vllm.", "rollout.engine", "model.name"),
}
"""By a part of `agent_facts`, the settings (or how they begin) that say in a command that it may differ."""
NOT_IN_2 = ("task.data.train_data", "task.data.heldout_data")
"""What run.json of version 2 did not have."""
TOLD = ("format.notes", "format.warnings")
"""For people: the hash of the template says whether it is another one."""


def agent_facts(agent: Agent) -> dict[str, Any]:
    """What a run remembers of its agent (run.json), and what a later one of the same run must agree with."""
    environment = agent.environment
    with blamed(f"task {agent.task.name}: identity", type(agent.task)):
        identity = agent.task.identity
    return {
        "task": {
            "name": agent.task.name,
            "train_questions": len(agent.task.train),
            "heldout_questions": len(agent.task.heldout),
            "system": agent.task.system,
            "data": _json(identity, f"task {agent.task.name}: identity"),
        },
        "format": _json(agent.format.identity, "format: identity"),
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
    """What the model reads of it, and what it says itself (methods of environments nothing)."""
    name, tool = schema["name"], toolbox.tools.get(schema["name"])
    with blamed(f"tool {name}: identity", type(tool)):
        identity = getattr(tool, "identity", {})
    read = {key: value for key, value in schema.items() if key != "name"}
    return {**_json(identity, f"tool {name}: identity"), "schema": _json(read, f"tool {name}: its schema")}


def _json(given: Any, whose: str) -> dict[str, Any]:
    """As run.json will have it: with lists for tuples. ValueError: it has no such form."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{whose} = {shown(given)}: expected JSON values by name: {error}") from None
    return found


def not_as_recorded(
    where: str, recorded: Mapping[str, Any] | None, facts: Mapping[str, Any], *, named: Collection[str]
) -> list[str]:
    """`changes` since a run, none without one. named: the settings that the command gives, with whatever value.

    ValueError, which begins with `where`: some are not meant, no setting says so (`MEANT_BY`).
    """
    found: list[str] = []
    for part, now in facts.items() if recorded is not None else ():
        differences = changes(recorded or {}, {part: now})
        if differences and not any(name.startswith(MEANT_BY[part]) for name in named):
            settings = ", ".join(f"{name}*" if name.endswith(".") else name for name in MEANT_BY[part])
            raise ValueError(
                f"{where}: the run was begun with another agent: {'; '.join(differences)}. Expected the same one, or "
                f"in this command a setting that says that it is meant, as it was or another: {settings}"
            )
        found += differences
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
    if not isinstance(recorded, Mapping):
        return []
    found = _changes(recorded, present, "tools")
    for name, now in present.items():
        was = recorded[name]
        if was == now and json.dumps(was) != json.dumps(now):
            found.append(f"tools.{name}.schema: its keys, which the model reads, are in another order")
    return found


def _changes(was: Any, now: Any, name: str) -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        unknown = {*TOLD, *(one for one in NOT_IN_2 if one.rpartition(".")[2] not in was)}
        keys = [key for key in dict.fromkeys([*was, *now]) if f"{name}.{key}" not in unknown]
        return [change for key in keys for change in _changes(was.get(key), now.get(key), f"{name}.{key}")]
    return [] if was == now else [f"{name} was {_shown(was)} and is {_shown(now)}"]


def _shown(value: Any) -> str:
    """Of a hash the beginning."""
    is_hash = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return f"{value[:12]}.." if is_hash else shown(value)
