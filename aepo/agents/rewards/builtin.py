"""Reward functions by name, for `task.rewards`: 1 where the answer is right, else 0. docs/rewards.md.

They compare `question.answer` with the answer that the format found; a list of answers means any of them. None, "does
not apply", where a question has no answer of that sort.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from aepo.agents.rewards.matching import same_math
from aepo.agents.rewards.text import DASHES, MAX_CHARS, same_text
from aepo.types import Question, Response

_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\w))?"
_NUMBER = re.compile(rf"(?<![\w.])-?\s?{_DECIMAL}(?:\s?/\s?{_DECIMAL})?(?![\d])")
_THEN = r"(?:\\\w+\{|[\s*(){}$-])*"  # between a number and the word for what it counts: \boxed{5}\text{ bn}
_SHORT = r"[b-df-hj-np-tv-xz]{1,3}"  # no word: million or billion where money is spoken of, else often a unit
_MONEY = r"[$\u00a3\u00a5\u20ac]"
# What makes another number of the one that stands there, or says that it is not that one. The words are listed: those
# for numbers are few, what can be counted is not (5 apples, 5 TVs).
_CHANGED = re.compile(
    r"[\u221a\u221b!<>\u2264\u2265\u2260\u00b1\u03c0\u221e\u2248\u2030]"
    r"|\\(?!boxed|text|math(?:rm|bf)|circ|[$%,; ()\[\]])"
    r"|-\s*[(\[{|]|\d\s*(?-i:(?![mgshJNWVL]|[eE][+-]?\d)[a-zA-Z])\b(?<!\s[aI])"  # 5x, but 5m, 5 a day and 5e-3
    rf"|\d{_THEN}(?:score|pairs?|gross|grand|mil|ml?n|bl?n|tr?n|cr|(?-i:MM))\b"
    rf"|{_MONEY}\s?[\d.]+{_THEN}{_SHORT}\b|\d\s?{_SHORT}\s?(?:{_MONEY}|(?:dollar|euro)s?\b)"  # $5m
    r"|\^(?!\s*\{?\s*\\circ)|\d\s*(?:\.\.|\u2026)"
    r"|(?:\b[a-z]|[)\]}])\s*[-+*/]\s*[\d.]|[\d.]\s*[-+*/]\s*(?:[a-z]\b|[(\[{])"  # x + 5
    r"|\b(?:sqrt|log|ln|sin|cos|tan|exp|not|minus|negative|squared|cubed|factorial|pi|dozen|half|halves"
    r"|thirds?|quarters?|(?:fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|[a-z]+illion)ths?"
    r"|hundreds?|thousands?|[a-z]+illions?|milliards?|crores?|lakhs?|lacs?|twice|double|triple|at\s+(?:least|most)"
    r"|(?:more|less|fewer|greater|larger|smaller)\s+than(?=\W*\d)|or\s+(?:more|less|fewer))\b|n't\b",
    re.IGNORECASE,
)
_SIGN = re.compile(rf"-\s?\\?{_MONEY}\s?(?=[\d.])")
_LETTER = re.compile(r"(?<![^\W_])[A-Z](?![^\W_]|')")
# At the beginning of a sentence before a small word, "A" is an article and "I" someone, unless a verb says otherwise.
_WORD = re.compile(r"(?:(?<=^)|(?<=[.!?]\s)|(?=I))[AI]\s+(?!(?:is|was|and|or|because|since|as)\b)[a-z]")
_ONE_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:\w+\s+)?(?:answer|choice|option)(?:\s+is)?\s*:?\s*)?\W*([a-zA-Z])\W*", re.IGNORECASE
)
_SEVERAL = re.compile(r"[A-J]{2,}")  # AC
_DENIED = re.compile(r"\b(?:not|never|neither|nor|except|wrong|incorrect|false|no)\b|n['\u2019]t\b", re.IGNORECASE)
# "(b) cat", "B) Plan A": a label and the option's short text, unless this goes on about another option.
_LABELLED = re.compile(r"(\([a-zA-Z]\)|[a-zA-Z]\)|[A-Z][.:])\s+((?:[\w'-]+\s*){1,6})\.?")
_OTHER = re.compile(
    r"\b(?:or|and|but|then|also|maybe|is|are|was|either|both|[a-zA-Z]\s+[a-zA-Z])\b|^[a-zA-Z]$", re.IGNORECASE
)


def exact_match(question: Question, response: Response) -> float | None:
    """The same words, without case, articles and harmless punctuation."""
    return _right(question, response, same_text)


def math(question: Question, response: Response) -> float | None:
    """The same mathematical object (`same_math`)."""
    return _right(question, response, same_math)


def numbers(question: Question, response: Response) -> float | None:
    """The answer holds one number, and it is the right one. The right one may follow "####", as in GSM8K."""
    wanted = _right_numbers(question)
    if not wanted:
        return None
    given = _only_number(response.answer or "")
    return float(given is not None and given in wanted)


def choice(question: Question, response: Response) -> float | None:
    """The answer names the right letters and no others: "B", "(b)", "B) Paris", "the answer is B"."""
    wanted = _right_letters(question)
    if not wanted:
        return None
    return float(_letters(response.answer or "") in wanted)


def environment(question: Question, response: Response) -> float | None:
    """What the environment's get_reward() said when the path had ended."""
    return response.environment_reward


