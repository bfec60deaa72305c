"""Finds tool calls in what the model wrote, runs a wave of them at once, and turns every failure into a short text."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from aepo.agents.protocol import Tool, ToolError
from aepo.types import ToolCall, ToolResult

ErrorKind = Literal["unknown_tool", "raised", "timeout", "empty"]

RESERVED_NAMES = ("answer", "result")
CUT_MARK = "... [cut]"


class ToolBox:
    """The tools of one task.

    max_chars: longer results are cut to this many characters, `CUT_MARK` included.
    max_concurrent: calls that run at the same time; the others wait, and their timeouts start when they do.
    max_hung: a call that is given up on keeps its thread until the tool returns. A tool with this many such
        threads is not called again before one of them returns: its calls fail at once, as timeouts. So one tool
        never holds more than max_hung + max_concurrent threads.

    The threads are daemons: a hung call does not keep the process from ending. A tool that blocks while it holds the
    interpreter lock (a foreign C library) cannot be given up on; such a tool belongs in a process of its own.
    """

    def __init__(
        self, tools: Sequence[Tool], *, max_chars: int = 2000, max_concurrent: int = 32, max_hung: int = 8
    ) -> None:
        for argument, value, least in (
            ("max_chars", max_chars, len(CUT_MARK) + 1),
            ("max_concurrent", max_concurrent, 1),
            ("max_hung", max_hung, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{argument} must be an integer >= {least}, got {value!r}")
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            self._add(tool)
        self._max_chars = max_chars
        self._max_concurrent = max_concurrent
        self._max_hung = max_hung
        self._hung: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._slots: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        self._closed = False
        names = "|".join(self._tools) or "(?!)"  # no tools: matches nothing
        self._call_pattern = re.compile(rf"<({names})>((?:(?!<\1>).)*?)</\1>", re.DOTALL)

    def _add(self, tool: Tool) -> None:
        if not callable(tool):
            raise TypeError(f"tools must be callables with a name and a timeout, got {tool!r}")
        if not isinstance(tool.name, str) or not re.fullmatch("[a-z][a-z0-9_]*", tool.name):
            raise ValueError(f"a tool's name must be a lower-case identifier, got {tool.name!r}")
        if tool.name in RESERVED_NAMES or tool.name in self._tools:
            raise ValueError(f"a tool's name must be unique and not one of {RESERVED_NAMES}, got {tool.name!r}")
        if not (0 < tool.timeout < math.inf):
            raise ValueError(f"the timeout of {tool.name!r} must be positive and finite, got {tool.timeout!r}")
        self._tools[tool.name] = tool

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The closing tags: generation stops where one is complete."""
        return tuple(f"</{name}>" for name in self._tools)

    def parse(self, text: str) -> ToolCall | None:
        """The last complete call `<name>argument</name>` in a generated segment; None if there is none."""
        matches = self._call_pattern.findall(text)
        return ToolCall(*matches[-1]) if matches else None

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """One result per call, in order. Never raises for what a tool does; RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("the ToolBox is closed")
        return list(await asyncio.gather(*(self._run_one(call) for call in calls)))

    def close(self) -> None:
        """Close the tools that have a `close` method. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for tool in self._tools.values():
            close = getattr(tool, "close", None)
            if close is not None:
                close()

    async def _run_one(self, call: ToolCall) -> ToolResult:
        tool = self._tools.get(call.tool)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return self._result(f"error: there is no tool {call.tool!r}; tools: {known}", "unknown_tool", 0.0)
        async with self._free_slot():
            if self._hung[call.tool] >= self._max_hung:
                return self._result("error: the tool does not respond", "timeout", 0.0)
            start = time.perf_counter()
            outcome = await self._in_thread(tool, call.argument)
            return self._to_result(outcome, time.perf_counter() - start)

    def _free_slot(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._slots is None or self._slots[0] is not loop:  # a semaphore belongs to one event loop
            self._slots = (loop, asyncio.Semaphore(self._max_concurrent))
        return self._slots[1]

    async def _in_thread(self, tool: Tool, argument: str) -> object:
        """What the tool returned, or the exception it raised, or a TimeoutError once its timeout is over."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[object] = loop.create_future()
        attempt = _Attempt()

        def deliver(value: object) -> None:
            if not outcome.done():
                outcome.set_result(value)

        def work() -> None:
            value: object
            try:
                value = tool(argument)
            except BaseException as error:
                value = error
            with self._lock:
                attempt.returned = True
                if attempt.given_up:
                    self._hung[tool.name] -= 1
            with contextlib.suppress(RuntimeError):  # the event loop is gone, and nobody waits any more
                loop.call_soon_threadsafe(deliver, value)

        try:
            threading.Thread(target=work, name=f"tool-{tool.name}", daemon=True).start()
        except RuntimeError as error:  # no more threads
            return error
        try:
            await asyncio.wait({outcome}, timeout=tool.timeout)
        finally:  # also when the run is cancelled
            with self._lock:
                if not attempt.returned:
                    attempt.given_up = True
                    self._hung[tool.name] += 1
        return outcome.result() if outcome.done() else TimeoutError(f"no answer after {tool.timeout:g} s")

    def _to_result(self, outcome: object, seconds: float) -> ToolResult:
        if isinstance(outcome, ToolError):
            return self._result(str(outcome) or "error", "raised", seconds)
        if isinstance(outcome, TimeoutError):
            return self._result(f"error: {outcome}", "timeout", seconds)
        if isinstance(outcome, BaseException):
            return self._result(f"error: {traceback.format_exception_only(outcome)[-1]}", "raised", seconds)
        if outcome is None or (isinstance(outcome, str) and not outcome.strip()):
            return self._result("error: the tool returned nothing", "empty", seconds)
        if not isinstance(outcome, str):
            return self._result(f"error: the tool returned {type(outcome).__name__}, not text", "raised", seconds)
        return self._result(outcome, None, seconds)

    def _result(self, text: str, error: ErrorKind | None, seconds: float) -> ToolResult:
        text = text.strip().encode("utf-8", "replace").decode()  # a lone surrogate would break tokenizers
        if len(text) > self._max_chars:
            text = text[: self._max_chars - len(CUT_MARK)] + CUT_MARK
        return ToolResult(text, error, seconds)


class _Attempt:
    """One call in its thread; guarded by the lock of the ToolBox."""

    returned = False
    given_up = False
