"""When two mathematical answers are the same, as a mathematician would sign it. Never raises, always ends soon.

Numbers and expressions are compared by value; sets, lists, intervals and tuples by their parts; equations and
inequalities by what they say; everything else as text. docs/rewards.md has the rules with examples.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

from aepo.agents.rewards.arithmetic import Number, Unreadable, same_number
from aepo.agents.rewards.expressions import POINTS, value_of, variables
from aepo.agents.rewards.latex import Token, tokens_of
from aepo.agents.rewards.reading import WORDS, Answer, Equation, Expression, Parts, is_constant, is_name, names_of, read
from aepo.agents.rewards.text import same_text
from aepo.agents.rewards.units import CURRENCIES, SHORT, unit_of

MAX_CHARS = 1000  # longer answers are compared as text
_PUNCTUATION = frozenset(",-':?!(){}")
_CLOCK = re.compile(r"\d{1,2}:\d\d(?::\d\d)?(?:\s*[ap]\.?\s*m\.?)?", re.IGNORECASE)


@functools.lru_cache(maxsize=1024)  # many paths of a question give the same answer
def same_math(given: str, answer: str) -> bool:
    if max(len(given), len(answer)) > MAX_CHARS:
        return given.strip() == answer.strip() != ""
    one, other = tokens_of(given), tokens_of(answer)
    if not one or not other:
        return False
    if one == other:
        return True
    said, wanted = _words(one), _words(other)
    if said and wanted:
        return same_text(said, wanted) and (said == wanted or max(map(len, (said, wanted))) > 1)  # x is not X
    try:
        return _same(read(one), read(other))
    except (Unreadable, ArithmeticError, RecursionError):
        return False


def _words(tokens: Sequence[Token]) -> str:
    """What is said where it is no formula: words, one letter, a time of day. Perhaps in brackets."""
    while len(tokens) > 2 and (tokens[0].text, tokens[-1].text) in (("(", ")"), ("{", "}")):
        tokens = tokens[1:-1]
    signs = {token.text for token in tokens if token.kind == "sign"}
    kinds = {token.kind for token in tokens} - {"sign"}
    said = "".join(" " * token.spaced + token.text for token in tokens).strip()
    if _CLOCK.fullmatch(said):
        return said
    if len(tokens) == 1:
        return said if kinds and kinds <= {"text", "name"} else ""
    if "number" in kinds and tokens[0].kind != "text":
        return ""  # Route 66, but not 66 routes
    spelt = [a.kind == b.kind == "name" and len(a.text + b.text) == 2 and not b.spaced for a, b in pairwise(tokens)]
    if not (any(spelt) or any(token.kind == "text" and token.text not in WORDS for token in tokens)):
        return ""
    # Signs are punctuation between words only: n! ways are not n ways.
    lone = [token for token in tokens if token.kind == "name"]
    return said if not signs or (not lone and signs <= _PUNCTUATION) else ""


def _same(one: Answer, other: Answer) -> bool:
    if isinstance(one, Equation) or isinstance(other, Equation):
        return _same_equation(one, other)
    if isinstance(one, Expression) and isinstance(other, Expression):
        return _same_expression(one, other)
    if isinstance(one, Parts) and isinstance(other, Parts):
        if one.kind != other.kind or (one.of and other.of and one.of != other.of):
            return False
        if {one.word, other.word} == {"or", "and"} and not names_of(one.items + other.items):
            return False  # of a variable, both list the solutions
        if one.kind in ("set", "union", "all", "any"):
            return _same_set(one.items, other.items)
        return len(one.items) == len(other.items) and all(map(_same_part, one.items, other.items))
    parts, single = (one, other) if isinstance(one, Parts) else (other, one)
    return isinstance(parts, Parts) and parts.kind == "set" and _same_set(parts.items, (single,))


def _same_part(one: Answer, other: Answer) -> bool:
    """Alone, {1} is 1; as a part of something it is not."""
    return isinstance(one, Parts) == isinstance(other, Parts) and _same(one, other)


def _same_set(ones: Sequence[Answer], others: Sequence[Answer]) -> bool:
    """In any order, each as often. Where several variables are named, each part must say whose it is."""
    left = list(others)
    if len(ones) != len(left):
        return False
    named = len(set(names_of(ones))) > 1 or len(set(names_of(others))) > 1
    for one in ones:
        found = (
            index for index, other in enumerate(left) if not named or bool(names_of([one])) == bool(names_of([other]))
        )
        index = next((index for index in found if _same_part(one, left[index])), None)
        if index is None:
            return False
        del left[index]
    return True


def _same_equation(one: Answer, other: Answer) -> bool:
    """`x = 3` is 3, unless the other one names another variable; other equations have the same solutions."""
    if isinstance(one, Equation) and isinstance(other, Equation):
        if one.left == other.left and _same_expression(one.right, other.right):
            return True
        return _proportional(one, other)
    equation, value = (one, other) if isinstance(one, Equation) else (other, one)
    assert isinstance(equation, Equation)
    if isinstance(value, Parts) and value.of and set(names_of([equation])) - {value.of}:
        return False
    if is_name(equation.left.tokens) or _true(equation):
        return _same(equation.right, value)
    return False


def _true(equation: Equation) -> bool:
    """2 + 2 = 4."""
    return is_constant(equation.left.tokens) and _same_expression(equation.left, equation.right)


def _proportional(one: Equation, other: Equation) -> bool:
    """The two differences are the same up to a factor that is not zero."""
    if not (variables(one.left.tokens) | variables(one.right.tokens)):
        return False
    ratios = []
    for point in range(POINTS):
        try:
            first, second = (
                complex(value_of(equation.left.tokens, point)) - complex(value_of(equation.right.tokens, point))
                for equation in (one, other)
            )
        except (Unreadable, ArithmeticError):
            continue
        if 0 in (first, second):
            raise Unreadable("an equation that holds everywhere, or nowhere to be told")
        ratios.append(first / second)
    return len(ratios) * 2 > POINTS and all(abs(ratio - ratios[0]) <= 1e-9 * abs(ratios[0]) for ratio in ratios)


def _same_expression(one: Expression, other: Expression) -> bool:
    if one.tokens == other.tokens or _same_values(one.tokens, other.tokens):
        return True
    (bare_one, tail_one), (bare_other, tail_other) = _quantity(one.tokens), _quantity(other.tokens)
    if not (tail_one or tail_other):
        return False
    if tail_one != tail_other:
        units = [unit_of(tail) for tail in (tail_one, tail_other) if tail]
        if None in units or (len(units) == 2 and units[0] != units[1]):
            return False
        if len(units) == 1 and next((t.kind for t in tail_one or tail_other if t.kind != "sign"), "") == "name":
            return False  # 5 m are metres where the other one says so; m may be a variable
    return _same_values(bare_one, bare_other)


def _same_values(one: Sequence[Token], other: Sequence[Token]) -> bool:
    """At all points where both have a value, and at least half of the points have one."""
    if variables(one) != variables(other) and not (variables(one) and variables(other)):
        points = POINTS  # x - x is 0
    else:
        points = POINTS if variables(one) | variables(other) else 1
    found = 0
    for values in _pairs(one, other, points):
        if not same_number(*values) or (points == 1 and _approximates(*values)):
            return False
        found += 1
    return found * 2 > points or found == points


def _approximates(one: Number, other: Number) -> bool:
    """A long decimal may come near an irrational number, but is none."""
    if isinstance(one, Fraction) == isinstance(other, Fraction):
        return False
    exact = one if isinstance(one, Fraction) else other
    return isinstance(exact, Fraction) and max(abs(exact.numerator), exact.denominator) > 10**9


def _pairs(one: Sequence[Token], other: Sequence[Token], points: int) -> Iterator[tuple[Number, Number]]:
    for point in range(points):
        try:
            yield value_of(one, point), value_of(other, point)
        except (Unreadable, ArithmeticError):
            continue


def _quantity(tokens: tuple[Token, ...]) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
    """A value, and what stands beside it: words or a unit behind it, or a currency before it."""
    sign = 1 if tokens[:1] and tokens[0].text == "-" else 0
    if len(tokens) > sign and tokens[sign].text in CURRENCIES:
        return tokens[:sign] + tokens[sign + 1 :], tokens[sign : sign + 1]
    for index in range(1, len(tokens)):
        token, before = tokens[index], tokens[index - 1]
        after_value = before.kind == "number" or before.text in (")", "}")
        short = token.kind == "name" and token.text in SHORT and token.spaced and before.kind == "number"
        unit = short or token.text in ("%", "\u00a2", *CURRENCIES)
        if (after_value and unit) or (token.kind == "text" and (after_value or before.kind == "name")):
            return tokens[:index], tokens[index:]
        if token.text == "^" and "circ" in [t.text for t in tokens[index + 1 : index + 3]]:
            return tokens[:index], tokens[index:]
    return tokens, ()
