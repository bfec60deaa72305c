"""Runs the calls that a model wrote, a wave of them at once, and turns every failure into a short text."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

from aepo.agents.protocol import Closable, Session, Tool, ToolError
from aepo.agents.tools.arguments import ArgumentError, fitted
from aepo.agents.tools.loop import LoopThread
from aepo.agents.tools.text import MIN_CHARS, cut, described, text_of
from aepo.types import ErrorKind, Question, ToolCall, ToolResult

CLOSE_SECONDS = 10.0  # for a `close` that is a coroutine


class ToolBox:
    """The tools of one task.

    max_chars: longer results are cut to this many characters, `CUT_MARK` included.
    max_concurrent: calls that run at the same time; the others wait, and their timeouts start when they do.
    max_hung: a call that is given up on keeps its thread until the tool returns. A tool with this many such
        threads is not called again before one of them returns: its calls fail at once, as timeouts. So one tool
        never holds more than max_hung + max_concurrent threads.

    Every call has a thread. Coroutines run on one event loop for as long as the ToolBox lives, so that what a tool
    keeps (a connection, a lock) stays usable. The threads are daemons: a hung call does not keep the process from
    ending. A tool that blocks while it holds the interpreter lock (a foreign C library) cannot be given up on; such a
    tool belongs in a process of its own.
    """

    stateful = False  # calls change nothing that another path could see: all share one `session`

    def __init__(
        self, tools: Sequence[Tool], *, max_chars: int = 2000, max_concurrent: int = 32, max_hung: int = 8
    ) -> None:
        for argument, value, least in (
            ("max_chars", max_chars, MIN_CHARS),
            ("max_concurrent", max_concurrent, 1),
            ("max_hung", max_hung, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{argument} must be an integer >= {least}, got {value!r}")
        self.tools: dict[str, Tool] = {}  # by name
        for tool in tools:
            check_tool(tool)
            if tool.name in self.tools:
                raise ValueError(f"two tools are called {tool.name!r}: {self.tools[tool.name]!r} and {tool!r}")
            self.tools[tool.name] = tool
        self.session = StatelessSession(self)
        self._max_chars = max_chars
        self._max_concurrent = max_concurrent
        self._max_hung = max_hung
        self._hung: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._slots: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        self._loop = LoopThread("tools")
        self._closed = False

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What chat templates take as `tools`."""
        return [schema_of_tool(tool) for tool in self.tools.values()]

    async def open(self, question: Question) -> Session:
        """What the calls of a path on this question run in."""
        return self.session

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """One result per call, in order. Never raises for what a tool does; RuntimeError after `close`."""
        return list(await asyncio.gather(*(self._run_one(call) for call in calls)))

    async def call(self, tool: Tool, arguments: Mapping[str, Any]) -> ToolResult:
        """The same for a tool that need not be among `tools`, for example one that is bound to an environment."""
        if self._closed:
            raise RuntimeError("the ToolBox is closed")
        try:
            arguments = fitted(arguments, tool.parameters)
        except ArgumentError as error:
            return self._result(f"error: {tool.name}: {error}", "bad_arguments")
        async with self._free_slot():
            if self._hung[tool.name] >= self._max_hung:
                return self._result("error: the tool does not respond", "timeout")
            start = time.perf_counter()
            text, error_kind = await self._in_thread(tool, arguments)
            return ToolResult(text, error_kind, time.perf_counter() - start)

    def refusal(self, call: ToolCall, names: Sequence[str]) -> ToolResult | None:
        """The result of a call that cannot be run: it was not read, or none of the tools has this name."""
        if call.problem is not None:
            return self._result(f"error: {call.problem}", "unparsed")
        if call.tool in names:
            return None
        return self._result(
            f"error: there is no tool {call.tool!r}; tools: {', '.join(names) or 'none'}", "unknown_tool"
        )

    def close(self) -> None:
        """Close the tools that have a `close` method. May be called twice."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as stack:  # all of them, also if one raises
            stack.callback(self._loop.close)
            for tool in self.tools.values():
                if isinstance(tool, Closable):
                    stack.callback(self._close_tool, tool)

    def _close_tool(self, tool: Closable) -> None:
        closing = cast(object, tool.close())  # a coroutine, where the tool lives on the loop
        if inspect.isawaitable(closing):
            self._loop.start(closing).result(CLOSE_SECONDS)

    async def _run_one(self, call: ToolCall) -> ToolResult:
        return self.refusal(call, list(self.tools)) or await self.call(self.tools[call.tool], call.arguments)

    def _free_slot(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._slots is None or self._slots[0] is not loop:  # a semaphore belongs to one event loop
            self._slots = (loop, asyncio.Semaphore(self._max_concurrent))
        return self._slots[1]

    async def _in_thread(self, tool: Tool, arguments: Mapping[str, Any]) -> tuple[str, ErrorKind | None]:
        """Text and error of the call, or those of a timeout once that is over."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[tuple[str, ErrorKind | None]] = loop.create_future()
        attempt = _Attempt()

        def deliver(value: tuple[str, ErrorKind | None]) -> None:
            if not outcome.done():
                outcome.set_result(value)

        def work() -> None:
            value = self._outcome(tool, arguments, attempt)
            with self._lock:
                attempt.returned = True
                if attempt.given_up:
                    self._hung[tool.name] -= 1
            with contextlib.suppress(RuntimeError):  # the event loop is gone, and nobody waits any more
                loop.call_soon_threadsafe(deliver, value)

        try:
            threading.Thread(target=work, name=f"tool-{tool.name}", daemon=True).start()
        except RuntimeError as error:  # no more threads
            return self._read(error)
        try:
            await asyncio.wait({outcome}, timeout=tool.timeout)
        finally:  # also when the run is cancelled
            with self._lock:
                if not attempt.returned:
                    attempt.given_up = True
                    self._hung[tool.name] += 1
                    attempt.cancel()
        return outcome.result() if outcome.done() else self._read(TimeoutError(f"no answer after {tool.timeout:g} s"))

    def _outcome(self, tool: Tool, arguments: Mapping[str, Any], attempt: _Attempt) -> tuple[str, ErrorKind | None]:
        """In the thread: the call, a coroutine's end on the loop, and the text, cut before it goes anywhere."""
        value: object
        try:
            value = tool(**arguments)
            if inspect.isawaitable(value):
                value = self._await(value, attempt)
        except BaseException as error:
            value = error
        return self._read(value)

    def _await(self, awaitable: Awaitable[object], attempt: _Attempt) -> object:
        with self._lock:
            running = self._loop.start(awaitable)
            attempt.cancel = running.cancel
            if attempt.given_up:
                running.cancel()
        return running.result()

    def _read(self, outcome: object) -> tuple[str, ErrorKind | None]:
        if isinstance(outcome, ToolError):
            return self._cut(described(outcome) or "error"), "raised"
        if isinstance(outcome, TimeoutError | asyncio.TimeoutError):
            return self._cut(f"error: {cut(described(outcome), self._max_chars) or 'no answer in time'}"), "timeout"
        if isinstance(outcome, BaseException):
            name, says = type(outcome).__name__, cut(described(outcome), self._max_chars)
            return self._cut(f"error: {name}: {says}" if says else f"error: {name}"), "raised"
        try:
            text = self._cut(text_of(outcome, self._max_chars))
        except Exception as error:  # whatever the value's own methods do
            return self._cut(f"error: {cut(described(error), self._max_chars)}"), "raised"
        return (text, None) if text else ("error: the tool returned nothing", "empty")

    def _cut(self, text: str) -> str:
        return cut(text, self._max_chars)

    def _result(self, text: str, error: ErrorKind) -> ToolResult:
        return ToolResult(self._cut(text), error, 0.0)


