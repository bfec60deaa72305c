"""Environments of TRL's rows: a branch gets the state that the path it left had there, or there is no branch.

By `fork()` where the environment has it: a new instance in the same state. Else the path's calls are repeated on the
row's own environment, which was reset with the same data, and must all give the same results.
"""

from __future__ import annotations

import asyncio
import inspect
import types
import warnings
from collections.abc import Sequence
from typing import Any

from aepo.integrations.trl.branching.paths import Path, Place, Turn
from aepo.integrations.trl.branching.tools import Result, Tools, run_calls


class NoBranch(Exception):
    """Why an environment cannot be brought into a state."""


class Environments:
    """The environments and tools of the rows of one generation batch.

    trainer: TRL's, whose environments have been reset with `examples`, the rows of its dataset, which gave `prompts`.
    """

    def __init__(self, trainer: Any, examples: Sequence[dict[str, Any]], prompts: Sequence[Any]) -> None:
        self._trainer = trainer
        self._examples = examples
        self._prompts = prompts
        self._forked: list[Any] = []
        self._used: set[int] = set()  # rows that a branch could not be brought into: not as `reset` left them
        self.other_prompts: dict[int, tuple[Any, list[int]]] = {}
        """Prompt and tokens of rows whose environment said something else when it was reset again."""

    def tools(self, row: int) -> Tools:
        return Tools(self._trainer._sync_tool_dicts[row], self._trainer._async_tool_dicts[row])

    def turn(self, row: int, results: Sequence[Result]) -> Turn:
        """Of the results of a turn, those of calls that may have changed the row's environment."""
        environment = self._environment(row)
        owned = [one for one in results if _is_of(self.tools(row).find(one.name), environment)]
        return Turn(tuple(one.call for one in owned), tuple(one.content for one in owned))

    def keep(self, place: Place, row: int) -> None:
        """Before calls change it: the state at a place that is judged later."""
        environment = self._environment(row)
        if _forks(environment):
            try:
                place.state = self._fork(environment)
            except NoBranch as failure:  # who asks for the branch is told
                place.state = failure

    def branch(self, path: Path, place: Place, row: int) -> bool:
        """As `paths.States` has it. Why not is a warning."""
        if not self._trainer.environments:
            return True
        try:
            if _forks(self._environment(path.row)):
                self._replace(row, self._state_at(path, place))
            else:
                self._repeat(path.turns[: place.step], row)
        except NoBranch as failure:
            warnings.warn(f"no branch: {failure}", RuntimeWarning, stacklevel=2)
            return False
        return True

    def begin(self, row: int, prompt: list[int]) -> list[int]:
        """As `paths.States` has it."""
        if row in self._used:
            self._reset(row)
        return self.other_prompts[row][1] if row in self.other_prompts else prompt

    def _environment(self, row: int) -> Any:
        return self._trainer.environments[row] if self._trainer.environments else None

    def _state_at(self, path: Path, place: Place) -> Any:
        """An instance of its own in the state at the place."""
        if isinstance(place.state, NoBranch):
            raise place.state
        if place.state is not None:
            return place.state  # a place is judged once, so nobody else wants it
        assert path.rounds == place.step, "the state was left, and no fork of it was kept"
        return self._fork(self._environment(path.row))

    def _fork(self, environment: Any) -> Any:
        name = f"{type(environment).__name__}.fork"
        try:
            made = environment.fork()
            if inspect.isawaitable(made):
                made = asyncio.run_coroutine_threadsafe(_wait(made), self._trainer.async_loop).result()
        except Exception as error:
            raise NoBranch(f"{name} raised {type(error).__name__}: {error}") from error
        taken = [*self._trainer.environments, *self._forked]
        if type(made) is not type(environment) or any(made is one for one in taken):
            raise NoBranch(f"{name} returned {made!r}: expected another {type(environment).__name__}")
        self._forked.append(made)
        return made

    def _replace(self, row: int, environment: Any) -> None:
        """Calls and rewards of the row are those of another instance; TRL's pool keeps the one that it gave the row."""
        before = self._environment(row)
        for tools in (self._trainer._sync_tool_dicts[row], self._trainer._async_tool_dicts[row]):
            for name, tool in tools.items():
                if _is_of(tool, before):
                    tools[name] = types.MethodType(tool.__func__, environment)
        self._trainer.environments[row] = environment

    def _repeat(self, turns: Sequence[Turn], row: int) -> None:
        """The same calls on the row's own environment. Standalone tools are not called again."""
        name = type(self._environment(row)).__name__
        if row in self._used:
            self._reset(row)
        if row in self.other_prompts:
            raise NoBranch(f"{name}.reset said something else when it was called again")
        self._used.add(row)
        loop = getattr(self._trainer, "async_loop", None)
        for turn in turns:
            [results] = run_calls([(turn.calls, self.tools(row))], loop)
            for result, content in zip(results, turn.contents, strict=True):
                if result.content != content:
                    raise NoBranch(
                        f"{name}.{result.name} gave another result when it was repeated: {content!r}, then "
                        f"{result.content!r}; a method fork() of the environment would make branches of any state"
                    )
        self._used.discard(row)

    def _reset(self, row: int) -> None:
        """As TRL did it before the rollout, and with what that gave."""
        example = self._examples[row]
        named = {key: value for key, value in example.items() if key != "environment"}
        environment = self._environment(row)
        try:
            said = environment.reset(**(named if self._trainer._multi_environment else example))
        except Exception as error:
            raise RuntimeError(
                f"{type(environment).__name__}.reset raised {type(error).__name__} when it was called again, for a row "
                "that no branch could be brought into; branched_rollouts=False resets once"
            ) from error
        self._used.discard(row)
        prompt = _with_observation(example.get("prompt", [{"role": "user", "content": ""}]), said)
        if prompt != self._prompts[row]:
            prompts = [*self._prompts[:row], prompt, *self._prompts[row + 1 :]]
            self.other_prompts[row] = (prompt, self._trainer._tokenize_prompts(prompts)[0][row])


