"""What reward functions written for TRL and for verl are given of a question and its responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aepo.types import Question, Response

OURS = frozenset({"question", "response"})
VERL = frozenset({"data_source", "solution_str", "ground_truth", "extra_info"})
TRL = frozenset({"prompts", "completions", "completion_ids"})  # one of these makes it a function for TRL
_NOT_HERE = {
    "trainer_state": "the trainer's state is not known to rewards here",
    "environments": "environments end with their paths; their get_reward() is the reward `environment`",
}


def trl_arguments(
    question: Question,
    responses: Sequence[Response],
    parameters: Mapping[str, bool],
    takes_all: bool,
    logged: dict[str, list[float]],
) -> dict[str, Any]:
    """By name; every column as a list with one entry per response. LookupError: none for a parameter that is required.

    parameters: whether each is required. takes_all: there is a **parameter, too. What the function logs (log_metric,
    log_extra) goes into `logged`.
    """
    count = len(responses)
    in_text = isinstance(question.prompt, str)
    prompt: Any = question.prompt if in_text else [dict(message) for message in question.messages]
    given: dict[str, Any] = {
        name: [_own_copy(value) for _ in range(count)] for name, value in columns(question).items()
    }
    given |= {
        "prompts": [_own_copy(prompt) for _ in range(count)],
        "completions": [response.text if in_text else as_messages(response) for response in responses],
        "completion_ids": [list(response.token_ids) for response in responses],
        "log_metric": _log_metric(logged, count),
        "log_extra": _log_extra(logged, count),
    }
    for name, required in parameters.items():
        if required and name not in given:
            why = f"cannot be given: {_NOT_HERE[name]}" if name in _NOT_HERE else "is no column"
            raise LookupError(f"its parameter {name!r} {why}; columns: {', '.join(columns(question))}")
    return given if takes_all else {name: given[name] for name in parameters if name in given}


def verl_arguments(
    question: Question, response: Response, parameters: Mapping[str, bool], takes_all: bool
) -> dict[str, Any]:
    question = own_copy(question)
    given = {
        "data_source": question.data.get("data_source", question.kind),
        "solution_str": response.text,
        "ground_truth": question.answer,
        "extra_info": question.data.get("extra_info"),
    }
    return given if takes_all else {name: given[name] for name in parameters if name in given}


def own_copy(question: Question) -> Question:
    """For one call: what a function changes in it, no later call sees."""
    prompt, answer, data = map(_own_copy, (question.prompt, question.answer, question.data))
    return replace(question, prompt=prompt, answer=answer, data=data)


def _own_copy(value: Any) -> Any:
    """With lists and dicts of its own; other objects, an image say, stay the same."""
    if type(value) in (list, tuple):
        return type(value)(map(_own_copy, value))
    return {name: _own_copy(each) for name, each in value.items()} if type(value) is dict else value


def columns(question: Question) -> dict[str, Any]:
    """The row as functions see it: its own columns, and answer, id and kind where it has none of that name."""
    return {"id": question.id, "kind": question.kind, "answer": question.answer, **question.data}


def as_messages(response: Response) -> list[dict[str, Any]]:
    """The response as a dialogue: what the assistant said and called, and what the tools returned."""
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(response.turns):
        message: dict[str, Any] = {"role": "assistant", "content": turn.content}
        if turn.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.tool, "arguments": dict(call.arguments)}}
                for call in turn.calls
            ]
        messages.append(message)
        results = response.results[index] if index < len(response.results) else ()
        messages += [
            {"role": "tool", "name": call.tool, "content": result.text}
            for call, result in zip(turn.calls, results, strict=False)
        ]
    return messages


def _log_metric(logged: dict[str, list[float]], count: int) -> Callable[[str, float], None]:
    def log_metric(name: str, value: float) -> None:
        logged[name] = [float(value)] * count

    return log_metric


def _log_extra(logged: dict[str, list[float]], count: int) -> Callable[[str, Sequence[Any]], None]:
    def log_extra(column: str, values: Sequence[Any]) -> None:
        """Numbers become components of the paths; there is no table of texts here."""
        if len(values) == count and all(isinstance(value, (int, float)) for value in values):
            logged[column] = [float(value) for value in values]

    return log_extra