def format(question: Question, response: Response) -> float:
    """1 for a path on which every turn was what the chat format allows, and the last one answered.

    It says nothing about success, unless it is the only function (`aepo.scoring`).
    """
    return float(response.well_formed)


BUILTIN: dict[str, Callable[[Question, Response], float | None]] = {
    function.__name__: function for function in (exact_match, math, numbers, choice, environment, format)
}


def _right(question: Question, response: Response, same: Callable[[str, str], bool]) -> float | None:
    answers = _answers(question)
    if not answers:
        return None
    given = response.answer
    return float(given is not None and any(same(given, str(answer)) for answer in answers))


def _answers(question: Question) -> list[Any]:
    """Those that are right."""
    answer = question.answer
    several = answer if isinstance(answer, (list, tuple)) else [answer]
    return [one for one in several if one is not None and one != ""]


def _right_numbers(question: Question) -> list[Fraction]:
    found = [_only_number(str(answer).rpartition("####")[2]) for answer in _answers(question)]
    return [number for number in found if number is not None]


def _right_letters(question: Question) -> list[frozenset[str]]:
    return [letters for answer in _answers(question) if (letters := _letters(str(answer)))]


COMPARED: dict[Callable[..., Any], Callable[[Question], Sequence[Any]]] = {
    exact_match: _answers,
    math: _answers,
    numbers: _right_numbers,
    choice: _right_letters,
}
"""What of a question each of these compares answers with. Nothing: it does not apply, whatever is answered."""


def _only_number(text: str) -> Fraction | None:
    """None: there is none, more than one, or one that something is done to."""
    if len(text) > MAX_CHARS:
        return None
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text.translate(DASHES))
    text = _SIGN.sub("-", text)
    if _CHANGED.search(text):
        return None
    found = list(_NUMBER.finditer(text))
    rest = _NUMBER.sub("", text)
    if len(found) != 1 or any(c.isdigit() for c in rest):
        return None
    numerator, _, denominator = found[0][0].replace(" ", "").partition("/")
    try:
        value = Fraction(Decimal(numerator)) / Fraction(Decimal(denominator or 1))
    except (InvalidOperation, ZeroDivisionError):
        return None
    return value


def _letters(text: str) -> frozenset[str]:
    """The letters of a choice; none where something is denied."""
    text = re.sub(r"\\\w+\s*(?=\{)", " ", text[:MAX_CHARS]).replace("**", "").strip()
    if _SEVERAL.fullmatch(text) and list(text) == sorted(set(text)):
        return frozenset(text)
    if _DENIED.search(text):
        return frozenset()
    if only := _ONE_LETTER.fullmatch(text):
        return frozenset(only[1].upper())
    if (labelled := _LABELLED.fullmatch(text)) and not _OTHER.search(labelled[2]):
        return frozenset(labelled[1].strip("().:").upper())
    return frozenset(match[0] for match in _LETTER.finditer(text) if not _WORD.match(text, match.start()))
