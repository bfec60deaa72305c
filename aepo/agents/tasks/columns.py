"""Which columns of a row are the prompt, the answer, the id and the kind of a question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from aepo.agents.tasks.rows import BadRow
from aepo.types import Message

Role = Literal["prompt", "answer", "id", "kind"]
GUESSES: dict[Role, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "problem", "input", "instruction", "query", "messages"),
    "answer": ("answer", "solution", "ground_truth", "target", "label", "output", "reward_model.ground_truth"),
    "id": ("id",),
    "kind": ("kind", "data_source", "category", "type", "subject", "level"),
}
"""The first that is there is taken."""
MISSING = object()


def choose_columns(given: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> dict[Role, str | None]:
    """The column of each role, as given (a dot leads into a struct, "" means none) or guessed.

    ValueError: a column was given that no row has, or none is there for the prompt.
    """
    if unknown := next((role for role in given if role not in GUESSES), None):
        raise ValueError(f"task.columns.{unknown}: expected one of {', '.join(GUESSES)}")
    there = _names(rows)
    chosen: dict[Role, str | None] = {}
    for role, guesses in GUESSES.items():
        if role not in given:
            chosen[role] = next((name for name in guesses if name in there), None)
        elif given[role] in there or (given[role] == "" and role != "prompt"):
            chosen[role] = given[role] or None
        else:
            raise ValueError(
                f"task.columns.{role} = {given[role]!r}: expected one of the columns {', '.join(there) or '(none)'}"
            )
    if chosen["prompt"] is None:
        raise ValueError(
            f"task.columns.prompt: expected one of the columns {', '.join(GUESSES['prompt'])}, or the name of "
            f"another; the data has {', '.join(there) or 'none'}"
        )
    return chosen


def _names(rows: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """All columns, those inside structs with dots, in the order in which they come."""
    names: dict[str, None] = {}
    shapes: set[tuple[str, ...]] = set()
    for row in rows:
        structs = [name for name, value in row.items() if isinstance(value, dict)]
        shape = (*row, "", *structs, *(inner for name in structs for inner in row[name]))
        if shape not in shapes:
            shapes.add(shape)
            _add_names(row, "", names)
    return names


def _add_names(struct: Mapping[str, Any], prefix: str, names: dict[str, None]) -> None:
    for name, value in struct.items():
        names[f"{prefix}{name}"] = None
        if isinstance(value, dict):
            _add_names(value, f"{prefix}{name}.", names)


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; MISSING: the row has none. A column whose own name has a dot comes first."""
    if column in row:
        return row[column]
    name, dot, rest = column.partition(".")
    inner = row.get(name)
    return look_up(inner, rest) if dot and isinstance(inner, dict) else MISSING


def read_prompt(value: Any, column: str) -> str | tuple[Message, ...] | BadRow:
    """A text or a dialogue, or what is wrong with it."""
    expected = f"expected text or messages in the column {column!r}"
    if value is MISSING or value is None:
        return BadRow(f"no prompt: {expected}, got {'no such column' if value is MISSING else 'null'}")
    if isinstance(value, str):
        return value if value.strip() else BadRow(f"empty prompt: {expected}, got {value!r}")
    if not isinstance(value, list):
        return BadRow(f"no prompt: {expected}, got {type(value).__name__} {str(value)[:40]!r}")
    messages = []
    for index, message in enumerate(value, start=1):
        read = _message(message)
        if isinstance(read, BadRow):
            return BadRow(f"message {index} of {column!r}: {read.problem}")
        messages.append(read)
    if not messages:
        return BadRow(f"empty prompt: {expected}, got an empty list")
    if messages[-1]["role"] == "assistant":
        return BadRow(f"{column!r} ends with a message of the assistant: expected one that the model is to answer")
    return tuple(messages)


def _message(message: Any) -> Message | BadRow:
    if not isinstance(message, dict):
        return BadRow(f"expected a role and content, got {type(message).__name__}")
    said = {name: value for name, value in message.items() if value is not None}  # Arrow fills all rows' fields
    role, content = said.get("role"), said.get("content")
    if not isinstance(role, str) or not role:
        return BadRow(f"expected a role, got {'none' if role is None else repr(role)}")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for part in parts if isinstance(text := part.get("text"), str)]
        if len(texts) < len(content):
            return BadRow("expected content of text; images and sounds cannot be read")
        content = said["content"] = "\n".join(texts)
    if content is None and said.get("tool_calls"):
        content = said["content"] = ""
    if not isinstance(content, str):
        return BadRow(f"expected content of text, got {'none' if content is None else type(content).__name__}")
    return said


def read_answer(row: Mapping[str, Any], column: str | None) -> Any | BadRow:
    """None where there is none."""
    value = MISSING if column is None else look_up(row, column)
    if isinstance(value, float) and not math.isfinite(value):
        return BadRow(f"expected an answer in the column {column!r}, got {value}")
    return None if value is MISSING else value
