"""What a mathematical answer says: a value, parts of one kind or another, or an equation. Loosest signs come first."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from aepo.agents.rewards.arithmetic import Unreadable, same_number
from aepo.agents.rewards.expressions import value_of, variables
from aepo.agents.rewards.latex import FUNCTIONS, Token

MAX_PARTS = 64

_OPENING = {"(": ")", "[": "]", "\\{": "\\}", "{": "}"}
_CLOSING = frozenset(_OPENING.values())
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "="}
WORDS = ("or", "and")  # that separate answers
_INFINITY = Token("name", "infty")


@dataclass(frozen=True, slots=True)
class Expression:
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """kind: set, union, all or any of what is said, tuple, or the brackets of an interval. of: which variable's.
    word: what a set's items are listed with, where it is "or" or "and"."""

    kind: str
    items: tuple[Answer, ...]
    of: str = ""
    word: str = ""


@dataclass(frozen=True, slots=True)
class Equation:
    left: Expression
    right: Expression


Answer = Expression | Parts | Equation


def read(tokens: tuple[Token, ...]) -> Answer:
    tokens = _without_outer_brackets(tokens)
    if len(unions := _split(tokens, ("cup",))) > 1:
        return Parts("union", tuple(map(read, unions)))
    items, separators = _listed(tokens)
    if separators:
        parts = tuple(part for item in items for part in _flat(item))
        said = [word for word in WORDS if word in separators]
        names = names_of(parts)
        if len(set(names)) > 1 and (
            ("or" in said and len(set(separators)) > 1) or len(set(names)) < len(names) or len(names) < len(parts)
        ):
            raise Unreadable("which conditions belong together")
        limits = any(isinstance(part, Parts) and part.of for part in parts)
        if said and limits:
            return _joined(parts, said)
        return Parts("any" if said == ["or"] and len(set(names)) > 1 else "set", parts, word="".join(said))
    if len(inside := _split(tokens, ("in",))) == 2 and (is_name(inside[0]) or _are_names(inside[0])):
        return _of(read(inside[1]), inside[0])  # x in (2, 3)
    if relations := _outside(tokens, _FLIPPED):
        return _relation(_split(tokens, tuple(_FLIPPED)), relations)
    if (bracketed := _bracketed(tokens)) is not None:
        return bracketed
    if any(token.text in ("pm", "mp") for token in tokens):
        return _both_signs(tokens)
    return Expression(tokens)


def names_of(answers: Sequence[Answer]) -> list[str]:
    """The variables that the parts are about."""
    equations = ["".join(t.text for t in part.left.tokens) for part in answers if isinstance(part, Equation)]
    return equations + [part.of for part in answers if isinstance(part, Parts) and part.of]


def _joined(parts: tuple[Answer, ...], said: list[str]) -> Parts:
    """Conditions: x < 3 or x > 5 is a union, x > 1 and x < 3 an interval."""
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
    if all(map(is_constant, limits)):
        low, high = (complex(value_of(limit)) for limit in limits)
        if low.imag or high.imag or not low.real < high.real:
            raise Unreadable("an empty interval")
    return interval


def _of(answer: Answer, name: Sequence[Token]) -> Answer:
    """The same answer, which is about that variable."""
    if not isinstance(answer, Parts):
        raise Unreadable("in nothing that has members")
    return replace(answer, of="".join(token.text for token in name))


def _listed(tokens: tuple[Token, ...]) -> tuple[list[tuple[Token, ...]], list[str]]:
    """1, 2, and 3: the items, and what stands between them. A word comes once, at the end, or everywhere."""
    separators = _outside(tokens, (",", ";", *WORDS))
    items = _split(tokens, (",", ";", *WORDS))
    words = [sign in WORDS for sign in separators]
    if len(set(separators)) > 1 and (len({*separators} - {*WORDS}) != 1 or sum(words) != 1 or not words[-1]):
        raise Unreadable("which parts belong together")
    if separators and not items[-1] and not words[-1]:
        items.pop()  # 5,
    if len(items) > 2 and not items[-2] and words[-1]:
        del items[-2]  # , and
    return items, separators


