"""Arithmetic that is exact on fractions, floating point elsewhere, and never takes long."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from fractions import Fraction

Number = Fraction | complex  # a Fraction is exact
MAX_BITS = 20_000  # of a fraction

_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "ln": cmath.log,
    "log": cmath.log10,
}


class Unreadable(ValueError):
    """Not an expression, not one with a value, or too large."""


def same_number(one: Number, other: Number) -> bool:
    """Exact numbers must be the same; others may differ by what floating point loses."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    try:
        return cmath.isclose(_floating(one), _floating(other), rel_tol=1e-12)
    except (OverflowError, Unreadable):
        return False


def number_of(text: str) -> Fraction:
    """Decimal, perhaps with an exponent."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_BITS // 4 or len(exponent) > 4:
        raise Unreadable("too many digits")
    return _bounded(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise Unreadable("too large a number")
    return value


def _floating(value: Number) -> complex:
    """Below 1e-290 little is left of a number: e^{-740} would be e^{-740.001}, and e^{-1000} zero."""
    result = complex(value)
    if value and abs(result) < 1e-290:
        raise Unreadable("too small a number")
    return result


def _not_lost(result: complex, *factors: Number) -> complex:
    if not result and all(factors):
        raise Unreadable("too small a number")
    return result


def add(one: Number, other: Number) -> Number:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _bounded(one + other)
    left, right = _floating(one), _floating(other)
    small, large = sorted((abs(left), abs(right)))
    if 0 < small < 1e-10 * large < math.inf:
        raise Unreadable("a term that is lost in rounding")  # 1 + e^{-40} is not 1
    return _rounded(left + right, large)


def _rounded(value: complex, size: float) -> complex:
    """Zero where nothing is left but the rounding of numbers of that size: sin(pi) is 0, and e^{-50} is not."""
    return 0j if abs(value) <= 1e-14 * size < math.inf else value


def multiply(one: Number, other: Number) -> Number:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _bounded(one * other)
    if one == -1:
        return -_floating(other)  # of infinity, too
    return _not_lost(_floating(one) * _floating(other), one, other)


def divide(one: Number, other: Number) -> Number:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return _bounded(one / other)
    return _not_lost(_floating(one) / _floating(other), one)


def raised(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length(), 1)
            if bits * abs(exponent) > MAX_BITS and base not in (0, 1, -1):
                raise Unreadable("too large a power")
            whole = int(exponent)
            return base ** (whole if abs(whole) < MAX_BITS else (2 + whole % 2) * (1 if whole > 0 else -1))
        if exponent.denominator <= 1000 and base > 0:
            return raised(root_of(base, exponent.denominator), Fraction(exponent.numerator))
    return _not_lost(_floating(base) ** _size(exponent), base)


def _size(argument: Number) -> complex:
    """What a function or a power is taken of: near zero they differ from their limit by less than rounding."""
    result = _floating(argument)
    if argument and abs(result) < 1e-5:  # the cosine of 1e-6 is 1 - 5e-13
        raise Unreadable("too small an argument")
    return result


def root_of(value: Number, degree: int) -> Number:
    """Exact where it is rational; the real one of a negative number where the degree is odd."""
    if isinstance(value, Fraction):
        if value < 0 and degree % 2:
            return multiply(Fraction(-1), root_of(-value, degree))
        if value >= 0:
            top, bottom = _whole_root(value.numerator, degree), _whole_root(value.denominator, degree)
            if top is not None and bottom is not None:
                return Fraction(top, bottom)
    value = _floating(value)
    return cmath.sqrt(value) if degree == 2 else value ** (1 / degree)


def _whole_root(number: int, degree: int) -> int | None:
    if degree == 2:
        guess = math.isqrt(number)
    elif number.bit_length() > 1000:
        return None
    else:
        guess = round(number ** (1 / degree))
    return guess if guess**degree == number else None


def apply(name: str, value: Number, root: Fraction, base: Number | None) -> Number:
    if name == "sqrt":
        return root_of(value, int(root))
    if name == "abs":
        return absolute(value)
    if base is not None:
        return cmath.log(value) / cmath.log(base)
    if name in ("ln", "log"):
        return _FUNCTIONS[name](_floating(value))
    value = _size(value)
    if name == "exp":
        return _not_lost(cmath.exp(value))
    if 1e6 < abs(value) < math.inf:
        raise Unreadable("too large an angle")  # sin(10^{16}) has no digit that is sure
    result = _FUNCTIONS[name](value)
    if name in ("sin", "cos", "tan", "cot", "sec", "csc"):
        if abs(result) > 1e14:
            raise Unreadable("a pole")
        return _rounded(result, abs(value))
    return result


def absolute(value: Number) -> Number:
    return abs(value) if isinstance(value, Fraction) else complex(abs(value))


def factorial(value: Number) -> Fraction:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 1000:
        raise Unreadable("a factorial of something else than a small integer")
    return Fraction(math.factorial(int(value)))


def binomial(top: Number, bottom: Number) -> Fraction:
    for value in (top, bottom):
        if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 1000:
            raise Unreadable("a binomial of something else than small integers")
    assert isinstance(top, Fraction)
    assert isinstance(bottom, Fraction)
    return Fraction(math.comb(int(top), int(bottom)))
