"""Type hints as JSON schemas, and JSON values as the Python values that a hint promises."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from aepo.agents.tools.arguments import fits

JSON_TYPES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
    collections.abc.Sequence: "array",
    collections.abc.Iterable: "array",
    collections.abc.Mapping: "object",
}
ACCEPTED = "int, float, str, bool, list, dict, tuple, Literal, Union, Enum, TypedDict, a dataclass or pydantic model"


def schema_of(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint, as `transformers.utils.get_json_schema` writes it where that knows the type.

    TypeError says which hint has none.
    """
    hint = getattr(hint, "__supertype__", hint)  # NewType
    if hint is Any or isinstance(hint, typing.TypeVar):
        return {}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is None:
        return {"type": JSON_TYPES[hint]} if _is_plain(hint) else _schema_of_class(hint)
    if origin in (Union, types.UnionType):
        return _schema_of_union(arguments)
    if origin is Literal:
        return _schema_of_choices(arguments)
    if origin is tuple and Ellipsis not in arguments:
        return {"type": "array", "prefixItems": [schema_of(each) for each in arguments]}
    if not _is_plain(origin):
        raise TypeError(f"{_name(hint)} has no JSON form; expected {ACCEPTED}")
    if JSON_TYPES[origin] == "object":
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    return {"type": "array", "items": schema_of(arguments[0])}


def python_value(value: Any, hint: Any) -> Any:
    """A JSON value that fits the hint's schema as what the hint says: an Enum's member, a tuple, a dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _of_union(value, arguments)
    if isinstance(hint, type) and origin is None and not typing.is_typeddict(hint):
        if issubclass(hint, enum.Enum):
            return hint(value)
        if hasattr(hint, "model_validate"):
            return hint.model_validate(value)
        if dataclasses.is_dataclass(hint):
            fields = typing.get_type_hints(hint)
            return hint(**{name: python_value(each, fields[name]) for name, each in value.items()})
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list):
        if origin is tuple and Ellipsis not in arguments:
            return tuple(python_value(each, of) for each, of in zip(value, arguments, strict=True))
        items = [python_value(each, arguments[0]) for each in value] if arguments else value
        return tuple(items) if hint is tuple or origin is tuple else items
    if isinstance(value, Mapping) and origin is not None and len(arguments) == 2:
        return {name: python_value(each, arguments[1]) for name, each in value.items()}
    return value


def _is_plain(hint: Any) -> bool:
    return isinstance(hint, collections.abc.Hashable) and hint in JSON_TYPES


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)


def _schema_of_union(arguments: tuple[Any, ...]) -> dict[str, Any]:
    parts = [schema_of(each) for each in arguments if each is not type(None)]
    names = sorted({str(part.get("type")) for part in parts})
    if len(parts) == 1:
        schema = parts[0]
    elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": parts}
    return {**schema, "nullable": True} if type(None) in arguments else schema


def _schema_of_choices(choices: tuple[Any, ...]) -> dict[str, Any]:
    names = list(dict.fromkeys(JSON_TYPES[type(choice)] for choice in choices if type(choice) in JSON_TYPES))
    if len(names) == 0 or any(type(choice) not in JSON_TYPES for choice in choices):
        raise TypeError(f"the choices {choices!r} have no JSON form; expected texts, numbers, booleans or None")
    return {"type": names[0] if len(names) == 1 else names, "enum": list(choices)}


def _schema_of_class(hint: Any) -> dict[str, Any]:
    if not isinstance(hint, type):
        raise TypeError(f"{hint!r} has no JSON form; expected {ACCEPTED}")
    if issubclass(hint, enum.Enum):
        return _schema_of_choices(tuple(member.value for member in hint))
    if hasattr(hint, "model_json_schema"):
        schema = hint.model_json_schema()
        inlined: dict[str, Any] = _inlined(schema, schema.get("$defs", {}))
        return inlined
    if typing.is_typeddict(hint):
        required = sorted(getattr(hint, "__required_keys__", ()))
    elif dataclasses.is_dataclass(hint):
        missing = dataclasses.MISSING
        required = [
            field.name
            for field in dataclasses.fields(hint)
            if field.init and field.default is missing and field.default_factory is missing
        ]
    else:
        raise TypeError(f"{_name(hint)} has no JSON form; expected {ACCEPTED}")
    properties = {name: schema_of(each) for name, each in typing.get_type_hints(hint).items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema without $ref; what refers to itself may be anything."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        others = {key: each for key, each in definitions.items() if key != name}
        return _inlined(definitions.get(name, {}), others)
    return {key: _inlined(each, definitions) for key, each in schema.items() if key != "$defs"}


def _of_union(value: Any, arguments: tuple[Any, ...]) -> Any:
    """By the first of the alternatives that the value fits."""
    for alternative in arguments:
        if fits(value, schema_of(alternative)):
            return python_value(value, alternative)
    return value
