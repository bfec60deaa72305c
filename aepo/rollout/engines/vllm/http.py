"""How we speak to a `vllm serve`: its key, how long to wait, and how much it may say."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import httpx

from aepo.rollout.engines.vllm.answers import one_line
from aepo.rollout.engines.vllm.replica import ReplicaError, ReplicaGoneError

CONNECT = 10.0  # seconds, to a server that is there
ANSWER = 60.0  # seconds, for all that no text is generated for; the engine answers between two of its steps
ANSWER_BYTES = 1 << 20  # of an answer without texts and entropies


def api_key() -> str | None:
    """VLLM_API_KEY of the environment, where vLLM's own server looks as well. It is never a setting, which runs record.

    ValueError: it cannot be sent. The message does not have it.
    """
    key = os.environ.get("VLLM_API_KEY") or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("VLLM_API_KEY: expected printable ASCII without spaces and line ends")
    return key


def headers() -> dict[str, str]:
    key = api_key()
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def http_client(url: str) -> httpx.AsyncClient:
    """Without a time to read in, which counts silence alone: `ask` limits the whole."""
    sent = {"Accept-Encoding": "identity", **headers()}
    timeout = httpx.Timeout(None, connect=CONNECT)
    try:
        return httpx.AsyncClient(base_url=url.rstrip("/"), timeout=timeout, headers=sent)
    except httpx.InvalidURL as error:
        raise ReplicaError(f"{url}: {error}") from None


async def ask(
    client: httpx.AsyncClient,
    url: str,
    path: str,
    body: Any = None,
    *,
    method: str = "POST",
    seconds: float | None,
    most: int = ANSWER_BYTES,
    if_not_found: str = "",
) -> Any:
    """The JSON of an answer. seconds: from the request to the last byte, None: the caller watches. most: bytes of it.

    ReplicaGoneError: there is no answer, not in time, or the server has failed. ReplicaError: it refuses, with its
    words, or answers no JSON.
    """
    content = b"" if body is None else json.dumps(body).encode()
    try:
        status, raw = await asyncio.wait_for(_exchange(client, method, path, content, most), seconds)
    except asyncio.TimeoutError:
        raise ReplicaGoneError(f"{url} does not answer: {path} took more than {seconds:g} s") from None
    except httpx.TransportError as error:
        raise ReplicaGoneError(f"{url} does not answer: {path}: {_described(error)}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ReplicaError(f"{url}: {path} answered what cannot be read: {_described(error)}") from error
    if raw is None:
        raise ReplicaError(f"{url}: {path} answered more than {most} bytes")
    if status >= 500:
        raise ReplicaGoneError(f"{url} failed with status {status} ({path}): {_words(raw)}")
    if status == 401:
        has = "is none of the server's keys" if api_key() else "is not set, and the server has a key"
        raise ReplicaError(f"{url}: VLLM_API_KEY of this environment {has} ({path})")
    if status == 404 and if_not_found:
        raise ReplicaError(f"{url}: {if_not_found} ({path})")
    if status != 200:
        raise ReplicaError(f"{url}: refused {path} with status {status}: {_words(raw)}")
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise ReplicaError(f"{url}: {path} answered no JSON: is this a `vllm serve`?") from None


async def _exchange(
    client: httpx.AsyncClient, method: str, path: str, content: bytes, most: int
) -> tuple[int, bytes | None]:
    """Status and body; None: it is longer than `most`. As it comes: what is packed although we did not ask for that is
    no JSON."""
    headers = {"Content-Type": "application/json"} if content else {}
    async with client.stream(method, path, content=content, headers=headers) as response:
        parts, size = [], 0
        async for part in response.aiter_raw():
            size += len(part)
            if size > most:
                return response.status_code, None
            parts.append(part)
    return response.status_code, b"".join(parts)


def _words(raw: bytes) -> str:
    """What a refusal says, in one line: {"error": words} of our routes, {"error": {"message": words}} of vLLM's."""
    text = raw.decode(errors="replace")
    try:
        found = json.loads(raw)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, RecursionError, TypeError, KeyError):
        pass
    return one_line(text)


def _described(error: Exception) -> str:
    """httpx quotes what it could not read, up to 100 KiB of it."""
    return one_line(f"{type(error).__name__} {error}")
