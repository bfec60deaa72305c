"""The value of a mathematical expression, exact where it is rational. Nothing of the text is ever run.

Variables get fixed numbers: two expressions that agree at several points are the same. All work is bounded: long
texts, deep brackets and large numbers are refused.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from fractions import Fraction

from aepo.agents.rewards.arithmetic import (
    Number,
    Unreadable,
    absolute,
    add,
    apply,
    binomial,
    divide,
    factorial,
    multiply,
    number_of,
    raised,
)
from aepo.agents.rewards.latex import FUNCTIONS, Token

MAX_DEPTH = 40
POINTS = 5  # numbers that each variable is tried with: small ones, and two larger than 20, of which one is negative

_OPENING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_DERIVATIVE = re.compile(r"frac\{?d[^}]*\}?\{d[^\W\d]|d[^\W\d]?/d[^\W\d]")  # not d times something
_APPLIED = frozenset("fghFGHP")  # functions, where a bracket follows; or factors
_ARC = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_CONSTANTS: dict[str, Number] = {
    "pi": complex(math.pi),
    "e": complex(math.e),
    "i": 1j,
    "infty": complex(math.inf),
}


def value_of(tokens: Sequence[Token], point: int = 0) -> Number:
    """With the numbers of that point for the variables. Unreadable."""
    if _DERIVATIVE.search("".join(token.text for token in tokens)):
        raise Unreadable("a derivative")
    reader = _Reader(tokens, point)
    try:
        value = reader.sum()
    except (ArithmeticError, ValueError) as error:  # a pole, an overflow, a logarithm of zero
        raise Unreadable(str(error)) from None
    if reader.next is not None:
        raise Unreadable(f"{reader.next.text!r} is left over")
    if reader.long and not isinstance(value, Fraction):
        raise Unreadable("more digits than are compared")  # \sqrt{10^{15}+1} is not \sqrt{10^{15}+2}
    return value


def variables(tokens: Sequence[Token]) -> set[str]:
    return {t.text for t in tokens if t.kind == "name" and t.text not in _CONSTANTS and t.text not in FUNCTIONS}


def _is_long(value: Number) -> bool:
    return isinstance(value, Fraction) and any(
        part > 10**12 and part // math.gcd(part, 10**30) > 10**12 for part in (abs(value.numerator), value.denominator)
    )


class _Reader:
    """Evaluates while it reads, from loose to tight: sum, product, sign, power, postfix, atom."""

    def __init__(self, tokens: Sequence[Token], point: int) -> None:
        self._tokens = list(tokens)
        self._at = 0
        self._depth = 0
        self._point = point
        self._in_bars = 0
        self.long = False  # a rational number in it has more than 12 digits that are not zeros at the end

    @property
    def next(self) -> Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _is(self, *signs: str) -> bool:
        token = self.next
        return token is not None and token.kind == "sign" and token.text in signs

    def _take(self) -> Token:
        if self.next is None:
            raise Unreadable("it ends too early")
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, sign: str) -> None:
        if not self._is(sign):
            raise Unreadable(f"expected {sign!r}")
        self._at += 1

    def sum(self) -> Number:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("too many brackets")
        total = self._product()
        while self._is("+", "-"):
            sign = self._take().text
            term = self._product()
            total = add(total, term if sign == "+" else multiply(Fraction(-1), term))
            if _is_long(total) and not variables(self._tokens):
                self.long = True
        self._depth -= 1
        return total

    def _product(self) -> Number:
        product = self._signed()
        while True:
            if self._is("*"):
                self._take()
                product = multiply(product, self._signed())
            elif self._is("/"):
                self._take()
                product = divide(product, self._signed())
            elif self._is("%"):  # of all before it: 1/2% is 0.005
                self._take()
                product = divide(product, Fraction(100))
            elif self._begins_factor():
                product = multiply(product, self._power())
            else:
                return product

    def _begins_factor(self) -> bool:
        """A factor without a sign before it: a variable, a function, a bracket, a fraction; never a number."""
        if self.next is None:
            return False
        return (
            self.next.kind == "name"
            or self._is("(", "[", "frac", "binom")
            or (self._is("{") and not self._group_of_digits())
            or (self._is("|") and not self._in_bars)
        )

    def _group_of_digits(self) -> bool:
        """{5}{6} is printed as 56."""
        return any(token.kind == "number" for token in self._tokens[self._at + 1 : self._at + 2])

    def _signed(self) -> Number:
        negative = False
        while self._is("+", "-"):
            negative ^= self._take().text == "-"
        value = self._power()
        return multiply(Fraction(-1), value) if negative else value

    def _power(self) -> Number:
        first = self.next
        base = self._postfix()
        if not self._is("^"):
            return base
        self._take()
        exponent = self._exponent()
        if exponent == -1 and first is not None and first.kind == "name" and self._inverse(first.text):
            raise Unreadable("an inverse function or matrix")
        return raised(base, exponent)

    def _inverse(self, name: str) -> bool:
        """f^{-1}(x), or A^{-1}B, whose factors have an order."""
        if name in _APPLIED and self._is("("):
            return True
        neighbours = (token for token in self._tokens if token.kind == "name" and token.text != name)
        return name.isupper() and any(token.text.isupper() for token in neighbours)

    def _exponent(self) -> Number:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("too many powers")
        value = self._signed()
        self._depth -= 1
        return value

    def _postfix(self) -> Number:
        value = self._atom()
        while self.next is not None:
            if self._is("!"):
                self._take()
                if self._is("!"):
                    raise Unreadable("a double factorial")
                value = factorial(value)
            elif self._is("^") and self._circle():
                value = multiply(value, complex(math.pi / 180))
            else:
                break
        return value

    def _circle(self) -> bool:
        """^\\circ or ^{\\circ}, which is taken."""
        texts = [token.text for token in self._tokens[self._at : self._at + 4]]
        for form in (["^", "circ"], ["^", "{", "circ", "}"]):
            if texts[: len(form)] == form:
                self._at += len(form)
                return True
        return False

    def _atom(self) -> Number:
        token = self._take()
        if token.kind == "number":
            number = number_of(token.text)
            self.long |= _is_long(number)
            return self._mixed(number)
        if token.kind == "name":
            return self._function(token.text) if token.text in FUNCTIONS else self._variable(token.text)
        if token.text in _OPENING:
            value = self.sum()
            self._expect(_OPENING[token.text])
            return value
        if token.text == "|" and not self._in_bars:
            self._in_bars += 1
            value = self.sum()
            self._in_bars -= 1
            self._expect("|")
            return absolute(value)
        if token.text in ("frac", "binom"):
            top, bottom = self._argument(), self._argument()
            return divide(top, bottom) if token.text == "frac" else binomial(top, bottom)
        raise Unreadable(f"{token.text!r} is not expected")

    def _mixed(self, whole: Fraction) -> Number:
        """One and a half, written 1 1/2, 1\\frac{1}{2} or 1\\frac12; but an exponent is a number alone."""
        before = self._at - 2
        while before >= 0 and self._tokens[before].text in ("+", "-"):
            before -= 1
        if whole.denominator != 1 or self.next is None or (before >= 0 and self._tokens[before].text == "^"):
            return whole
        start = self._at
        kinds = [token.kind for token in self._tokens[start : start + 3]]
        texts = [token.text for token in self._tokens[start : start + 3]]
        if self._is("frac"):
            self._take()
            top, bottom = self._digits(), self._digits()
        elif kinds == ["number", "sign", "number"] and texts[1] == "/" and self.next.spaced:
            self._at += 3
            top, bottom = (int(text) if text.isdecimal() else None for text in texts[::2])
        else:
            return whole
        if top is None or bottom is None:
            self._at = start
            return whole
        if not 0 < top < bottom:
            raise Unreadable("neither a mixed number nor surely a product")
        return whole + Fraction(top, bottom)

    def _digits(self) -> int | None:
        """An argument of \\frac that is nothing but digits."""
        texts = [token.text for token in self._tokens[self._at : self._at + 3]]
        if texts[:1] == ["{"] and texts[2:] == ["}"] and texts[1].isdecimal():
            self._at += 3
            return int(texts[1])
        if texts and texts[0].isdecimal():
            return int(self._argument())  # type: ignore[arg-type]  # a Fraction
        return None

    def _variable(self, name: str) -> Number:
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if self._is("_"):
            self._take()
            name += "_" + "".join(token.text for token in self._subscript())
        if name[0] in _APPLIED and self._is("("):
            name += f"({complex(self._atom()):.9g})"  # what it is applied to
        seed = zlib.crc32(f"{name} {self._point}".encode())
        size = Fraction(seed % 1999 + 501, 997)  # between 0.5 and 2.5
        if self._point == 0:
            return size
        # Where it is negative differs between neighbours in the alphabet: |xy| is not xy.
        negative = (1 + sum(name.encode()) % 7) >> min(self._point - 1, 2) & 1
        if self._point >= 3:
            size *= 40  # |x + 3| is not x + 3
            negative ^= self._point == 4
        return -size if negative else size

    def _subscript(self) -> list[Token]:
        if not self._is("{"):
            return [self._take()]
        self._take()
        inside = []
        while not self._is("}"):
            inside.append(self._take())
        self._take()
        return inside

    def _function(self, name: str) -> Number:
        root, base, exponent = Fraction(2), None, None
        if name == "sqrt" and self._is("["):
            self._take()
            degree = self.sum()
            self._expect("]")
            if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 1000:
                raise Unreadable("a root's degree is a small integer")
            root = degree
        if name == "log" and self._is("_"):
            self._take()
            base = self._argument()
        if self._is("^") and name != "sqrt":
            self._take()
            exponent = self._argument()
        if exponent is not None and isinstance(exponent, Fraction) and exponent == -1:
            if name not in _ARC:
                raise Unreadable("an inverse, or a reciprocal")
            name, exponent = _ARC[name], None
        value = apply(name, self._radicand() if name == "sqrt" else self._operand(), root, base)
        return value if exponent is None else raised(value, exponent)

    def _radicand(self) -> Number:
        """\\sqrt2x is x times the root of 2."""
        if self._is(*_OPENING):
            return self._atom()
        number = self.next is not None and self.next.kind == "number"
        value = number_of(self._take().text) if number else self._atom()
        if self._is("^"):
            raise Unreadable("a power under the root or of it")
        return value

    def _operand(self) -> Number:
        """A bracket, or all factors up to the next sign or function: sin 2x."""
        if self._is("(", "{", "["):
            return self._atom()
        value = self._power()
        while self._begins_factor() and self.next is not None and self.next.text not in FUNCTIONS:
            value = multiply(value, self._power())
        return value

    def _argument(self) -> Number:
        """{..}, or one digit or letter, as in \\frac12."""
        token = self.next
        if token is not None and token.kind == "number" and len(token.text) > 1 and token.text.isdecimal():
            self._tokens[self._at] = Token("number", token.text[1:])
            return Fraction(int(token.text[0]))
        if token is not None and token.kind == "number":
            return number_of(self._take().text)  # not the beginning of a mixed number
        return self._signed() if self._is("-", "+") else self._atom()
