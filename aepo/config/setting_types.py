"""One setting: its default, help, type and range, the values that fit it, and the line that says why one does not.

Sections are frozen dataclasses whose fields are made by `key`. Types are text, number, integer, bool, Literal, lists of
these, mappings with texts as keys, unions, and Any: whatever YAML can hold. This module imports neither torch nor YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

NOT_INTERPOLATED = "nothing is looked up in settings, neither the environment nor other settings"


def key(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    empty: bool = False,
    instead: Mapping[str, str] = types.MappingProxyType({}),
    expected: str = "",
) -> Any:
    """A setting: default, one line of help, and its range low <= value <= high, above < value < below. `infinite`: inf
    is a value; `empty`: so is the text without letters. `instead` is what to write for well-known names that are no
    values (in small letters, without separators); `expected` is the type in words where annotations cannot say it."""
    metadata: dict[str, Any] = {
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "infinite": infinite,
        "empty": empty,
    }
    metadata |= {"instead": instead, "expected": expected}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Checks every value when an instance is made, from a file or in Python, and gives it the setting's type: 1 is 1.0
    where a number is asked for, a list is a tuple."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for item, hint, expected in _settings(type(self)):  # type: ignore[arg-type]  # mypy looks up the instances' hash
            name, value = f"{self.section}.{item.name}", getattr(self, item.name)
            if left := next((text for text in _texts(value) if "${" in text), None):
                raise ValueError(f"{name}: expected texts without '${{', got {shown(left)}; {NOT_INTERPOLATED}")
            try:
                fitting = _fitted(hint, value, item.metadata)
            except _Misfit:
                meant = _why(value, item.metadata) or _value_suggestion(item, hint, value)
                raise ValueError(f"{name} = {shown(value)}: expected {expected}{meant}") from None
            object.__setattr__(self, item.name, fitting)


@dataclass(frozen=True)
class Key:
    """One setting, as `aepo keys` prints it."""

    name: str  # dotted
    default: Any
    type: Any  # its annotation
    expected: str  # type and range, in words
    help: str


def keys_of(config: type) -> list[Key]:
    """Every dotted key of a dataclass of sections, in their order."""
    return [
        Key(f"{section}.{item.name}", default_of(item), hint, expected, item.metadata["help"])
        for section, kind in typing.get_type_hints(config).items()
        for item, hint, expected in _settings(kind)
    ]


def default_of(item: dataclasses.Field) -> Any:
    """The default of a dataclass field, also where it is made anew for every instance."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a type allows: those of a union, or itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def shown(value: Any) -> str:
    """As Python writes it, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}.. ({len(text)} letters)"


class _Misfit(Exception):
    """Not a value of that type and range."""


_EXACT = 2**53
"""Up to here every integer is a float, so a float like 1e3 says which integer is meant."""


def _fitted(hint: Any, value: Any, limits: Mapping[str, Any]) -> Any:
    """The value in exactly that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for argument in arguments:
            try:
                return _fitted(argument, value, limits)
            except _Misfit:
                continue
    elif hint is Any:
        return _plain(value)
    elif origin is Literal or hint is str:
        if isinstance(value, str) and (value in arguments if arguments else value or limits["empty"]):
            return str.__str__(value)
    elif hint is bool or hint is type(None):
        if isinstance(value, hint):
            return value
    elif hint is int or hint is float:
        number = _number(hint, value)
        if _in_range(number, limits):
            return number
    elif origin is dict:
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return {str.__str__(name): _fitted(arguments[1], part, limits) for name, part in value.items()}
    elif isinstance(value, (list, tuple)):
        kinds = arguments if origin is tuple and ... not in arguments else arguments[:1] * len(value)
        if len(kinds) == len(value):
            return origin(_fitted(kind, part, limits) for kind, part in zip(kinds, value, strict=True))
    raise _Misfit


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not _is_real(value):
        raise _Misfit
    if kind is float:
        try:
            return float(value)
        except OverflowError:
            raise _Misfit from None
    if _is_integer(value) or (abs(value) <= _EXACT and value == int(value)):  # NaN: not <=
        return int(value)
    raise _Misfit


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def _is_integer(value: Any) -> bool:
    """NumPy's, too."""
    return isinstance(value, numbers.Integral)


