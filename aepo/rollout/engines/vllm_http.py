"""How we speak to a `vllm serve`: its key, how long to wait, and what its answers mean."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import httpx

from aepo.rollout.engines.vllm import ReplicaGoneError

CONNECT = 10.0  # seconds, to a server that is there
ANSWER = 60.0  # seconds, for all that no text is generated for; the engine answers between two of its steps
WORDS = 500  # characters of a refusal


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


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """ReplicaGoneError for what httpx raises where there is no answer."""
    try:
        yield
    except httpx.TransportError as error:
        raise ReplicaGoneError(f"{url} does not answer: {type(error).__name__} {error}".rstrip()) from error


def content(url: str, response: httpx.Response, if_not_found: str = "") -> Any:
    """Of an answer. ReplicaGoneError: the server has failed. ValueError: it refuses, with its words."""
    path, status = response.request.url.path, response.status_code
    if status >= 500:
        raise ReplicaGoneError(f"{url} failed with status {status}: {response.text[:WORDS]}")
    if status == 401:
        has = "is none of the server's keys" if api_key() else "is not set, and the server has a key"
        raise ValueError(f"{url}: VLLM_API_KEY of this environment {has} ({path})")
    if status == 404 and if_not_found:
        raise ValueError(f"{url}: {if_not_found} ({path})")
    if status != 200:
        raise ValueError(f"{url}: refused {path} with status {status}: {response.text[:WORDS]}")
    try:
        return response.json()
    except ValueError:
        raise ValueError(f"{url}: {path} answered no JSON: is this a `vllm serve`?") from None
