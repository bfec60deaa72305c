"""The score of a path: is it well formed, and is its answer right?"""

from __future__ import annotations

import re
import string

from aepo.types import Reward

FORMAT_WEIGHT = 0.1  # of a well-formed path with a wrong answer; a right answer has 1

# Tool calls, each followed by its result, then the answer at the very end; between them anything but tags.
_TAG = r"</?(?:search|python|result|answer)>"
_PLAIN = rf"(?:(?!{_TAG}).)*"
_RESULT = r"<result>(?:(?!</result>\n).)*</result>\n"
_CALL = rf"<(search|python)>{_PLAIN}</\1>\s*{_RESULT}"
_WELL_FORMED = re.compile(rf"(?:{_PLAIN}{_CALL})*{_PLAIN}<answer>(?P<answer>{_PLAIN})</answer>", re.DOTALL)

# A minus sign and a decimal point change a number; other punctuation changes nothing.
_PUNCTUATION = re.compile(rf"(?!(?<!\w)-\d)(?!(?<=\d)\.\d)[{re.escape(string.punctuation)}]")


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
    """For comparing answers, as is usual for questions: lower case, single spaces, no articles, no punctuation."""
    words = _PUNCTUATION.sub("", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
