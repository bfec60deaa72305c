"""Reward functions of three signatures, told apart by the names of their parameters, behind one.

    ours   f(question, response)                                            -> number, Reward or None
    TRL    f(completions, prompts, completion_ids, and columns by name)     -> one number or None per completion
    verl   f(solution_str, data_source, ground_truth, extra_info)           -> number or {"score": number, ..}

Each may be a function, an async one, an object that can be called, or a class, of which one instance is made.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from aepo.agents.protocol import USER_ERRORS, AgentError, RewardFunction, problem_of, shown
from aepo.agents.rewards.arguments import OURS, TRL, VERL, own_copy, trl_arguments, verl_arguments
from aepo.registry import attribute_of, plain
from aepo.types import Question, Response, Reward

Signature = Literal["ours", "trl", "verl"]
FORMS = (
    "f(question, response), TRL's f(prompts, completions, **columns) or "
    "verl's f(data_source, solution_str, ground_truth, extra_info)"
)


class RewardError(AgentError):
    """A reward function failed, or did not return what it should; names the function, the question and the path."""


@dataclass(frozen=True, slots=True)
class Value:
    """What a function says about one path."""

    total: float
    components: Mapping[str, float] = field(default_factory=dict)
    success: bool | None = None  # None: it does not say


class GroupReward:
    """A reward function, called for all paths of one question: once if its signature is TRL's, else once per path.

    ValueError: it is not one of the three, or asks for something that is not known here.
    """

    def __init__(self, function: RewardFunction) -> None:
        self._function = function() if isinstance(function, type) else function
        self.name = _name(function)
        self.signature, self._parameters, self._takes_all = _signature(self._function, self.name)
        self.module = str(getattr(plain(function), "__module__", ""))
        self.is_async = _is_async(self._function)

    def check(self, question: Question) -> None:
        """ValueError: a parameter of a TRL function is no column of the question."""
        if self.signature == "trl":
            try:
                trl_arguments(question, (), self._parameters, self._takes_all, {})
            except LookupError as error:
                raise ValueError(f"reward {self.name}, question {question.id!r}: {error}") from None

    def __call__(self, question: Question, responses: Sequence[Response]) -> list[Value | None]:
        """One value per path; None where the function does not apply. RewardError."""
        logged: dict[str, list[float]] = {}
        calls = self._calls(question, responses, logged)
        outputs = [self._guarded(call, question, index) for index, call in enumerate(calls)]
        if any(map(inspect.isawaitable, outputs)):
            outputs = asyncio.run(self._settle(outputs, question))
        return self._values(outputs, question, len(responses), logged)

    async def concurrently(self, question: Question, responses: Sequence[Response]) -> list[Value | None]:
        """The same, for a function that waits: within the caller's event loop, all paths at once."""
        logged: dict[str, list[float]] = {}
        calls = self._calls(question, responses, logged)
        outputs = [self._guarded(call, question, index) for index, call in enumerate(calls)]
        return self._values(await self._settle(outputs, question), question, len(responses), logged)

    def _calls(
        self, question: Question, responses: Sequence[Response], logged: dict[str, list[float]]
    ) -> list[Callable[[], Any]]:
        function = self._function
        if self.signature == "trl":
            try:
                arguments = trl_arguments(question, responses, self._parameters, self._takes_all, logged)
            except LookupError as error:
                raise RewardError(f"reward {self.name}, question {question.id!r}: {error}") from None
            return [lambda: function(**arguments)]
        if self.signature == "verl":
            each = [verl_arguments(question, r, self._parameters, self._takes_all) for r in responses]
            return [lambda a=a: function(**a) for a in each]  # type: ignore[misc]
        names = [name for name in self._parameters if name.lstrip("_") in OURS]
        given = [{"question": own_copy(question), "response": response} for response in responses]
        return [lambda g=g: function(**{name: g[name.lstrip("_")] for name in names}) for g in given]  # type: ignore[misc]

    def _guarded(self, call: Callable[[], Any], question: Question, index: int) -> Any:
        try:
            return call()
        except USER_ERRORS as error:
            raise self._failed(error, question, index) from error

    async def _settle(self, outputs: Sequence[Any], question: Question) -> list[Any]:
        """Wait for all, also where one fails: nothing of the user's runs on afterwards."""

        async def ended(output: Any) -> Any:
            try:
                return await output if inspect.isawaitable(output) else output
            except SystemExit as error:  # which would end the event loop
                return error

        try:
            settled = await asyncio.gather(*map(ended, outputs), return_exceptions=True)
        finally:  # where all of this is cancelled before it begins, Python would miss what was not awaited
            for coroutine in filter(inspect.iscoroutine, outputs):
                coroutine.close()
        for index, output in enumerate(settled):
            if isinstance(output, USER_ERRORS):
                raise self._failed(output, question, index) from output
            if isinstance(output, BaseException):
                raise output
        return settled

    def _values(
        self, outputs: Sequence[Any], question: Question, count: int, logged: Mapping[str, Sequence[float]]
    ) -> list[Value | None]:
        if self.signature == "trl":
            outputs = self._one_per_path(outputs[0], question, count)
        extra = [{name: numbers[index] for name, numbers in logged.items()} for index in range(count)]
        return [self._value(output, question, index, extra[index]) for index, output in enumerate(outputs)]

    def _one_per_path(self, output: Any, question: Question, count: int) -> Sequence[Any]:
        try:
            values = output.tolist() if hasattr(output, "tolist") else output
        except Exception:  # whatever the value's own method does
            values = output
        if isinstance(values, (list, tuple)) and len(values) == count:
            return values
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else _shown(output)
        raise RewardError(
            f"reward {self.name}, question {question.id!r}: expected a list of {count} numbers or None, one per "
            f"completion, got {got}"
        )

    def _value(self, output: Any, question: Question, index: int, extra: Mapping[str, float]) -> Value | None:
        where = self._where(question, index)
        if output is None:
            return None
        if isinstance(output, Reward):
            components = _components(output.components, where)
            return Value(_number(output.total, where), {**extra, **components}, _success(output.success, where))
        if self.signature == "verl" and isinstance(output, Mapping):
            if "score" not in output:
                raise RewardError(f"{where}: expected a number or a dict with 'score', got the keys {list(output)}")
            others = {name: value for name, value in output.items() if name != "score" and _is_number(value)}
            return Value(_number(output["score"], where), _components(others, where))
        return Value(_number(output, where), extra)

    def _where(self, question: Question, index: int) -> str:
        return f"reward {self.name}, question {question.id!r}, path {index}"

    def _failed(self, error: BaseException, question: Question, index: int) -> RewardError:
        where = self._where(question, index)
        if self.signature == "trl":
            where = where.rpartition(",")[0]  # one call for all paths
        return RewardError(f"{where}: {problem_of(error, self._function)}")


