"""The units of measurement that an answer may leave out. Any other word beside a number says something."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aepo.agents.rewards.latex import Token

# One name for each, then how else it is written. Letters count as they are (mg is not Mg); words do not.
_TABLE = """
mm millimeter millimetre|cm centimeter centimetre|dm decimeter decimetre|m meter metre|km kilometer kilometre
inch in inches|foot ft feet|yard yd|mile mi
mg milligram|g gram|kg kilogram|ton tonne|pound lb lbs|ounce oz
mL ml milliliter millilitre|cL cl centiliter|dL dl deciliter|L liter litre|gallon gal|cup|quart|pint|acre|hectare
ms millisecond|s sec second|min minute|h hr hrs hour|day|week|month|year yr yrs
mph|J joule|kJ kilojoule|N newton|W watt|kW kilowatt|V volt|K kelvin|Hz hertz|ohm|ampere|pascal|mole
unit|degree|radian rad|dollar $ usd USD|euro \u20ac eur EUR|\u00a3|yen \u00a5|cent \u00a2|% percent
"""
_UNITS = {
    spelling: names.split()[0] for line in _TABLE.split("\n") for names in line.split("|") for spelling in names.split()
}
CURRENCIES = ("$", "\u20ac", "\u00a3", "\u00a5")
SHORT = frozenset(unit for unit in _UNITS if len(unit) == 1 and unit.isalpha())
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_PIECE = re.compile(r"[^\W\d_]+|-?\d+|\S")

Unit = tuple[tuple[str, int], ...]  # names and powers


def unit_of(tokens: Sequence[Token]) -> Unit | None:
    """`m/s^2`, `square feet`, `miles per hour`; None where there is anything else than known units."""
    text = "".join(f" {token.text} " if token.kind == "text" else f" {token.text}" for token in tokens)
    pieces = _PIECE.findall(re.sub(r"\^\s*-\s*(?=\d)", "^ -", re.sub(r"[{}.]", "", text)))
    if pieces[:2] == ["^", "circ"]:
        scale = {"": "degree", "C": "celsius", "F": "fahrenheit"}.get(" ".join(pieces[2:]))
        return ((scale, 1),) if scale else None
    found: dict[str, int] = {}
    divides = False
    while pieces:
        power = _POWERS.get(pieces[0], 0) if len(pieces) > 1 and pieces[0] in ("square", "sq", "cubic", "cu") else 0
        name = _unit_name(pieces[1 if power else 0])
        if name is None:
            return None
        pieces = pieces[2 if power else 1 :]
        if not power:
            power, pieces = _power(pieces)
        found[name] = found.get(name, 0) + (-power if divides else power)
        if not pieces:
            break
        if pieces[0] not in ("/", "per", "*", "-") or len(pieces) == 1 or (divides and pieces[0] != "/"):
            return None
        divides = pieces[0] in ("/", "per")
        pieces = pieces[1:]
    return tuple(sorted(found.items())) or None


def _power(pieces: list[str]) -> tuple[int, list[str]]:
    if pieces[:1] in (["squared"], ["cubed"]):
        return _POWERS[pieces[0]], pieces[1:]
    if len(pieces) > 1 and pieces[0] == "^" and re.fullmatch(r"-?[1-9]", pieces[1]):
        return int(pieces[1]), pieces[2:]
    return 1, pieces


def _unit_name(word: str) -> str | None:
    if word in _UNITS:
        return _UNITS[word]
    lower = word.lower()
    if len(lower) < 4:
        return None
    return _UNITS.get(lower) or (_UNITS.get(lower[:-1]) if lower.endswith("s") else None)
