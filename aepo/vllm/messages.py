"""What comes to the routes of aepo/vllm/endpoints.py and goes from them: JSON within limits.

Bodies are read up to a limit before anything is parsed, and what is large is parsed and written in a thread, so that no
message holds the event loop.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from fastapi import Request

from aepo.vllm.processor import KEY_CHARACTERS, is_text

# Of one message. The trainer keeps to them by itself (aepo/rollout/engines/vllm/remote.py).
BODY_BYTES = 1 << 21
BODY_SECONDS = 60.0
KEYS, TOKENS = 4096, 1 << 20


class Refused(Exception):
    """An answer with this status. The message is sent, and never repeats a body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_body(request: Request) -> Any:
    """What the body says, None for an empty one. It is read no further than BODY_BYTES."""
    too_large = Refused(413, f"body has more than {BODY_BYTES} bytes: send it in parts")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 12 or int(length) > BODY_BYTES):
        raise too_large

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > BODY_BYTES:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    try:
        raw = await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS:g} s") from None
    try:
        return await asyncio.to_thread(json.loads, raw, parse_int=_int, parse_constant=_no_number) if raw else None
    except (ValueError, RecursionError):
        raise Refused(400, "body is no JSON") from None


def _int(digits: str) -> int:
    """Of 64 bits: vLLM passes no other to its workers."""
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 63:
        raise Refused(400, "body has an integer of more than 64 bits")
    return int(digits)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def field(body: Any, name: str) -> Any:
    if not isinstance(body, dict) or body.keys() != {name}:
        raise Refused(400, f"body must be an object with {name!r} and nothing else")
    return body[name]


def few(keys: Any) -> Any:
    """Keys, or what is asked by key, if they are as many and as long as they may be."""
    if isinstance(keys, (dict, list)):
        if len(keys) > KEYS:
            raise Refused(400, f"body has {len(keys)} keys, expected at most {KEYS}: send them in parts")
        texts = [key for key in keys if isinstance(key, str)]
        if any(len(key) > KEY_CHARACTERS for key in texts):
            raise Refused(400, f"body has a key of more than {KEY_CHARACTERS} characters")
        if not all(map(is_text, texts)):
            raise Refused(400, "body has a key with half of a surrogate pair")
    return keys


def written(answer: Any) -> bytes:
    return json.dumps(_finite(answer), allow_nan=False, separators=(",", ":")).encode()


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
