"""When two mathematical answers are the same, as a mathematician would sign it. Never raises, always ends soon.

Numbers and expressions are compared by value; sets, lists, intervals and tuples by their parts; equations and
inequalities by what they say; everything else as text. docs/rewards.md has the rules with examples.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from aepo.agents.rewards.arithmetic import Number, Unreadable, same_number
from aepo.agents.rewards.expressions import POINTS, value_of, variables
from aepo.agents.rewards.latex import NAMES, Token, tokens_of
from aepo.agents.rewards.reading import WORDS, Answer, Equation, Expression, Parts, is_constant, is_name, names_of, read
from aepo.agents.rewards.text import same_text
from aepo.agents.rewards.units import CURRENCIES, SHORT, unit_of

MAX_CHARS = 1000  # longer answers are compared as text

_PLAIN = re.compile(r"[^\W\d_]+(?:\s+[^\W\d_]+)*")


@functools.lru_cache(maxsize=1024)  # many paths of a question give the same answer
def same_math(given: str, answer: str) -> bool:
    if max(len(given), len(answer)) > MAX_CHARS:
        return given.strip() == answer.strip() != ""
    one, other = tokens_of(given), tokens_of(answer)
    if not one or not other:
        return False
    if one == other:
        return True
    if _in_words(one) and _in_words(other):
        return same_text(*(" ".join(token.text for token in tokens) for tokens in (one, other)))
    if _plain(given) and _plain(answer):
        return same_text(given, answer)  # act and cat, which could also be products
    try:
        return _same(read(one), read(other))
    except (Unreadable, ArithmeticError, RecursionError):
        return False


def _in_words(tokens: Sequence[Token]) -> bool:
    """An answer that is no formula: words, or one letter, perhaps in brackets."""
    said = [token for token in tokens if token.text not in ("(", ")", "{", "}")]
    if len(said) == 1:
        return said[0].kind in ("text", "name")
    words = all(token.kind in ("text", "name") or token.text in (",", "-", "'", ":", "?", "!") for token in said)
    return words and any(token.kind == "text" and token.text not in WORDS for token in said)


def _plain(text: str) -> bool:
    """Words, not all of them letters or mathematical names."""
    words = text.split()
    return _PLAIN.fullmatch(text.strip()) is not None and any(len(word) > 1 and word not in NAMES for word in words)


def _same(one: Answer, other: Answer) -> bool:
    if isinstance(one, Equation) or isinstance(other, Equation):
        return _same_equation(one, other)
    if isinstance(one, Expression) and isinstance(other, Expression):
        return _same_expression(one, other)
    if isinstance(one, Parts) and isinstance(other, Parts):
        if one.kind != other.kind or (one.of and other.of and one.of != other.of):
            return False
        if one.kind in ("set", "union", "all", "any"):
            return _same_set(one.items, other.items)
        return len(one.items) == len(other.items) and all(map(_same, one.items, other.items))
    parts, single = (one, other) if isinstance(one, Parts) else (other, one)
    return isinstance(parts, Parts) and parts.kind == "set" and _same_set(parts.items, (single,))


def _same_set(ones: Sequence[Answer], others: Sequence[Answer]) -> bool:
    """In any order, each as often. Where several variables are named, each part must say whose it is."""
    left = list(others)
    if len(ones) != len(left) or not ones:
        return False
    named = len(set(names_of(ones))) > 1 or len(set(names_of(others))) > 1
    for one in ones:
        found = (
            index for index, other in enumerate(left) if not named or bool(names_of([one])) == bool(names_of([other]))
        )
        index = next((index for index in found if _same(one, left[index])), None)
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
        differences = [
            complex(value_of(equation.left.tokens, point)) - complex(value_of(equation.right.tokens, point))
            for equation in (one, other)
        ]
        if 0 in differences:
            raise Unreadable("an equation that holds everywhere, or nowhere to be told")
        ratios.append(differences[0] / differences[1])
    return all(abs(ratio - ratios[0]) <= 1e-9 * abs(ratios[0]) for ratio in ratios)


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
        if after_value and (token.kind == "text" or short or token.text in ("%", "\u00a2", *CURRENCIES)):
            return tokens[:index], tokens[index:]
        if token.text == "^" and "circ" in [t.text for t in tokens[index + 1 : index + 3]]:
            return tokens[:index], tokens[index:]
    return tokens, ()
