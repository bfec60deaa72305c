"""A typed Python function with a docstring as a tool."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aepo.agents.tools.hints import python_value, schema_of
from aepo.registry import plain

SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Raises|Yields):\s*$")
PARAMETER_SECTIONS = ("Args", "Arguments", "Parameters")
FIELD = re.compile(r":(?:param|parameter|arg|argument)\s+(?:[^:]*\s)?\*{0,2}(\w+):\s*(.*)$")
OTHER_FIELD = re.compile(r":(?:type|returns?|rtype|raises?|yields?)\b.*$")
PARAMETER = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
CHOICES = re.compile(r"\(choices:\s*(\[.*\])\s*\)\s*$", re.IGNORECASE)


class FunctionTool:
    """The model is told the function's name, its docstring and, for every parameter, type and description.

    function: plain or async; a method, a partial, or an object that can be called. Every parameter has a type hint, and
        can be given by name. A method's function is told by `self` (or `cls`), which `bind` gives. What a partial has
        fixed, the model cannot change.
    timeout: seconds.

    Descriptions of parameters are read from a section "Args:" or from ":param name:". The schema is the one of
    `transformers.utils.get_json_schema`, which TRL uses, without `return`: OpenAI's functions have no such field.
    ValueError says in one line what of it is missing, and where.
    """

    def __init__(self, function: Callable[..., Any], timeout: float) -> None:
        self.function = function
        self.timeout = timeout
        fault = functools.partial(_fault, function)
        self.name: str = getattr(_code_of(function), "__name__", "")
        if self.name == "__call__":
            self.name = type(function).__name__
        if self.name == "<lambda>":
            raise fault("a lambda has no name, type hints or docstring; expected a function")
        text = inspect.getdoc(_code_of(function)) or ""
        if not text.strip():
            raise fault("it has no docstring, which is what the model is told about it")
        try:
            signature = inspect.signature(function)
            hints = typing.get_type_hints(_code_of(function))
        except (NameError, TypeError, ValueError, AttributeError) as error:
            raise fault(f"its type hints cannot be read: {error}") from None
        self.description, described = parse_docstring(text)
        self._hints: dict[str, Any] = {}
        fixed = function.keywords if isinstance(function, functools.partial) else {}
        properties, required, others = {}, [], None
        self._needs_instance = next(iter(signature.parameters), None) in ("self", "cls")
        for name, parameter in list(signature.parameters.items())[self._needs_instance :]:
            if name in fixed:
                continue
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise fault(f"parameter {name!r} cannot be given by name (a decorator needs functools.wraps)")
            if name not in hints:
                raise fault(f"parameter {name!r} has no type hint; expected one, as in {name}: str")
            try:
                schema = schema_of(hints[name])
            except TypeError as error:
                raise fault(f"parameter {name!r}: {error}") from None
            if parameter.kind is parameter.VAR_KEYWORD:
                others = schema
                continue
            self._hints[name] = hints[name]
            properties[name] = {**schema, **_described(described.get(name))}
            if parameter.default is parameter.empty:
                required.append(name)
        self.parameters: Mapping[str, Any] = {
            "type": "object",
            "properties": properties,
            **({"required": required} if required else {}),
            **({} if others is None else {"additionalProperties": others}),
        }

    def __call__(self, **arguments: Any) -> Any:
        hints = self._hints
        return self.function(**{name: python_value(value, hints.get(name, Any)) for name, value in arguments.items()})

    def __repr__(self) -> str:
        return f"FunctionTool({self.name} of {_place(self.function)})"

    def bind(self, instance: object) -> FunctionTool:
        """Of a method's function: the tool that calls it on `instance`. (A static one needs none.)"""
        bound = copy.copy(self)
        if self._needs_instance:
            bound.function = self.function.__get__(instance)
        return bound


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Of a docstring without its margin: what comes before its sections, and the descriptions of parameters."""
    before: list[str] = []
    described: dict[str, list[str]] = {}
    current: list[str] | None = None  # the description that continuation lines belong to
    section, indent = "", -1  # of the parameters' names; -1: none was seen yet
    for line in text.splitlines():
        words = line.strip()
        depth = len(line) - len(line.lstrip())
        if depth == 0 and (header := SECTION.match(words)):
            section, current, indent = header[1], None, -1
        elif field := FIELD.match(words):
            section, current = "fields", described.setdefault(field[1], [field[2]])
        elif OTHER_FIELD.match(words):
            section, current = "fields", None
        elif not section:
            before.append(line)
        elif section in PARAMETER_SECTIONS and words:
            indent = depth if indent < 0 else indent
            if depth < indent:
                section, current = "another", None
            elif depth == indent and (parameter := PARAMETER.match(words)):
                current = described.setdefault(parameter[1], [parameter[2]])
            elif current is not None:
                current.append(words)
        elif section == "fields" and words and current is not None:
            current.append(words)
    return "\n".join(before).strip(), {name: " ".join(filter(None, lines)) for name, lines in described.items()}


def _described(text: str | None) -> dict[str, Any]:
    """The description of a parameter, and the choices that it ends with, as transformers reads them."""
    if text is None:
        return {}
    choices = CHOICES.search(text)
    if choices is None:
        return {"description": text}
    return {"enum": json.loads(choices[1]), "description": text[: choices.start()].strip()}


def _code_of(function: Any) -> Any:
    """The function with the name, the hints and the docstring."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function) or hasattr(function, "__qualname__"):
        return function
    return type(function).__call__


def _place(function: Any) -> str:
    code = getattr(plain(function), "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else "a built-in"


def _fault(function: Any, problem: str) -> ValueError:
    name = getattr(_code_of(function), "__qualname__", repr(function))
    return ValueError(f"tool {name} ({_place(function)}): {problem}")
