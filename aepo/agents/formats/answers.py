"""Where the answer is in a turn that calls no tool, and what of a turn is thinking."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

THINK, END_THINK = "<think>", "</think>"
_THOUGHTS = re.compile(rf"(?:\s*{THINK}.*?{END_THINK})*", re.DOTALL)
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BRACE = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)


class FindAnswer(Protocol):
    def __call__(self, content: str) -> str | None: ...


def without_thinking(text: str) -> str:
    """What follows the thinking that a turn begins with; thinking that does not end goes on to the end.

    Elsewhere, in the arguments of a call say, <think> is a text like another one.
    """
    return _behind_thoughts(text) if thinking_ends(text) else ""


def thinking_ends(text: str) -> bool:
    """Whether the thinking that a turn begins with, if it does, has its end."""
    return not _behind_thoughts(text).lstrip().startswith(THINK)


def _behind_thoughts(text: str) -> str:
    return text[_THOUGHTS.match(text).end() :]  # type: ignore[union-attr]  # matches nothing, too


def tagged(content: str) -> str | None:
    """In the last <answer> and </answer>, as it was written."""
    found = _TAGGED.findall(content)
    return found[-1] if found else None


def boxed(content: str) -> str | None:
    r"""In the last \boxed{..} whose braces are balanced; one after a backslash is a sign, and does not count."""
    open_braces: list[int | None] = []  # where the text of a box begins; None: another brace
    last: tuple[int, int] | None = None
    for found in _BRACE.finditer(content):
        if found[0].endswith("{") and found[0] != r"\{":
            open_braces.append(found.end() if "boxed" in found[0] else None)
        elif found[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, found.start()
    return content[slice(*last)] if last else None


def whole_turn(content: str) -> str | None:
    """All that is said."""
    return content.strip() or None


def first_of_all(content: str) -> str | None:
    """As the first of the other styles that finds one."""
    for find in (tagged, boxed, whole_turn):
        answer = find(content)
        if answer is not None:
            return answer
    return None


STYLES: Mapping[str, FindAnswer] = {"auto": first_of_all, "tag": tagged, "boxed": boxed, "turn": whole_turn}
