"""How models write calls: a parser per convention takes the text of a turn apart into what is said and the calls.

A parser of your own is a function (text, schemas) -> (content, calls), or a class whose instances are called so;
`format.calls=package.module:Name`. text: the turn without its thinking. schemas: of the arguments, by tool name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aepo.agents.protocol import USER_ERRORS, problem_of
from aepo.registry import resolve
from aepo.types import ToolCall

MAX_DEPTH = 8  # of a schema that refers to others
Schemas = Mapping[str, Mapping[str, Any]]
Parsed = tuple[str, tuple[ToolCall, ...]]
CallParser = Callable[[str, Schemas], Parsed]


class Unreadable(ValueError):
    """What is wrong with a call, in words for the model."""


def hermes(text: str, schemas: Schemas) -> Parsed:
    """<tool_call>{"name": .., "arguments": {..}}</tool_call>: Hermes, Qwen 2.5 and 3, and many others."""
    return _apart(text, _OPENED, lambda opened: _hermes_call(text, opened.end()))


def _apart(text: str, opening: re.Pattern[str], call_of: Callable[[re.Match[str]], tuple[ToolCall, int]]) -> Parsed:
    """What is said, and the calls. call_of: the call that begins there, and where it ends."""
    said, calls, end = [], [], 0
    for opened in opening.finditer(text):
        if opened.start() < end:
            continue  # inside a string of the call before
        said.append(text[end : opened.start()])
        call, end = call_of(opened)
        calls.append(call)
    return "".join([*said, text[end:]]).strip(), tuple(calls)


_OPENED = re.compile(r"<tool_call>\s*")
# The closing tag may be missing in front of the next call and at the end of the turn: models forget it. A call that
# cannot be read ends at the same places, and takes no other one with it.
_END = re.compile(r"</tool_call>|(?=<tool_call>)|\Z")
_CLOSED = re.compile(rf"\s*(?:{_END.pattern})")


def _hermes_call(text: str, start: int) -> tuple[ToolCall, int]:
    """The call that begins there, and where it ends. Its strings may hold tags of calls."""
    try:
        value, end = read_json(text, start)
        closed = _CLOSED.match(text, end)
        if closed:
            return json_call(value, "arguments"), closed.end()
        problem = "expected </tool_call> after the JSON object"
    except Unreadable as error:
        problem = str(error)
    return ToolCall("", {}, problem), _behind(_END, text, start)


def _behind(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where what is found there ends: `pattern` matches the end of the text, too."""
    return pattern.search(text, start).end()  # type: ignore[union-attr]


def llama3_json(text: str, schemas: Schemas) -> Parsed:
    """{"name": .., "parameters": {..}} as the whole turn: Llama 3. Several are divided by ";", "," or line breaks.

    A JSON object without these two keys is an answer.
    """
    body = text.strip()
    forced = body.startswith("<|python_tag|>")
    body = body.removeprefix("<|python_tag|>").lstrip()
    calls: list[ToolCall] = []
    at = 0
    try:
        while at < len(body):
            value, at = read_json(body, at)
            key = "arguments" if isinstance(value, dict) and "arguments" in value else "parameters"  # some write so
            if not forced and not calls and not (isinstance(value, dict) and {"name", key} <= value.keys()):
                return text.strip(), ()
            calls.append(json_call(value, key))
            at = _BETWEEN.match(body, at).end()  # type: ignore[union-attr]  # matches nothing, too
    except Unreadable as error:
        if forced or calls or _LIKE_A_CALL.match(body):
            return "", (*calls, ToolCall("", {}, str(error)))
        return text.strip(), ()
    return "", tuple(calls)


_BETWEEN = re.compile(r"\s*[;,]?\s*")
_LIKE_A_CALL = re.compile(r'\{\s*"name"\s*:\s*"[^"]*"\s*,\s*"parameters"\s*:')


def qwen3_coder(text: str, schemas: Schemas) -> Parsed:
    """<tool_call><function=name><parameter=key>value</parameter></function></tool_call>: Qwen3-Coder.

    Values are texts, without the line breaks at their ends; the schema of the tool says what they stand for.
    """
    return _apart(text, _QWEN.opening, lambda opened: _tagged_call(text, opened, schemas, _QWEN))