def hide_forks(trainer: Any) -> None:
    """TRL makes a tool of every public method of an environment; `fork()` is the trainer's, no model is told of it. One
    that takes arguments is a tool of the environment's own."""
    instances = [instance for pool in trainer._environment_pool.values() for instance in pool if _forks(instance)]

    def told(tool: Any) -> bool:
        return not any(_is_of(tool, instance) and tool.__name__ == "fork" for instance in instances)

    trainer.tools = [tool for tool in trainer.tools if told(tool)]
    trainer._env_tools = {name: [*filter(told, tools)] for name, tools in trainer._env_tools.items()}


def drop_forks(trainer: Any) -> None:
    """The same for the tools of the rows of a batch, which TRL has just collected."""
    for row, environment in enumerate(trainer.environments):
        for tools in (trainer._sync_tool_dicts[row], trainer._async_tool_dicts[row]):
            if _forks(environment) and _is_of(tools.get("fork"), environment):
                del tools["fork"]


def _is_of(tool: Any, environment: Any) -> bool:
    """Whether a tool is a method of that instance. Standalone tools and static methods are of none."""
    return environment is not None and getattr(tool, "__self__", None) is environment


def _forks(environment: Any) -> bool:
    """Whether it has `fork()`, without arguments."""
    fork = getattr(environment, "fork", None) if callable(getattr(type(environment), "fork", None)) else None
    if fork is None:
        return False
    try:
        inspect.signature(fork).bind()
    except (TypeError, ValueError):
        return False
    return True


def _with_observation(prompt: list[dict[str, Any]], said: Any) -> list[dict[str, Any]]:
    """What `reset` returned stands at the end of the last message; a text beside content blocks becomes one."""
    if said is None:
        return prompt
    content = prompt[-1]["content"]
    if isinstance(content, str) != isinstance(said, str):
        content, said = ([{"type": "text", "text": one}] if isinstance(one, str) else one for one in (content, said))
    return [*prompt[:-1], {**prompt[-1], "content": content + said}]


async def _wait(awaitable: Any) -> Any:
    return await awaitable
