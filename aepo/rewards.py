"""The score of a path: is it well formed, and is its answer right?"""

from __future__ import annotations

import re
import string

from aepo.types import Reward

FORMAT_WEIGHT = 0.1  # of a well-formed path with a wrong answer; a right answer has 1

# Tool calls, each followed at once by its result, then the answer at the very end. Between them anything but tags.
_TAG = r"</?(?:search|python|result|answer)>"
_PLAIN = rf"(?:(?!{_TAG}).)*"
_WELL_FORMED = re.compile(
    rf"(?:{_PLAIN}<(search|python)>{_PLAIN}</\1><result>(?P<result>.*?)</result>\n)*{_PLAIN}<answer>(?P<answer>{_PLAIN})</answer>",
    re.DOTALL,
)


def answer_reward(answer: str, response: str, finish_reason: str) -> Reward:
    """1 for a well-formed path with the right answer, FORMAT_WEIGHT for a wrong one, 0 for what is not well formed.

    response: everything after the prompt, tool results included. finish_reason: of the path; only "answered" counts.
    A result that the model wrote itself follows no call, and is not well formed.
    """
    match = _WELL_FORMED.fullmatch(response.rstrip()) if finish_reason == "answered" else None
    given = match["answer"] if match else ""
    correct = match is not None and normalized(given) == normalized(answer) != ""
    components = {
        "format": float(match is not None),
        "correct": float(correct),
        "tool_calls": float(response.count("<result>")),
    }
    total = FORMAT_WEIGHT * components["format"] + (1 - FORMAT_WEIGHT) * components["correct"]
    return Reward(total, components, correct)


def normalized(text: str) -> str:
    """For comparing answers: lower case, no punctuation, no articles, single spaces (as SQuAD does it)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))
