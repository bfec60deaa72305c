"""The tools of an MCP server: a process of ours that speaks over its input and output, or one in the network.

Needs the extra [mcp]. The session with a server stays open from its first listing of tools until the tools are closed.
A server that ends, or that hangs for as long as a call may take, is started again by the next call.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aepo.agents.protocol import Tool, ToolError
from aepo.agents.tools.loop import LoopThread
from aepo.install import pip_install

START_SECONDS = 60.0  # until a server has listed its tools
CLOSE_SECONDS = 10.0
GRACE_SECONDS = 5.0  # of a tool's timeout, for the ToolBox to be the last to give up
MAX_PROBLEM_CHARS = 200
MAX_PAGES = 100  # of a server's list of tools


class McpTool:
    """One tool of a server."""

    def __init__(self, server: McpServer, listed: Any) -> None:
        self._server = server
        self.name: str = listed.name
        self.description: str = listed.description or listed.title or ""
        self.parameters: Mapping[str, Any] = {"type": "object", **listed.input_schema}
        self.timeout = server.timeout + GRACE_SECONDS

    @property
    def files(self) -> Sequence[Path]:
        """Those that the server's command names: its code."""
        return self._server.files

    def __call__(self, **arguments: Any) -> str:
        return self._server.call(self.name, arguments)

    def __repr__(self) -> str:
        return f"{self.name} of {self._server.spec}"

    def close(self) -> None:
        """Ends the server, and with it all of its tools."""
        self._server.close()


def mcp_tools(
    spec: str, timeout: float, *, setting: str = "task.tools", start_seconds: float = START_SECONDS
) -> list[Tool]:
    """The tools of "mcp:COMMAND ARGUMENTS", "mcp+http://HOST:PORT/PATH" or "mcp+https://..".

    A command gets this process's environment and working directory. ValueError in one line where the server cannot be
    started, does not speak MCP, does not answer within `start_seconds`, or has no tool or two of one name.
    """
    try:
        import mcp  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{setting} = {spec!r} needs the package mcp: {pip_install('mcp')}") from None
    for logger in (
        "mcp",
        "client",
    ):  # of the client's failures, which are results of calls here, no traceback on stderr
        logging.getLogger(logger).addHandler(logging.NullHandler())
    server = McpServer(spec, timeout)
    try:
        listed = server.start(start_seconds)
        names = [tool.name for tool in listed]
        twice = next((name for name in names if names.count(name) > 1), None)
        if not names or twice is not None:
            raise ServerError(f"the MCP server has {'no tool' if twice is None else f'two tools called {twice!r}'}")
    except ServerError as error:
        server.close()
        raise ValueError(f"{setting} = {spec!r}: {error}") from None
    return [McpTool(server, tool) for tool in listed]


class ServerError(Exception):
    """The server is not there, or not any more: why, in one line."""


class McpServer:
    """The session with one server, on an event loop of its own. Calls may come from several threads at once."""

    def __init__(self, spec: str, timeout: float) -> None:
        self.spec = spec
        self.timeout = timeout
        self._loop = LoopThread(f"mcp {spec}")
        self._session: _Session | None = None
        self._start_seconds = START_SECONDS
        self._starting: asyncio.Lock | None = None
        self._closed = False
        atexit.register(self.close)

    @property
    def files(self) -> Sequence[Path]:
        """Words of the command that are files."""
        scheme, _, command = self.spec.partition(":")
        return [path for word in shlex.split(command) if (path := Path(word)).is_file()] if scheme == "mcp" else []

    def start(self, start_seconds: float) -> list[Any]:
        """Open the session; the tools that the server lists. `ServerError` if that fails."""
        self._start_seconds = start_seconds
        return self._loop.start(self._list_tools()).result()

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The result of a call as a text. Nothing is called twice: a call that was lost with its server is an error."""
        return self._loop.start(self._call(name, arguments)).result()

    def close(self) -> None:
        """End the session, and the server if it is a process of ours. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        session = self._session
        if session is not None:
            try:
                self._loop.start(session.close()).result(CLOSE_SECONDS)
            except concurrent.futures.TimeoutError:
                session.kill()
        self._loop.close()

    async def _list_tools(self) -> list[Any]:
        session = await self._open_session()
        tools: list[Any] = []
        cursor: str | None = None
        try:
            async with _deadline(self._start_seconds):
                for _ in range(MAX_PAGES):
                    page = await session.client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if cursor is None:
                        return tools
        except Exception as error:
            await session.close()
            raise ServerError(f"the MCP server did not list its tools: {session.explained(error)}") from error
        raise ServerError(f"the MCP server's list of tools has more than {MAX_PAGES} pages")

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        started = time.monotonic()
        answer = asyncio.create_task(self._answer(name, arguments))
        await asyncio.wait({answer}, timeout=self.timeout)
        if not answer.done():
            if self._session is not None and self._session.silent_since(started):
                self._session.abandon()  # it hangs in this call, or in one before; a new one will start
            answer.add_done_callback(lambda late: late.cancelled() or late.exception())
            answer.cancel()  # without waiting: the client tells the server first, which may not read any more
            raise TimeoutError(f"no answer after {self.timeout:g} s")
        try:
            return answer.result()
        except ServerError as error:
            raise ToolError(f"error: {error}") from None
        except ToolError:
            raise
        except Exception as error:
            raise await self._explained(error) from error

    async def _answer(self, name: str, arguments: Mapping[str, Any]) -> str:
        session = await self._open_session()
        return text_of_result(await session.client.call_tool(name, dict(arguments)))

    async def _explained(self, error: Exception) -> Exception:
        """An error of a call as what the model should read."""
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        session = self._session
        lost = not isinstance(error, MCPError) or error.code == CONNECTION_CLOSED or "Session terminated" in str(error)
        if session is None or not (lost or session.over):
            return ToolError(f"error: {error}")
        await session.close()
        return ToolError(f"error: the MCP server ended during the call: {session.explained(error)}")

    async def _open_session(self) -> _Session:
        if self._starting is None:
            self._starting = asyncio.Lock()
        async with self._starting:
            if self._session is None or self._session.over:
                self._session = _Session(self.spec)
                await self._session.open(self._start_seconds)
            return self._session


