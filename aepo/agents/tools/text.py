"""What a tool returned or raised as the text that the model reads: cut before it is copied, JSON if it is no text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from typing import Any

CUT_MARK = "... [cut]"
MIN_CHARS = len(CUT_MARK) + 1
_INK = re.compile(r"\S")


def text_of(value: object, max_chars: int) -> str:
    """A text as it is, nothing for None, JSON for the rest, of which no more is made than will be read.

    TypeError: the value has no JSON form.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"the tool returned {type(value).__name__}, not text")
    parts = []
    length = 0
    try:
        for part in json.JSONEncoder(ensure_ascii=False, default=_plain).iterencode(value):
            parts.append(part[: max_chars + 1])
            length += len(part)
            if length > max_chars:
                break
    except TypeError:
        raise TypeError(f"the tool returned {type(value).__name__}, which has no JSON form") from None
    return "".join(parts)


def cut(text: str, max_chars: int) -> str:
    """Without white space around it, at most max_chars characters, and safe for tokenizers."""
    ink = _INK.search(text)
    start = ink.start() if ink else len(text)
    end = start + max_chars
    too_long = _INK.search(text, end)
    kept = text[start : end - len(CUT_MARK)] + CUT_MARK if too_long else text[start:end].rstrip()
    return kept.encode("utf-8", "replace").decode()  # a lone surrogate would break them


def described(error: BaseException) -> str:
    """The exception's message and notes; never raises."""
    try:
        message = str(error)
    except Exception as failure:
        message = f"its message cannot be shown ({type(failure).__name__})"
    notes = [note for note in getattr(error, "__notes__", None) or () if isinstance(note, str)]
    return "\n".join(itertools.chain([message], notes)) if notes else message


def _plain(value: Any) -> Any:
    """What json asks for a value that it does not know."""
    if hasattr(value, "tolist"):  # scalars and arrays of numpy, tensors
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    raise TypeError
