"""The way to an MCP server in the network, with a limit for what it may answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from mcp.client.streamable_http import streamable_http_client

MAX_ANSWER_BYTES = 2**24
CONNECT_SECONDS = 30.0
READ_SECONDS = 300.0  # between two events of a stream; a call has its own, shorter timeout


@contextlib.asynccontextmanager
async def http_transport(url: str) -> AsyncIterator[Any]:
    """A transport for `mcp.Client`: streamable HTTP."""
    client = httpx2.AsyncClient(
        timeout=httpx2.Timeout(CONNECT_SECONDS, read=READ_SECONDS),
        headers={"Accept-Encoding": "identity"},  # what is packed has no limit
        event_hooks={"response": [_limit]},
    )
    async with (
        client,
        streamable_http_client(url, http_client=client, max_sse_event_size=MAX_ANSWER_BYTES) as streams,
    ):
        yield streams


async def _limit(response: httpx2.Response) -> None:
    """The client limits the events of a stream, and not a plain answer."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx2.StreamError("the answer is packed, although it was asked not to be")
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        response.stream = _Limited(response.stream)


class _Limited(httpx2.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        length = 0
        async for chunk in self._stream:
            length += len(chunk)
            if length > MAX_ANSWER_BYTES:
                raise httpx2.StreamError(f"the answer has more than {MAX_ANSWER_BYTES:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
