"""Checks the arguments that a model wrote against a tool's JSON schema, and repairs what is only written differently.

Of JSON schema it knows type, nullable, enum, const, properties, required, additionalProperties, items, prefixItems,
anyOf, oneOf, allOf and $ref within the schema. What it does not know, or what a schema says in another form than it
should, it does not check: the tool will.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Schema = Any  # a mapping in a proper schema; anything else allows everything
ALTERNATIVES = ("anyOf", "oneOf")
SHOWN_CHARS = 60  # of a value, in a problem


class ArgumentError(ValueError):
    """What is wrong with the arguments, in words that a model can act on."""


def fitted(arguments: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the schema wants them; `ArgumentError` names everything that is missing, unknown or wrong.

    Harmless repairs are made where a value does not fit as it is: "3" for an integer, 3.0 for 3, "true" for a boolean,
    a number for a text, the JSON text of a list or an object. A null for an optional parameter is left out.
    """
    if not isinstance(arguments, Mapping):
        raise ArgumentError(f"the arguments must be an object, got {_shown(arguments)}")
    try:
        return _Check(schema).call(arguments)
    except RecursionError:
        raise ArgumentError("the arguments are nested too deeply") from None


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is what the schema wants, as it is."""
    try:
        _Check(schema).value(value, schema, "", repair=False)
    except _Mismatch:
        return False
    return True


class _Mismatch(Exception):
    """A value that does not fit: where in the arguments, and what it should be."""

    def __init__(self, place: str, expected: str, value: Any) -> None:
        super().__init__(f"{place} must be {expected}, got {_shown(value)}")


class _Check:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def call(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        schema = self._resolved(self._root)
        others = schema.get(
            "additionalProperties", "properties" not in schema
        )  # unlike in JSON schema: typos are errors
        properties = _mapping(schema.get("properties"))
        required = _names(schema.get("required"))
        problems = [f"{name} is missing" for name in required if name not in arguments]
        fit = {}
        for name, value in arguments.items():
            if name not in properties and name not in required and not others:
                problems.append(f"there is no {name!r}")
                continue
            try:
                fit[name] = self._repairing(value, properties.get(name, others), name)
            except _Mismatch as mismatch:
                if value is not None or name in required:
                    problems.append(str(mismatch))
        if problems:
            takes = ", ".join(self._parameter(name, schema, name in required) for name, schema in properties.items())
            raise ArgumentError(f"{'; '.join(problems)}; the arguments are: {takes or 'none'}")
        return fit

    def _repairing(self, value: Any, schema: Schema, place: str) -> Any:
        """As it is where it fits, else repaired; `_Mismatch` where neither works."""
        try:
            return self.value(value, schema, place, repair=False)
        except _Mismatch:
            return self.value(value, schema, place, repair=True)

    def value(self, value: Any, schema: Schema, place: str, repair: bool) -> Any:
        schema = self._resolved(schema)
        if value is None and schema.get("nullable") is True:
            return None
        types = _types(schema)
        if types:
            value = self._of_type(value, types, schema, place, repair)
        choices = _choices(schema)
        if choices is not None:
            value = self._of_choices(value, choices, place, repair)
        for keyword in ALTERNATIVES:
            if alternatives := _list(schema.get(keyword)):
                value = self._alternative(value, schema, alternatives, place, repair)
        for part in _list(schema.get("allOf")):
            value = self.value(value, part, place, repair)
        if isinstance(value, Mapping):
            return self._object(value, schema, place, repair)
        return self._array(value, schema, place, repair) if isinstance(value, list) else value

    def _of_type(self, value: Any, types: Sequence[str], schema: Schema, place: str, repair: bool) -> Any:
        if any(_is(value, name) for name in types):
            return value
        for name in types if repair else ():
            repaired = _repaired(value, name)
            if _is(repaired, name):
                return repaired
        raise _Mismatch(place, self._words(schema), value)

    def _of_choices(self, value: Any, choices: Sequence[Any], place: str, repair: bool) -> Any:
        for choice in choices:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return value
        for choice in choices if repair else ():
            if isinstance(value, str) and value.strip() == str(choice):
                return choice
        raise _Mismatch(place, _one_of(choices), value)

    def _alternative(self, value: Any, schema: Schema, alternatives: Sequence[Any], place: str, repair: bool) -> Any:
        mismatches = []
        for alternative in alternatives:
            try:
                return self.value(value, alternative, place, repair)
            except _Mismatch as mismatch:
                if value is None or _types(self._resolved(alternative)) != ["null"]:
                    mismatches.append(mismatch)
        if len(mismatches) == 1:  # "a list, or null": what is wrong in the list says more
            raise mismatches[0]
        raise _Mismatch(place, self._words(schema), value)

    def _object(self, value: Mapping[str, Any], schema: Schema, place: str, repair: bool) -> dict[str, Any]:
        properties = _mapping(schema.get("properties"))
        others = schema.get("additionalProperties", True)
        for name in _names(schema.get("required")):
            if name not in value:
                raise _Mismatch(place, f"an object with {name!r}", value)
        for name in value:
            if name not in properties and others is False:
                raise _Mismatch(place, f"an object of {', '.join(properties) or 'nothing'}", value)
        return {
            name: self.value(each, properties.get(name, others), f"{place}.{name}", repair)
            for name, each in value.items()
        }

    def _array(self, value: list[Any], schema: Schema, place: str, repair: bool) -> list[Any]:
        first = _list(schema.get("prefixItems"))
        # Unlike in JSON schema, prefixItems alone says how many: so the tuples of Python are written.
        least = _count(schema.get("minItems"), len(first))
        most = _count(schema.get("maxItems"), len(first) if first and "items" not in schema else len(value))
        if least > len(value):
            raise _Mismatch(place, f"a list of at least {least}", value)
        if most < len(value):
            raise _Mismatch(place, f"a list of at most {most}", value)
        return [
            self.value(each, first[i] if i < len(first) else schema.get("items"), f"{place}[{i}]", repair)
            for i, each in enumerate(value)
        ]

    def _resolved(self, schema: Schema) -> Mapping[str, Any]:
        """The schema that a $ref stands for; one that leads nowhere allows everything."""
        for _ in range(20):
            if not isinstance(schema, Mapping):
                return {}
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            schema = self._root if reference.startswith("#") else None
            for step in reference[2:].split("/") if len(reference) > 2 else ():
                schema = schema.get(step) if isinstance(schema, Mapping) else None
        return {}

    def _parameter(self, name: str, schema: Schema, required: bool) -> str:
        words = self._words(schema)
        return f"{name} ({words})" if required else f"{name} ({words}, optional)"

    def _words(self, schema: Schema) -> str:
        """What a schema asks for, as one would say it."""
        schema = self._resolved(schema)
        choices = _choices(schema)
        if choices is not None:
            return _one_of(choices)
        alternatives = [each for keyword in ALTERNATIVES for each in _list(schema.get(keyword))]
        of_alternatives = [words for each in alternatives for words in self._words(each).split(" or ")]
        words = [WORDS.get(name, name) for name in _types(schema)] or of_alternatives
        if schema.get("nullable") is True:
            words.append(WORDS["null"])
        return " or ".join(dict.fromkeys(words)) or "anything"


WORDS = {
    "string": "a text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (Mapping,),
    "null": (type(None),),
}


def _types(schema: Schema) -> list[str]:
    given = schema.get("type")
    return [given] if isinstance(given, str) else _names(given)


def _choices(schema: Schema) -> Sequence[Any] | None:
    """None: any value may be chosen."""
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    return choices if isinstance(choices, list | tuple) else None


def _list(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else ()


def _names(given: Any) -> list[str]:
    return [name for name in _list(given) if isinstance(name, str)]


def _mapping(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def _count(given: Any, otherwise: int) -> int:
    return given if isinstance(given, int) and not isinstance(given, bool) else otherwise


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool) and name != "boolean":
        return name not in KINDS
    if name == "number" and isinstance(value, float):
        return math.isfinite(value)
    return name not in KINDS or isinstance(value, KINDS[name])  # a type that we do not know: the tool will


def _repaired(value: Any, name: str) -> Any:
    """The value as it should have been written, or as it came."""
    if name == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    if name == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and name not in ("string", "null"):
        try:
            read = json.loads(value.strip().lower() if name == "boolean" else value)
        except ValueError:
            return value
        return _repaired(read, name) if name == "integer" and isinstance(read, float) else read
    return value


def _one_of(choices: Sequence[Any]) -> str:
    said = ", ".join(json.dumps(choice, ensure_ascii=False, default=str) for choice in choices)
    return said if len(choices) == 1 else f"one of {said}"


def _shown(value: Any) -> str:
    if isinstance(value, str | list | tuple):
        value = value[:SHOWN_CHARS]  # before it is copied
    elif isinstance(value, Mapping):
        value = dict(list(value.items())[:SHOWN_CHARS])
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + ".."
