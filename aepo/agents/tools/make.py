"""From what a configuration or a task names to tools."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable
from typing import Any

from aepo.agents.protocol import Closable, Tool, ToolError
from aepo.agents.tools.functions import FunctionTool
from aepo.agents.tools.toolbox import check_tool
from aepo.files.user_paths import user_path
from aepo.registry import error_text, resolve

FORMS = (
    "python, search:CORPUS.jsonl, package.module:function, package.module:Class, mcp:COMMAND ARGUMENTS, "
    "mcp+http://HOST:PORT/PATH or http://HOST:PORT/retrieve"
)
NO_TOOLS = ("close",)  # public methods of a class of tools that are none


def make_tools(items: Iterable[Any], timeout: float, setting: str = "task.tools") -> list[Tool]:
    """What a configuration names, each in one of `FORMS`, and what a task has in Python: tools, typed functions,
    instances and classes with typed methods.

    timeout: seconds a call of one may take; tools that say their own keep it.
    ValueError in one line where one is something else, or cannot be had. Then the tools before it are closed.
    """
    return _all_of(
        _named(item, timeout, setting) if isinstance(item, str) else _given(item, timeout, setting) for item in items
    )


def _all_of(groups: Iterable[list[Tool]]) -> list[Tool]:
    tools: list[Tool] = []
    with contextlib.ExitStack() as made:
        for group in groups:
            for tool in group:
                if isinstance(tool, Closable):
                    made.callback(tool.close)
            tools += group
        made.pop_all()
    return tools


def _named(spec: str, timeout: float, setting: str) -> list[Tool]:
    kind, colon, rest = spec.partition(":")
    if kind == "python" and not colon:
        from aepo.agents.tools.python import PythonTool

        return [PythonTool()]
    if kind == "search" and rest:
        return [_search(spec, rest, setting)]
    if kind in ("mcp", "mcp+http", "mcp+https") and colon:
        from aepo.agents.tools.mcp import mcp_tools

        return mcp_tools(spec, timeout, setting=setting)
    if kind in ("http", "https") and rest.startswith("//"):
        return [_retriever(spec, timeout, setting)]
    if not all(part.isidentifier() for part in rest.split(".")):
        raise ValueError(f"{setting} = {spec!r}: expected {FORMS}")
    return _given(resolve(spec, setting), timeout, f"{setting} = {spec!r}")


def _given(item: Any, timeout: float, setting: str) -> list[Tool]:
    """Tools of an object. `setting` begins the errors."""
    try:
        if isinstance(item, type):
            return _of_class(item, timeout)
        if callable(item) and hasattr(item, "parameters") and hasattr(item, "name"):
            check_tool(item)
            return [item]
        if callable(item):
            return [FunctionTool(item, timeout)]
        found = [] if type(item).__module__ == "builtins" else _methods(item, timeout)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
    if not found:
        raise ValueError(f"{setting}: expected a function, a tool or a class of tools, got {item!r}")
    return found


def _of_class(kind: type, timeout: float) -> list[Tool]:
    if hasattr(kind, "reset"):
        raise ValueError(f"{kind.__name__} has a method reset(): it is an environment, which task.environment takes")
    try:
        made = kind()
    except Exception as error:  # whatever the user's class does
        raise ValueError(f"{kind.__name__}() cannot be made without arguments: {error_text(error)}") from error
    if callable(made) and hasattr(made, "parameters"):
        check_tool(made)
        return [made]
    found = _methods(made, timeout)
    if not found:
        raise ValueError(f"{kind.__name__} is no tool and has no public methods, which would become tools")
    return found


def _methods(instance: Any, timeout: float) -> list[Tool]:
    """Each public method as a tool; all of them belong to the one instance."""
    names = [name for name, _ in inspect.getmembers(type(instance), inspect.isroutine) if not name.startswith("_")]
    close = _Once(instance.close) if isinstance(instance, Closable) else None
    return [MethodTool(getattr(instance, name), timeout, close) for name in names if name not in NO_TOOLS]


class MethodTool(FunctionTool):
    """A method of an instance that is closed with its tools."""

    def __init__(self, method: Callable[..., Any], timeout: float, close: Callable[[], object] | None) -> None:
        super().__init__(method, timeout)
        self.close = close or _nothing


class _Once:
    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._done = False

    def __call__(self) -> object:
        with self._lock:
            first, self._done = not self._done, True
        return self._function() if first else None


def _nothing() -> None:
    """There is nothing to close."""


def _search(spec: str, path: str, setting: str) -> Tool:
    from aepo.agents.tools.search import SearchTool

    try:
        return SearchTool.from_jsonl(user_path(setting, path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting} = {spec!r}: expected a JSONL file of documents: {error}") from None
    except ValueError as error:
        raise ValueError(f"{setting} = {spec!r}: {error}") from None


def _retriever(url: str, timeout: float, setting: str) -> Tool:
    """Asked once: one that is not there would only show as failed calls of a whole run."""
    from aepo.agents.tools.http import RetrieveTool

    tool = RetrieveTool(url, timeout)
    try:
        tool("test")
    except (ToolError, TimeoutError) as error:
        problem = str(error).removeprefix("error: ")
        raise ValueError(f"{setting} = {url!r}: the first query failed: {problem}") from None
    return tool