def _signature(function: Any, name: str) -> tuple[Signature, dict[str, bool], bool]:
    """Which of the three, whether each parameter is required, and whether there is a **parameter."""
    if not callable(function):
        raise ValueError(f"reward {name}: expected a function {FORMS}; it is of type {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ValueError(f"reward {name}: expected a function {FORMS}; its signature cannot be read") from None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {p.name: p.default is p.empty for p in signature.parameters.values() if p.kind in named}
    positional = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    shown = f"{getattr(plain(function), '__name__', name)}{signature}"
    known: dict[str, bool] = {parameter.lstrip("_"): required for parameter, required in parameters.items()}
    if positional:
        raise ValueError(f"reward {name}: parameters are given by name, and {shown} has some before '/'")
    if parameters.keys() & TRL:
        form: Signature = "trl"
    elif "solution_str" in parameters:
        form = "verl"
        _refuse_required(parameters, VERL, shown, name)
    elif known.keys() >= OURS:
        form = "ours"
        _refuse_required(known, OURS, shown, name)
    else:
        raise ValueError(f"reward {name}: expected {FORMS}, got {shown}")
    return form, parameters, takes_all


def _refuse_required(parameters: Mapping[str, bool], known: frozenset[str], shown: str, name: str) -> None:
    unknown = [parameter for parameter, required in parameters.items() if required and parameter not in known]
    if unknown:
        raise ValueError(f"reward {name}: nothing is known here for {', '.join(unknown)} of {shown}")


def _is_async(function: Any) -> bool:
    """An async function, or an object with an async __call__."""
    a_routine = isinstance(function, functools.partial) or inspect.isroutine(function)
    return inspect.iscoroutinefunction(function if a_routine else type(function).__call__)


def _name(function: Any) -> str:
    """Of the function behind a partial, of the method, or of the class of an object."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(attribute_of(function, "__name__") or type(function).__name__)


def _components(given: Mapping[Any, Any], where: str) -> dict[str, float]:
    for name in given:
        if not isinstance(name, str):
            raise RewardError(f"{where}: expected texts as names of components, got {_shown(name)}")
    return {name: _number(value, f"{where}, {name}") for name, value in given.items()}


def _success(value: Any, where: str) -> bool:
    value = _python_value(value)
    if not isinstance(value, (int, float)) or value not in (True, False):
        raise RewardError(f"{where}: expected True or False as the Reward's success, got {_shown(value)}")
    return bool(value)


def _is_number(value: Any) -> bool:
    return isinstance(_python_value(value), (int, float))


def _python_value(value: Any) -> Any:
    """Of a scalar of numpy or torch, else the value itself."""
    try:
        return value.item() if hasattr(value, "item") else value
    except Exception:  # more than one entry, or whatever the value's own method does
        return value


def _number(value: Any, where: str) -> float:
    """Of Python, numpy or torch. RewardError: it is none, or not finite."""
    plain_value = _python_value(value)
    try:
        number = float(plain_value) if isinstance(plain_value, (int, float)) else None
    except Exception:  # beyond a float, or whatever the value's own method does
        number = None
    if number is None:
        raise RewardError(f"{where}: expected a number or None, got {_shown(value)}")
    if not math.isfinite(number):
        raise RewardError(f"{where}: expected a finite number, got {number}")
    return number


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {shown(value)}"