class StatelessSession:
    """A `Session` for calls that change nothing: a branch continues in the same one."""

    observation: str | None = None

    def __init__(self, toolbox: ToolBox) -> None:
        self._toolbox = toolbox

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return await self._toolbox.run(calls)

    async def branch(self, turns: int) -> Session:
        return self

    def forget(self, turns: int) -> None:
        """Nothing is kept."""

    async def reward(self) -> None:
        """Nobody is asked."""

    async def close(self) -> None:
        """It belongs to all paths; the ToolBox is closed by who made it."""


class _Attempt:
    """One call in its thread; guarded by the lock of the ToolBox."""

    returned = False
    given_up = False

    def __init__(self) -> None:
        self.cancel: Callable[[], None] = lambda: None  # the coroutine, where there is one


def schema_of_tool(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates and OpenAI's interface have it."""
    described = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": described}


def check_tool(tool: Tool) -> None:
    """ValueError names what of the protocol `Tool` is missing or wrong."""
    for attribute in ("name", "timeout", "description", "parameters", "__call__"):
        if not hasattr(tool, attribute):
            needs = "name, timeout, description, parameters and __call__"
            raise ValueError(f"a tool needs {needs}; {tool!r} has no {attribute}")
    if not isinstance(tool.name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", tool.name):
        raise ValueError(f"a tool's name must consist of 1 to 128 of A-Z a-z 0-9 _ . -, got {tool.name!r}")
    if not isinstance(tool.timeout, int | float) or not 0 < tool.timeout < math.inf:
        raise ValueError(f"the timeout of tool {tool.name!r} must be positive and finite, got {tool.timeout!r}")
    if not isinstance(tool.description, str):
        raise ValueError(f"the description of tool {tool.name!r} must be a text, got {tool.description!r}")
    schema = tool.parameters
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        raise ValueError(f'the parameters of tool {tool.name!r} must be {{"type": "object", ..}}, got {schema!r}')
    if not isinstance(schema.get("properties") or {}, Mapping):
        raise ValueError(f"the properties of tool {tool.name!r} must be schemas by name, got {schema!r}")
