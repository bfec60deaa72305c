"""Instances of a user's environment class: made, reset, called, forked and closed, with the limits of a tool."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
import warnings
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aepo.agents.protocol import AgentError, shown
from aepo.agents.tools.functions import FunctionTool
from aepo.agents.tools.text import cut, described
from aepo.agents.tools.toolbox import ToolBox
from aepo.registry import place_of
from aepo.types import Question, ToolCall, ToolResult

NOT_TOOLS = ("reset", "fork", "get_reward", "close")
SHOWN_CHARS = 80  # of a value, in a message
PROBLEM_CHARS = 300  # of what a method raised


class EnvironmentFailed(AgentError):
    """The message names the class, its method, the question and what is wrong; `reason` is the short form."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Instances:
    """The living instances of one class. No two paths have the same one.

    environment: a class as in `aepo.agents.protocol.Environment`; ValueError where it cannot be used.
    toolbox: whose threads, event loop and limits the methods get, and whose tools may be called beside them.
    timeout: seconds for a call of any method.
    """

    def __init__(self, environment: type, toolbox: ToolBox, timeout: float) -> None:
        check_class(environment)
        self.name = environment.__name__
        self.forks = hasattr(environment, "fork")
        self.methods = {name: FunctionTool(getattr(environment, name), timeout) for name in tool_names(environment)}
        self.environment = environment
        self._toolbox = toolbox
        self._timeout = timeout
        self._in_use: dict[int, object] = {}  # by id
        self._reset_takes = reset_parameters(environment)

    def check(self, question: Question) -> None:
        """ValueError where `reset` needs a column that the question does not have."""
        row = row_of(question)
        for name, parameter in self._reset_takes.items():
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if needed and name not in row:
                columns = ", ".join(row)
                raise ValueError(f"{self.name}.reset needs {name!r}, question {question.id!r} has {columns}")

    async def make(self, question: Question) -> tuple[Any, str | None]:
        """A new instance right after `reset`, and what that returned."""
        self.check(question)
        row = copy.deepcopy(row_of(question))  # the instance may keep and change what it is given
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in self._reset_takes.values()):
            row = {name: value for name, value in row.items() if name in self._reset_takes}
        instance = self._use(await self._invoke(self.environment, "__init__", question), "__init__", question)
        try:
            said = await self._invoke(functools.partial(instance.reset, **row), "reset", question)
            if said is not None and not isinstance(said, str):
                returned = f"returned {type(said).__name__}"
                raise self.failure("reset", question, returned, ", expected a text or None")
        except BaseException:
            await self.release(instance, question)
            raise
        return instance, said or None

    async def call(self, instance: object, call: ToolCall) -> ToolResult:
        """Run one call: on the instance if it names a method, else with the stateless tools."""
        refusal = self._toolbox.refusal(call, [*self.methods, *self._toolbox.tools])
        if refusal is not None:
            return refusal
        method = self.methods.get(call.tool)
        tool = self._toolbox.tools[call.tool] if method is None else method.bind(instance)
        return await self._toolbox.call(tool, call.arguments)

    async def fork(self, instance: Any, question: Question) -> Any:
        """Another instance in the same state."""
        forked = await self._invoke(instance.fork, "fork", question)
        if not isinstance(forked, type(instance)):
            expected = f", expected another {type(instance).__name__}"
            raise self.failure("fork", question, f"returned {type(forked).__name__}", expected)
        return self._use(forked, "fork", question)

    async def reward(self, instance: Any, question: Question) -> float | None:
        """What `get_reward` returns; None where there is no such method."""
        if not hasattr(instance, "get_reward"):
            return None
        value = await self._invoke(instance.get_reward, "get_reward", question)
        try:
            number = math.nan if isinstance(value, str) else float(value)  # numpy's and torch's numbers too
        except Exception:  # beyond a float, or whatever the value's own method does
            number = math.nan
        if not math.isfinite(number):
            detail = f": {shown(value, SHOWN_CHARS)}, expected a finite number"
            raise self.failure("get_reward", question, "returned no number", detail)
        return number

    async def release(self, instance: Any, question: Question) -> None:
        """Call `close`, if there is one. A failure is a warning: the path is over."""
        try:
            if hasattr(instance, "close"):
                await self._invoke(instance.close, "close", question)
        except EnvironmentFailed as failure:
            warnings.warn(str(failure), RuntimeWarning, stacklevel=2)
        finally:
            del self._in_use[id(instance)]

    def failure(self, method: str, question: Question, reason: str, detail: str) -> EnvironmentFailed:
        message = f"{self.name}.{method} {reason}{detail} (question {question.id!r})"
        return EnvironmentFailed(f"{method} {reason}", message)

    def _use(self, instance: Any, method: str, question: Question) -> Any:
        """Note that a path has this instance; `EnvironmentFailed` where one has it already."""
        if id(instance) in self._in_use:
            raise self.failure(method, question, "returned an instance that is in use", ", expected a new one")
        self._in_use[id(instance)] = instance
        return instance

    async def _invoke(self, method: Callable[[], Any], name: str, question: Question) -> Any:
        """What a method returns that is no tool, called with the limits of one."""
        attempt = _Attempt(method, f"{self.name}.{name}", self._timeout)
        result = await self._toolbox.call(attempt, {})
        if result.error is None:
            return attempt.value
        error = attempt.error
        said = result.text.removeprefix("error: ") if error is None else described(error)
        problem = cut(" ".join(said.split()), PROBLEM_CHARS)
        if error is None:  # words of the ToolBox
            raise self.failure(name, question, "gave no answer", f": {problem}")
        detail = f"{f': {problem}' if problem else ''}{place_of(error, method)}"
        raise self.failure(name, question, f"raised {type(error).__name__}", detail) from error


