"""When two mathematical answers are the same, as a mathematician would sign it. Never raises, always ends soon.

Numbers and expressions are compared by value; sets, lists, intervals and tuples by their parts; equations and
inequalities by what they say; everything else as text. docs/rewards.md has the rules with examples.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from aepo.agents.rewards.arithmetic import Number, Unreadable, same_number
from aepo.agents.rewards.expressions import POINTS, value_of, variables
from aepo.agents.rewards.latex import FUNCTIONS, Token, tokens_of
from aepo.agents.rewards.text import same_text
from aepo.agents.rewards.units import CURRENCIES, SHORT, unit_of

MAX_CHARS = 1000  # longer answers are compared as text
MAX_PARTS = 64

_OPENING = {"(": ")", "[": "]", "\\{": "\\}", "{": "}"}
_CLOSING = frozenset(_OPENING.values())
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "="}
_WORDS = ("or", "and")  # that separate answers
_WORD = re.compile(r"[^\W\d_]+")
_INFINITY = Token("name", "infty")


@dataclass(frozen=True, slots=True)
class Expression:
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """kind: set, union, all or any of what is said, tuple, or the brackets of an interval. of: which variable's."""

    kind: str
    items: tuple[Answer, ...]
    of: str = ""


@dataclass(frozen=True, slots=True)
class Equation:
    left: Expression
    right: Expression


Answer = Expression | Parts | Equation


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
    if all(_WORD.fullmatch(text.strip()) for text in (given, answer)):
        return same_text(given, answer)  # act and cat, which could also be products
    try:
        return _same(_read(one), _read(other))
    except (Unreadable, ArithmeticError, RecursionError):
        return False


def _in_words(tokens: Sequence[Token]) -> bool:
    """An answer that is no formula: words, or one letter, perhaps in brackets."""
    said = [token for token in tokens if token.text not in ("(", ")", "{", "}")]
    if len(said) == 1:
        return said[0].kind in ("text", "name")
    words = all(token.kind in ("text", "name") or token.text in (",", "-", "'", ":", "?", "!") for token in said)
    return words and any(token.kind == "text" and token.text not in _WORDS for token in said)


# Reading: what is loosest comes first.


def _read(tokens: tuple[Token, ...]) -> Answer:
    tokens = _without_outer_brackets(tokens)
    if len(unions := _split(tokens, ("cup",))) > 1:
        return Parts("union", tuple(map(_read, unions)))
    if len(items := _split(tokens, (",", ";", *_WORDS))) > 1:
        parts = tuple(part for item in items if item for part in _flat(_read(item)))
        said = [word for word in _WORDS if len(_split(tokens, (word,))) > 1]
        limits = any(isinstance(part, Parts) and part.of for part in parts)
        return _joined(parts, said) if said and limits else Parts("set", parts)
    if tokens[:1] and len(inside := _split(tokens, ("in",))) == 2 and len(inside[0]) <= 4:
        return _of(_read(inside[1]), inside[0])  # x in (2, 3)
    if any(_split_relations(tokens)[1]):
        return _relation(*_split_relations(tokens))
    if (bracketed := _bracketed(tokens)) is not None:
        return bracketed
    if any(token.text in ("pm", "mp") for token in tokens):
        return _both_signs(tokens)
    return Expression(tokens)


def _joined(parts: tuple[Answer, ...], said: list[str]) -> Parts:
    """Conditions: x < 3 or x > 5 is a union, x > 1 and x < 3 an interval."""
    if len(said) > 1:
        raise Unreadable("both and and or")
    same = len({part.of if isinstance(part, Parts) else "" for part in parts}) == 1
    if said == ["or"]:
        return Parts("union" if same else "any", parts)
    intervals = [part for part in parts if isinstance(part, Parts) and part.kind[0] in "([" and len(part.items) == 2]
    if not same or len(intervals) != 2 or len(parts) != 2:
        return Parts("all", parts)
    low, high = sorted(intervals, key=lambda part: _endless(part.items[0]))
    if _endless(low.items[0]) or not _endless(low.items[1]) or not _endless(high.items[0]) or _endless(high.items[1]):
        raise Unreadable("not a lower and an upper limit")
    return _ordered(Parts(low.kind[0] + high.kind[1], (low.items[0], high.items[1]), low.of))