class _Session:
    """Lives in a task of its own, since what a client enters it must leave in the same task."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._stop = asyncio.Event()
        self._opened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._error: BaseException | None = None
        self._server: Any = None  # a StdioServer, if it is a process of ours

    @property
    def client(self) -> Any:
        return self._opened.result()

    @property
    def over(self) -> bool:
        """Nothing can be called any more."""
        return self._task.done() or self._stop.is_set() or (self._server is not None and self._server.ended.is_set())

    def silent_since(self, moment: float) -> bool:
        """Whether a process of ours has sent nothing since then."""
        return self._server is not None and self._server.last_heard < moment

    async def open(self, seconds: float) -> None:
        self._task = asyncio.create_task(self._live())
        try:
            await asyncio.wait({self._opened, self._task}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.abandon()
            raise
        if self._opened.done():
            return
        error = self._error if self._task.done() else TimeoutError(f"no answer after {seconds:g} s")
        self._task.cancel()
        await asyncio.wait({self._task})
        raise ServerError(f"the MCP server cannot be used: {self.explained(error)}")

    async def close(self) -> None:
        self._stop.set()
        await asyncio.wait({self._task})

    def abandon(self) -> None:
        """End it without waiting."""
        self._stop.set()
        self._task.cancel()

    def kill(self) -> None:
        if self._server is not None:
            self._server.kill()

    def explained(self, error: BaseException | None) -> str:
        """What went wrong, and what the server said about it."""
        while error is not None and getattr(error, "exceptions", None):  # a group, of which the first says enough
            error = error.exceptions[0]  # type: ignore[attr-defined]
        fate = words = ""
        if self._server is not None:
            fate, words = self._server.fate, self._server.last_words
        problem = fate or str(error)[:MAX_PROBLEM_CHARS] or type(error).__name__
        return " ".join(f"{problem}; it said: {words}".split() if words else problem.split())

    async def _live(self) -> None:
        from mcp import Client

        try:
            transport = self._transport()
            async with Client(transport, cache=None) as client:
                self._opened.set_result(client)
                await self._until_the_end()
        except BaseException as error:  # a cancelled task, too: it ends here, and open() or a call says why
            self._error = error

    async def _until_the_end(self) -> None:
        waiting = [asyncio.create_task(self._stop.wait())]
        if self._server is not None:
            waiting.append(asyncio.create_task(self._server.ended.wait()))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def _transport(self) -> Any:
        scheme, _, rest = self._spec.partition(":")
        if scheme != "mcp":
            from aepo.agents.tools.mcp_http import http_transport

            return http_transport(self._spec.removeprefix("mcp+"))
        from aepo.agents.tools.mcp_stdio import StdioServer

        command = command_of(rest)
        self._server = StdioServer(command)
        return self._server


def command_of(text: str) -> list[str]:
    """The words of a command line, of which "python" is this interpreter; `ServerError` where there is no command."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ServerError(f"expected mcp:COMMAND ARGUMENTS: {error}") from None
    if not words:
        raise ServerError("expected mcp:COMMAND ARGUMENTS, got no command")
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    if shutil.which(words[0]) is None:
        raise ServerError(f"there is no command {words[0]!r}")
    return words


def text_of_result(result: Any) -> str:
    """The texts of a result, or its structured content as JSON; a note for the rest. `ToolError` if the tool failed."""
    parts = list(_parts(result.content or ()))
    if result.structured_content is not None and not any(part.type == "text" for part in result.content or ()):
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    text = "\n".join(parts)
    if result.is_error:
        raise ToolError(text or "error: the tool failed and did not say why")
    return text


def _parts(content: Sequence[Any]) -> Iterator[str]:
    for part in content:
        if part.type == "text":
            yield part.text
        elif part.type == "resource" and hasattr(part.resource, "text"):
            yield part.resource.text
        elif part.type == "resource_link":
            yield f"[{part.name}: {part.uri}]"
        else:
            kind = getattr(part, "mime_type", None) or getattr(getattr(part, "resource", None), "mime_type", None)
            yield f"[{part.type}{f' of type {kind}' if kind else ''}, which cannot be shown]"


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> Any:
    """TimeoutError when the time is over. (asyncio.timeout, which Python 3.10 has not.)"""
    import anyio

    with anyio.fail_after(seconds):
        yield