class _Attempt:
    """A method that is no tool as one, for the limits of the ToolBox; keeps what it returned or raised."""

    description = ""
    parameters: Mapping[str, Any] = {"type": "object"}

    def __init__(self, method: Callable[[], Any], name: str, timeout: float) -> None:
        self.name = name
        self.timeout = timeout
        self.value: Any = None
        self.error: BaseException | None = None
        self._method = method

    def __call__(self, **_: Any) -> str | Awaitable[str]:
        try:
            value = self._method()
        except BaseException as error:
            self.error = error
            raise
        return self._end(value)

    def _end(self, value: Any) -> str | Awaitable[str]:
        if inspect.isawaitable(value):
            return self._wait(value)
        self.value = value
        return "done"

    async def _wait(self, awaitable: Awaitable[Any]) -> str:
        try:
            self.value = await awaitable
        except asyncio.CancelledError:  # by the ToolBox, after the timeout
            raise
        except BaseException as error:
            self.error = error
            raise
        return "done"


def check_class(environment: type) -> None:
    """ValueError where it does not have the interface."""
    if not isinstance(environment, type):
        raise ValueError(f"environment: expected a class with reset(**row), got {environment!r}")
    name = environment.__name__
    if not inspect.isfunction(getattr(environment, "reset", None)):
        raise ValueError(f"environment {name}: expected a method reset(self, **row), there is none")
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in reset_parameters(environment).values()):
        raise ValueError(f"environment {name}: reset gets a row's columns by name, but takes some by position")
    try:
        inspect.signature(environment).bind()
    except TypeError as error:
        raise ValueError(f"environment {name} is made without arguments: {error}") from None
    except ValueError:  # no signature: of a base class in C
        pass


def tool_names(environment: type) -> list[str]:
    """Public methods that are tools, as TRL finds them: on an instance, so static methods are none."""
    attributes = ((name, inspect.getattr_static(environment, name)) for name in sorted(dir(environment)))
    methods = [name for name, value in attributes if inspect.isfunction(value) or isinstance(value, classmethod)]
    return [name for name in methods if not name.startswith("_") and name not in NOT_TOOLS]


def reset_parameters(environment: type) -> dict[str, inspect.Parameter]:
    """Without `self`."""
    return dict(list(inspect.signature(environment.reset).parameters.items())[1:])  # type: ignore[attr-defined]


def row_of(question: Question) -> dict[str, Any]:
    """The columns of a question, with the names that a task's data have."""
    prompt = question.prompt if isinstance(question.prompt, str) else [dict(message) for message in question.prompt]
    return {"prompt": prompt, "answer": question.answer, "id": question.id, "kind": question.kind, **question.data}