def _endless(limit: Answer) -> bool:
    return isinstance(limit, Expression) and limit.tokens[-1:] == (_INFINITY,) and len(limit.tokens) <= 2


def _ordered(interval: Parts) -> Parts:
    """2 < x < 1 holds for nothing."""
    limits = [item.tokens for item in interval.items if isinstance(item, Expression)]
    if all(map(_constant, limits)):
        low, high = (complex(value_of(limit)) for limit in limits)
        if low.imag or high.imag or not low.real < high.real:
            raise Unreadable("an empty interval")
    return interval


def _of(answer: Answer, name: Sequence[Token]) -> Answer:
    """The same answer, which is about that variable."""
    if not isinstance(answer, Parts):
        raise Unreadable("in nothing that has members")
    return replace(answer, of="".join(token.text for token in name))


def _flat(answer: Answer) -> tuple[Answer, ...]:
    return answer.items if isinstance(answer, Parts) and answer.kind == "set" else (answer,)


def _without_outer_brackets(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
    """Parentheses and LaTeX groups around everything, unless they hold parts."""
    while len(tokens) > 2 and tokens[0].text in ("(", "{") and _closes(tokens) and not _has_commas(tokens[1:-1]):
        tokens = tokens[1:-1]
    return tokens


def _has_commas(tokens: Sequence[Token]) -> bool:
    return len(_split(tokens, (",",))) > 1


def _closes(tokens: Sequence[Token]) -> bool:
    """The first bracket is closed by the last token. An interval's may be of another kind."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _split(tokens: Sequence[Token], signs: Sequence[str]) -> list[tuple[Token, ...]]:
    """At those outside of brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if depth == 0 and token.text in signs and (token.kind == "sign" or token.text in _WORDS):
            parts.append([])
        else:
            parts[-1].append(token)
    if len(parts) > MAX_PARTS:
        raise Unreadable("too many parts")
    return [tuple(part) for part in parts]


def _split_relations(tokens: tuple[Token, ...]) -> tuple[list[tuple[Token, ...]], list[str]]:
    signs = []
    depth = 0
    for token in tokens:
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if depth == 0 and token.text in _FLIPPED:
            signs.append(token.text)
    return _split(tokens, tuple(_FLIPPED)), signs


def _bracketed(tokens: tuple[Token, ...]) -> Parts | None:
    """A tuple, an interval or a set."""
    if len(tokens) < 3 or tokens[0].text not in _OPENING or not _closes(tokens):
        return None
    kind = f"{tokens[0].text}{tokens[-1].text}".replace("\\", "")
    items = [part for part in _split(tokens[1:-1], (",", ";")) if part]
    if kind == "{}":
        return Parts("set", tuple(map(_read, items)))
    if len(items) < 2 and not _has_commas(tokens[1:-1]):
        return None
    return Parts(kind if len(items) == 2 else "tuple", tuple(map(_read, items)))


def _both_signs(tokens: tuple[Token, ...]) -> Parts:
    upper = tuple(Token("sign", {"pm": "+", "mp": "-"}.get(t.text, t.text)) if t.kind == "sign" else t for t in tokens)
    lower = tuple(Token("sign", {"pm": "-", "mp": "+"}.get(t.text, t.text)) if t.kind == "sign" else t for t in tokens)
    return Parts("set", (Expression(upper), Expression(lower)))


def _relation(sides: list[tuple[Token, ...]], signs: list[str]) -> Answer:
    if not all(sides):
        raise Unreadable("a relation needs two sides")
    if set(signs) == {"="}:
        if len(sides) > 2 and _constant(sides[-1]):
            for side in filter(_constant, sides[1:-1]):
                if not _same_expression(Expression(side), Expression(sides[-1])):
                    raise Unreadable("two values")
            return Equation(Expression(sides[0]), Expression(sides[-1]))
        if len(sides) == 2:
            right = _read(sides[1])
            if isinstance(right, Parts) and (_is_name(sides[0]) or _are_names(sides[0])):
                return _of(right, sides[0])  # x = 2, 3 or a point
            swap = _is_name(sides[1]) and not _is_name(sides[0])
            left, right_side = (sides[1], sides[0]) if swap else (sides[0], sides[1])
            return Equation(Expression(left), Expression(right_side))
        raise Unreadable("several equations in one")
    return _interval(sides, signs)


def _interval(sides: list[tuple[Token, ...]], signs: list[str]) -> Parts:
    """x > 2, or 2 < x <= 3, as the numbers that it allows."""
    if len(sides) == 2 and _is_name(sides[1]):
        sides, signs = sides[::-1], [_FLIPPED[signs[0]]]
    if len(sides) == 2 and _is_name(sides[0]):
        low, high = ((Token("sign", "-"), _INFINITY), sides[1]) if signs[0] in ("<", "<=") else (sides[1], (_INFINITY,))
        closed_low, closed_high = signs[0] == ">=", signs[0] == "<="
    elif len(sides) == 3 and _is_name(sides[1]) and {sign[0] for sign in signs} in ({"<"}, {">"}):
        if signs[0][0] == ">":
            sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
        low, high = sides[0], sides[2]
        closed_low, closed_high = signs[0] == "<=", signs[1] == "<="
    else:
        raise Unreadable("an inequality of more than a variable and its limits")
    kind = ("[" if closed_low else "(") + ("]" if closed_high else ")")
    name = sides[0] if len(sides) == 2 else sides[1]
    return Parts(kind, (Expression(low), Expression(high)), "".join(token.text for token in name))


def _is_name(tokens: Sequence[Token]) -> bool:
    """A variable, perhaps with an index, or a function of one: x, x_1, f(x)."""
    if not tokens or tokens[0].kind != "name" or tokens[0].text in FUNCTIONS or not variables(tokens[:1]):
        return False
    return len(tokens) == 1 or tokens[1].text == "_" or (tokens[1].text == "(" and tokens[-1].text == ")")


def _are_names(tokens: Sequence[Token]) -> bool:
    """(x, y), in the order in which a point's coordinates are given."""
    names = [token.text for token in tokens[1:-1:2]]
    if [token.text for token in tokens] != ["(", *",".join(names), ")"] or not all(map(str.isalpha, names)):
        return False
    return names == sorted(names)


def _constant(tokens: Sequence[Token]) -> bool:
    return not variables(tokens)


# Comparing.


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
    named = len(_names(ones)) > 1 or len(_names(others)) > 1
    for one in ones:
        found = (index for index, other in enumerate(left) if not named or bool(_names([one])) == bool(_names([other])))
        index = next((index for index in found if _same(one, left[index])), None)
        if index is None:
            return False
        del left[index]
    return True


def _names(answers: Sequence[Answer]) -> set[str]:
    """The variables that the parts are about."""
    equations = {"".join(t.text for t in part.left.tokens) for part in answers if isinstance(part, Equation)}
    return equations | {part.of for part in answers if isinstance(part, Parts) and part.of}


def _same_equation(one: Answer, other: Answer) -> bool:
    """`x = 3` is 3, unless the other one names another variable; other equations have the same solutions."""
    if isinstance(one, Equation) and isinstance(other, Equation):
        if one.left == other.left and _same_expression(one.right, other.right):
            return True
        return _proportional(one, other)
    equation, value = (one, other) if isinstance(one, Equation) else (other, one)
    assert isinstance(equation, Equation)
    if isinstance(value, Parts) and value.of and not _names([equation]) <= {value.of}:
        return False
    if _is_name(equation.left.tokens) or _true(equation):
        return _same(equation.right, value)
    return False


def _true(equation: Equation) -> bool:
    """2 + 2 = 4."""
    return _constant(equation.left.tokens) and _same_expression(equation.left, equation.right)


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
