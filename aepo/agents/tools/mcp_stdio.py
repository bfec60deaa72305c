"""An MCP server as a process of ours: what it reads and writes, in bounded memory, and its end.

The client of the package mcp has a transport like this one, without a limit for a line and without the server's last
words.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import INTERNAL_ERROR, ErrorData, JSONRPCError, jsonrpc_message_adapter

MAX_LINE_BYTES = 2**24  # of one message; a longer one becomes an error
MAX_OWED = 100  # requests of a server that are not answered yet; more are dropped
MAX_WORDS_BYTES = 500  # of a line that is shown in an error
READ_BYTES = 2**16
EXIT_SECONDS = 1.0  # to end after its input has ended, then after SIGTERM
_ID_FIRST = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*(\d+)\s*,')


class StdioServer:
    """A transport for `mcp.Client`: `async with` starts the process and ends it, with all that it started.

    Only answers and requests are passed on: notifications (logs, progress) would only cost time. What is no message at
    all, is dropped, too.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.ended = asyncio.Event()  # its output has ended, or cannot be understood any more
        self.last_heard = 0.0  # time.monotonic() of its last answer
        self.fate = ""  # how it ended, if that was not our decision
        self._command = command
        self._owed = 0  # answers to its requests
        self._error_line = ""  # the last one that it wrote to stderr
        self._no_message = ""  # the first line of its output that is none

    @property
    def last_words(self) -> str:
        """What it said that may explain its failure; "" if nothing."""
        return self._error_line or self._no_message

    async def __aenter__(self) -> tuple[Any, Any]:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *_dies_with_us(), *self._command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )  # of its own session: Ctrl-C in the terminal is for the training run
        self._to_session, read_stream = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        write_stream, self._from_session = anyio.create_memory_object_stream[SessionMessage](0)
        self._streams = (self._to_session, read_stream, write_stream, self._from_session)
        self._pumps = [asyncio.create_task(pump()) for pump in (self._read, self._read_errors, self._write)]
        return read_stream, write_stream

    async def __aexit__(self, *error: object) -> None:
        ended_before = self.ended.is_set()
        for stream in self._streams:
            stream.close()
        try:
            await self._end()
            await asyncio.wait(self._pumps[:2], timeout=0.5)  # its last words
        finally:
            self.kill()
            for pump in self._pumps:
                pump.cancel()
            await asyncio.wait(self._pumps)
            if ended_before and not self.fate:
                self.fate = f"it ended with exit code {self._process.returncode}"
            self._process._transport.close()  # type: ignore[attr-defined]  # a grandchild may hold a pipe

    def kill(self) -> None:
        """End it and what it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        if not await self._exits():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGTERM)
            if not await self._exits():
                self.kill()
                await self._exits()

    async def _exits(self) -> bool:
        """Not `wait`, which also waits for the pipes, and others may hold those."""
        deadline = time.monotonic() + EXIT_SECONDS
        while self._process.returncode is None and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return self._process.returncode is not None

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line, length in _lines(self._process.stdout, MAX_LINE_BYTES):
                message = self._message(line, length)
                if message is None or (_asks(message) and self._owed >= MAX_OWED):
                    continue
                if _asks(message):
                    self._owed += 1
                else:
                    self.last_heard = time.monotonic()
                await self._to_session.send(message)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        except _LostMessageError:
            self.fate = f"it sent a message of more than {MAX_LINE_BYTES:,} bytes"
        finally:
            self._to_session.close()
            self.ended.set()

    def _message(self, line: bytes, length: int) -> SessionMessage | None:
        if length > MAX_LINE_BYTES:
            answers = _ID_FIRST.match(line)
            if answers is None:
                raise _LostMessageError
            error = ErrorData(code=INTERNAL_ERROR, message=f"the answer has more than {MAX_LINE_BYTES:,} bytes")
            return SessionMessage(JSONRPCError(jsonrpc="2.0", id=int(answers[1]), error=error))
        if line.lstrip().startswith(b"{"):
            if b'"id"' not in line:
                return None  # a notification
            with contextlib.suppress(ValueError):
                return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
            with contextlib.suppress(ValueError, RecursionError):
                return SessionMessage(jsonrpc_message_adapter.validate_json(_sound(line), by_name=False))
        self._no_message = self._no_message or _shown(line)
        return None

    async def _read_errors(self) -> None:
        assert self._process.stderr is not None
        async for line, _ in _lines(self._process.stderr, MAX_WORDS_BYTES):
            self._error_line = _shown(line) or self._error_line

    async def _write(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(anyio.ClosedResourceError, ConnectionError):
            async for message in self._from_session:
                self._owed -= not _asks(message)
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                stdin.write(text.encode("utf-8", "replace") + b"\n")
                await stdin.drain()


class _LostMessageError(Exception):
    """Too long a message, which does not begin with its id: nobody knows which call waits for it."""


def _asks(message: SessionMessage) -> bool:
    """Or notifies; what has no method is an answer."""
    return hasattr(message.message, "method")


async def _lines(stream: asyncio.StreamReader, limit: int) -> AsyncIterator[tuple[bytes, int]]:
    """Each line's first `limit` bytes, and its length."""
    kept, length = bytearray(), 0
    while chunk := await stream.read(READ_BYTES):
        *ends, begins = chunk.split(b"\n")
        for piece in ends:
            yield bytes(kept + piece[: limit - len(kept)]), length + len(piece)
            kept, length = bytearray(), 0
        kept += begins[: limit - len(kept)]
        length += len(begins)
    if length:
        yield bytes(kept), length


def _sound(line: bytes) -> bytes:
    """The JSON without escapes such as \\ud83d that stand alone, which only Python's own parser reads."""
    return json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8", "replace")


def _shown(line: bytes) -> str:
    return line[:MAX_WORDS_BYTES].decode("utf-8", "replace").strip()


@functools.cache
def _dies_with_us() -> tuple[str, ...]:
    """A prefix of the command with which the kernel ends the server when we are killed, where there is one.

    Without it, the end of its input is all that a server notices.
    """
    prefix = ("setpriv", "--pdeathsig", "KILL", "--")
    if shutil.which(prefix[0]) is None:
        return ()
    works = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    return prefix if works else ()