def glm45(text: str, schemas: Schemas) -> Parsed:
    """<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>: GLM 4.5 and later.

    Values are as in `qwen3_coder`, line breaks between the tags do not matter.
    """
    return _apart(text, _GLM.opening, lambda opened: _tagged_call(text, opened, schemas, _GLM))


@dataclass(frozen=True)
class _Tags:
    """A convention with an argument in a tag of its own, as patterns.

    A value may hold closing tags, as code does: only one that is followed by what can follow it ends the value. It
    holds no opening tag of another value: else a call that cannot be read would take the next one with it.
    """

    opening: re.Pattern[str]  # name: of the tool
    argument: re.Pattern[str]  # key, value
    closed: re.Pattern[str]
    end: re.Pattern[str]  # of a call that cannot be read
    next: re.Pattern[str]  # closing tag of a value, or the next call
    names: str  # what is expected in front of the arguments
    arguments: str  # and behind it


_GLM = _Tags(
    opening=re.compile(r"<tool_call>\s*(?P<name>[^<\n]*)"),
    argument=re.compile(
        r"\s*<arg_key>(?P<key>[^<\n]*)</arg_key>\s*<arg_value>(?P<value>(?:(?!<arg_value>).)*?)</arg_value>"
        rf"(?=\s*(?:<arg_key>|{_END.pattern}))",
        re.DOTALL,
    ),
    closed=_CLOSED,
    end=_END,
    next=re.compile("</arg_value>|<tool_call>"),
    names="the name of a tool",
    arguments="<arg_key>key</arg_key><arg_value>value</arg_value>, then </tool_call>",
)
_QWEN_END = re.compile(rf"{_END.pattern}|(?=<function=)")  # models forget <tool_call>, too
_QWEN_CLOSED = re.compile(rf"\s*</function>\s*(?:{_QWEN_END.pattern})")
_QWEN = _Tags(
    opening=re.compile(r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]*)>|<tool_call>"),
    argument=re.compile(
        r"\s*<parameter=(?P<key>[^>\n]*)>\n?(?P<value>(?:(?!<parameter=).)*?)\n?</parameter>"
        rf"(?=\s*<parameter=|{_QWEN_CLOSED.pattern})",
        re.DOTALL,
    ),
    closed=_QWEN_CLOSED,
    end=_QWEN_END,
    next=re.compile("</parameter>|<tool_call>|<function="),
    names="<function=name>",
    arguments="<parameter=key>value</parameter>, then </function></tool_call>",
)


def _tagged_call(text: str, opened: re.Match[str], schemas: Schemas, tags: _Tags) -> tuple[ToolCall, int]:
    """The call that begins there, and where it ends."""
    name, end = (opened["name"] or "").strip(), opened.end()
    problems = [] if name else [f"expected {tags.names} after <tool_call>"]
    arguments: dict[str, Any] = {}
    while found := tags.argument.match(text, end):
        key, end = found["key"].strip(), found.end()
        if key in arguments:
            problems.append(f"parameter {key!r}: expected one value, got two")
        try:
            arguments[key] = value_of(found["value"], key, schemas.get(name, {}))
        except Unreadable as error:
            problems.append(str(error))
    if closed := tags.closed.match(text, end):
        end = closed.end()
        # A value that holds all that ends a call has been cut there: its own closing tag is still to come.
        following = tags.next.search(text, end)
        if following and following[0].startswith("</"):
            problems.append(f"expected no value that holds {following[0]} and the end of a call")
            end = _behind(tags.end, text, following.end())
    else:
        start, end = end, _behind(tags.end, text, end)
        problems.append(f"expected {tags.arguments}, got {text[start:end].strip()[:40]!r}")
    return ToolCall(name, arguments, problems[0] if problems else None), end


