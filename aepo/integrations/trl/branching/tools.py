"""Calls of tools, run as TRL runs them, so that training and its evaluations read the same results."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Tools:
    """By name; each name in one of the two."""

    sync: Mapping[str, Callable[..., Any]]
    asynchronous: Mapping[str, Callable[..., Coroutine[Any, Any, Any]]]

    def find(self, name: Any) -> Callable[..., Any] | None:
        return self.sync.get(name) or self.asynchronous.get(name)


@dataclass(frozen=True, slots=True)
class Result:
    """What one call gave. content: a text, or a list of content blocks as the tool returned it."""

    call: Mapping[str, Any]
    name: str
    content: Any
    failed: bool

    @property
    def message(self) -> dict[str, Any]:
        return {"role": "tool", "name": self.name, "content": self.content}


def run_calls(
    asked: Sequence[tuple[Sequence[Mapping[str, Any]], Tools]], loop: asyncio.AbstractEventLoop | None
) -> list[list[Result]]:
    """Of each path its results: those of plain functions in the order of the calls, then those of coroutines.

    Coroutines of all paths wait together on `loop`. Whatever a call does wrong is a result that says {"error": ...}.
    """
    results: list[list[Result]] = [[] for _ in asked]
    waiting: list[tuple[int, Mapping[str, Any], str, Coroutine[Any, Any, Any]]] = []
    for index, (calls, tools) in enumerate(asked):
        for call in calls:
            name, value, failed = _call(call, tools)
            if not failed and name in tools.asynchronous and name not in tools.sync:
                waiting.append((index, call, name, value))
            else:
                results[index].append(_result(call, name, value, failed))
    if waiting:
        assert loop is not None, "TRL starts a loop where a tool is asynchronous"
        together = _gather([coroutine for *_, coroutine in waiting])
        for (index, call, name, _), value in zip(
            waiting, asyncio.run_coroutine_threadsafe(together, loop).result(), strict=True
        ):
            failed = isinstance(value, BaseException)
            results[index].append(_result(call, name, _error(value) if failed else value, failed))
    return results


def _call(call: Mapping[str, Any], tools: Tools) -> tuple[str, Any, bool]:
    """Name, what the function returned (a coroutine of an asynchronous one) or the error, whether it failed.

    The arguments stand in the completion too, so the function gets a copy.
    """
    if call["type"] != "function":
        return call.get("name", "unknown"), {"error": f"Unsupported tool call type: {call['type']}"}, True
    name = call["function"]["name"]
    tool = tools.find(name)
    try:
        if tool is None:
            raise ValueError(f"Tool {name} not found.")
        return name, tool(**copy.deepcopy(call["function"]["arguments"])), False
    except (Exception, SystemExit) as error:  # a tool that calls exit() must not end the run
        return name, _error(error), True


def _error(error: BaseException) -> dict[str, str]:
    return {"error": str(error)}


def _result(call: Mapping[str, Any], name: str, value: Any, failed: bool) -> Result:
    content = value if isinstance(value, list) else str(value)
    if isinstance(value, list) and any(isinstance(part, dict) and part.get("type") == "image" for part in value):
        raise ValueError(
            f"tool {name} returned an image: branched rollouts take texts only; branched_rollouts=False samples such "
            "tools as TRL does"
        )
    return Result(call, name, content, failed)


async def _gather(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    return await asyncio.gather(*map(_value_or_exit, coroutines), return_exceptions=True)


async def _value_or_exit(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    except SystemExit as error:  # else it would end the thread of the loop, and the run would wait for ever
        return error