def _in_range(number: float, limits: Mapping[str, Any]) -> bool:
    """Every comparison is written so that NaN fails it. Integers have 64 bits, in C++ and in most files."""
    return (
        (-(2**63) <= number < 2**63 if isinstance(number, int) else math.isfinite(number) or limits["infinite"])
        and number == number
        and (limits["low"] is None or number >= limits["low"])
        and (limits["high"] is None or number <= limits["high"])
        and (limits["above"] is None or number > limits["above"])
        and (limits["below"] is None or number < limits["below"])
    )


def _plain(value: Any) -> Any:
    """What YAML can hold and give back as it was: null, true and false, numbers, texts, lists, mappings."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if _is_integer(value) and -(2**63) <= value < 2**63:
        return int(value)
    if _is_real(value) and not _is_integer(value) and value == value:
        return float(value)
    if isinstance(value, Mapping):
        if any(isinstance(name, bool) or not (isinstance(name, str) or _is_integer(name)) for name in value):
            raise _Misfit
        if len({str(name) for name in value}) < len(value):  # 1 and "1" are one name in JSON
            raise _Misfit
        return {_plain(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    raise _Misfit


def _texts(value: Any) -> Iterator[str]:
    """All in it, names of mappings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


@functools.cache
def _settings(section: type[Section]) -> list[tuple[dataclasses.Field, Any, str]]:
    """The fields of a section, each with its type, and with its type and range in words."""
    hints, settings = typing.get_type_hints(section), []
    for item in dataclasses.fields(section):
        limits = item.metadata
        bounds = " and ".join(f"{sign} {limits[name]}" for name, sign in _SIGNS.items() if limits[name] is not None)
        words = limits["expected"] or _type_in_words(hints[item.name], limits["infinite"])
        settings.append((item, hints[item.name], f"{words} {bounds}".rstrip()))
    return settings


_SIGNS = {"above": ">", "low": ">=", "high": "<=", "below": "<"}
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null", Any: "any"}


def _type_in_words(hint: Any, infinite: bool) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(arguments)
    if typing.get_origin(hint) is tuple:
        if ... in arguments:
            return f"a list, each {_type_in_words(arguments[0], infinite)}"
        return f"a list of {len(arguments)} numbers"
    if typing.get_origin(hint) is dict:
        return "keys with texts" if arguments[1] is str else "keys with values"
    if alternatives(hint) != (hint,):
        return " or ".join(_type_in_words(argument, infinite) for argument in arguments)
    return "a number or inf" if hint is float and infinite else _WORDS[hint]


def suggestion(name: str, known: Sequence[str]) -> str:
    """The nearest key; a right name in the wrong section counts as near."""
    tail = name.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == tail] or difflib.get_close_matches(name, known, 1, 0.5)
    return f": did you mean {' or '.join(repr(k) for k in near)}?" if near else ""


def _why(value: Any, limits: Mapping[str, Any]) -> str:
    """What the type and the range do not say."""
    if value == "":
        return ", not an empty one"
    if isinstance(value, float) and not math.isfinite(value) and not limits["infinite"]:
        return ", a finite one"
    return ", of 64 bits" if isinstance(value, int) and not -(2**63) <= value < 2**63 else ""


def _value_suggestion(item: dataclasses.Field, hint: Any, value: Any) -> str:
    """The choice that was meant, or what to write where it is known but none."""
    literals = [part for part in alternatives(hint) if typing.get_origin(part) is Literal]
    choices = {_letters(choice): choice for part in literals for choice in typing.get_args(part)}
    instead = item.metadata["instead"]
    plain, known = _letters(str(value)), [*choices, *instead]
    swapped = [one for one in known if sorted(one) == sorted(plain)]  # gpro: difflib would say gspo
    near = swapped or difflib.get_close_matches(plain, known, 1, 0.6)
    if not near:
        return ""
    return f". {instead[near[0]]}" if near[0] in instead else f": did you mean {choices[near[0]]!r}?"


def _letters(name: str) -> str:
    """Dr. GRPO and dr_grpo are drgrpo, reinforce_plus_plus is reinforce++."""
    return re.sub(r"[^a-z0-9+]", "", name.lower().replace("plus", "+"))