def value_of(text: str, key: str, schema: Mapping[str, Any]) -> Any:
    """The JSON value that a text stands for, where the property `key` of a tool's schema is read."""
    properties = schema.get("properties")
    types = _types(properties.get(key) if isinstance(properties, Mapping) else None, schema)
    others = types - {"string"}
    if not others:
        return text
    word = text.strip()
    try:
        value = _PYTHON_WORDS[word] if word in _PYTHON_WORDS else load_json(word)
    except Unreadable:
        value = text
    if isinstance(value, float) and value.is_integer() and "number" not in others and "integer" in others:
        value = int(value)
    if _type_of(value) in others or ("number" in others and _type_of(value) == "integer"):
        return value
    if "string" in types:
        return text
    raise Unreadable(f"parameter {key!r}: expected {' or '.join(sorted(types))}, got {text[:40]!r}")


_PYTHON_WORDS = {"True": True, "False": False, "None": None}  # how templates write them
_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def _type_of(value: Any) -> str:
    return _NAMES.get(type(value), "null")


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The JSON types that a schema allows; one that says nothing, or nothing that can be read, allows a text."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return {"string"}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        target: Any = root
        for part in reference.removeprefix("#/").split("/"):
            target = target.get(part, {}) if isinstance(target, dict) else {}
        return _types(target, root, depth + 1)
    if "type" in schema:
        named = [schema["type"]] if isinstance(schema["type"], str) else _list(schema["type"])
        return {name for name in named if isinstance(name, str)} or {"string"}
    values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    if values:
        return {_type_of(value) for value in values}
    variants = [variant for keyword in ("anyOf", "oneOf", "allOf") for variant in _list(schema.get(keyword))]
    return set().union(*(_types(variant, root, depth + 1) for variant in variants)) or {"string"}


def _list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else []


def json_call(value: Any, key: str) -> ToolCall:
    """The call in a JSON object: its name, and its arguments under `key`, as an object or the JSON text of one."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise Unreadable(f'expected a JSON object with "name" and "{key}"')
    name, arguments = value["name"].strip(), value.get(key)
    if key not in value:
        return ToolCall(name, {}, f'expected "{key}" beside "name"')
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments)
        except Unreadable as error:
            return ToolCall(name, {}, f'"{key}": {error}')
    if not isinstance(arguments, dict | None):
        return ToolCall(name, {}, f'"{key}": expected a JSON object')
    return ToolCall(name, arguments or {})


def load_json(text: str) -> Any:
    """The value of a JSON text."""
    value, end = read_json(text.strip(), 0)
    if end < len(text.strip()):
        raise Unreadable("not valid JSON: more text follows the value")
    return value


def read_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends. Strings may hold line breaks, as models write them."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except Unreadable:
        raise
    except json.JSONDecodeError as error:
        raise Unreadable(f"not valid JSON: {error.msg} at character {error.pos - start + 1}") from None
    except (ValueError, RecursionError):
        raise Unreadable("not valid JSON: a number is too long or no number, or it is nested too deeply") from None
    # An escape such as \ud83d may stand alone, and no file takes that.
    return (_sound(value) if "\\u" in text else value), end


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise Unreadable(f"not valid JSON: {key!r} stands twice in one object")
        made[key] = value
    return made


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object)


def _sound(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_sound(key): _sound(item) for key, item in value.items()}
    return [_sound(item) for item in value] if isinstance(value, list) else value


PARSERS: Mapping[str, CallParser] = {
    "hermes": hermes,
    "qwen3_coder": qwen3_coder,
    "llama3_json": llama3_json,
    "glm45": glm45,
}


def find_parser(name: str) -> CallParser:
    """The parser of a name, ours or "package.module:Name". ValueError: there is none."""
    if name in PARSERS:
        return PARSERS[name]
    if ":" not in name:
        raise ValueError(
            f"format.calls = {name!r}: expected auto, {', '.join(PARSERS)}, or package.module:Name of your own parser"
        )
    parser: Any = resolve(name, "format.calls")
    if isinstance(parser, type):
        try:
            parser = parser()
        except USER_ERRORS as error:
            problem = problem_of(error, parser)
            raise ValueError(f"format.calls = {name!r}: making one without arguments failed: {problem}") from error
    if not callable(parser):
        raise ValueError(f"format.calls = {name!r}: expected a parser (text, schemas) -> (content, calls)")
    return parser
