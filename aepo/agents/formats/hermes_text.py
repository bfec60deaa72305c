"""Tools in the Hermes convention, written as text: for chat templates that know of no tools.

The system message describes the tools, calls are part of what the model says, and results come in a user's message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aepo.agents.formats.text import content_text
from aepo.types import Message

EXPLAINED = """You may call one or more functions to answer the user.

The functions that you have, as JSON within <tools></tools>:
<tools>
{tools}
</tools>

Write each call as a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <arguments as an object>}}
</tool_call>
The results follow within <tool_response></tool_response>."""


def as_text(messages: Sequence[Message], schemas: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The dialogue without the role "tool" and without `tool_calls`: all of it is content."""
    has_system = bool(messages) and messages[0].get("role") == "system"
    system = [content_text(messages[0])] if has_system else []
    if schemas:
        shown = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
        system.append(EXPLAINED.format(tools=shown))
    dialogue: list[Message] = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    said = list(messages[has_system:])
    while said:
        message = said.pop(0)
        if message.get("role") == "tool":
            results = [message]
            while said and said[0].get("role") == "tool":
                results.append(said.pop(0))
            dialogue.append({"role": "user", "content": "\n".join(map(_response, results))})
        elif message.get("tool_calls"):
            parts = [content_text(message), *map(_call, message["tool_calls"])]
            dialogue.append({"role": "assistant", "content": "\n".join(part for part in parts if part)})
        else:
            dialogue.append(message)
    return dialogue


def _response(message: Message) -> str:
    return f"<tool_response>\n{content_text(message)}\n</tool_response>"


def _call(call: Mapping[str, Any]) -> str:
    function = {name: call["function"][name] for name in ("name", "arguments")}
    return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"