def _flat(item: tuple[Token, ...]) -> tuple[Answer, ...]:
    """The two of a \\pm; but a set in a list is one thing, and so is what is said of a variable."""
    answer = read(item)
    listed = isinstance(answer, Parts) and answer.kind == "set" and not answer.of and item[0].text not in ("\\{", "{")
    return answer.items if listed and isinstance(answer, Parts) else (answer,)


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
        if depth == 0 and token.text in signs and (token.kind == "sign" or token.text in WORDS):
            parts.append([])
        else:
            parts[-1].append(token)
    if len(parts) > MAX_PARTS:
        raise Unreadable("too many parts")
    return [tuple(part) for part in parts]


def _outside(tokens: Sequence[Token], signs: Container[str]) -> list[str]:
    """Those of the signs that are outside of brackets."""
    found = []
    depth = 0
    for token in tokens:
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if depth == 0 and token.text in signs and (token.kind == "sign" or token.text in WORDS):
            found.append(token.text)
    return found


def _bracketed(tokens: tuple[Token, ...]) -> Parts | None:
    """A tuple, an interval or a set."""
    if len(tokens) < 2 or tokens[0].text not in _OPENING or not _closes(tokens):
        return None
    kind = f"{tokens[0].text}{tokens[-1].text}".replace("\\", "")
    items = _split(tokens[1:-1], (",", ";"))
    if not items[-1]:
        items.pop()
    if kind == "{}":
        return Parts("set", tuple(map(read, items)))
    if len(items) < 2 and not _has_commas(tokens[1:-1]):
        return None
    return Parts(kind if len(items) == 2 else "tuple", tuple(map(read, items)))


def _both_signs(tokens: tuple[Token, ...]) -> Parts:
    upper = tuple(Token("sign", {"pm": "+", "mp": "-"}.get(t.text, t.text)) if t.kind == "sign" else t for t in tokens)
    lower = tuple(Token("sign", {"pm": "-", "mp": "+"}.get(t.text, t.text)) if t.kind == "sign" else t for t in tokens)
    return Parts("set", (Expression(upper), Expression(lower)))


def _relation(sides: list[tuple[Token, ...]], signs: list[str]) -> Answer:
    if not all(sides):
        raise Unreadable("a relation needs two sides")
    if set(signs) == {"="}:
        if len(sides) > 2 and is_constant(sides[-1]):
            for side in sides[1:-1]:
                if is_name(side) or (is_constant(side) and not same_number(value_of(side), value_of(sides[-1]))):
                    raise Unreadable("two values, or two variables")
            return Equation(Expression(sides[0]), Expression(sides[-1]))
        if len(sides) == 2:
            right = read(sides[1])
            if isinstance(right, Parts) and (is_name(sides[0]) or _are_names(sides[0])):
                return _of(right, sides[0])  # x = 2, 3 or a point
            swap = is_name(sides[1]) and not is_name(sides[0])
            left, right_side = (sides[1], sides[0]) if swap else (sides[0], sides[1])
            return Equation(Expression(left), Expression(right_side))
        raise Unreadable("several equations in one")
    return _interval(sides, signs)


def _interval(sides: list[tuple[Token, ...]], signs: list[str]) -> Parts:
    """x > 2, or 2 < x <= 3, as the numbers that it allows."""
    if len(sides) == 2 and is_name(sides[1]):
        sides, signs = sides[::-1], [_FLIPPED[signs[0]]]
    if len(sides) == 2 and is_name(sides[0]):
        low, high = ((Token("sign", "-"), _INFINITY), sides[1]) if signs[0] in ("<", "<=") else (sides[1], (_INFINITY,))
        closed_low, closed_high = signs[0] == ">=", signs[0] == "<="
    elif len(sides) == 3 and is_name(sides[1]) and {sign[0] for sign in signs} in ({"<"}, {">"}):
        if signs[0][0] == ">":
            sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
        low, high = sides[0], sides[2]
        closed_low, closed_high = signs[0] == "<=", signs[1] == "<="
    else:
        raise Unreadable("an inequality of more than a variable and its limits")
    kind = ("[" if closed_low else "(") + ("]" if closed_high else ")")
    name = sides[0] if len(sides) == 2 else sides[1]
    return Parts(kind, (Expression(low), Expression(high)), "".join(token.text for token in name))


def is_name(tokens: Sequence[Token]) -> bool:
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


def is_constant(tokens: Sequence[Token]) -> bool:
    return not variables(tokens)
