"""From trees to rewards: what each path says, and what the task's reward functions make of it."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from aepo.agents.protocol import ChatFormat, RewardFunction
from aepo.agents.rewards.adapt import GroupReward, RewardError, Value
from aepo.agents.rewards.builtin import BUILTIN
from aepo.rollout.tree import path_nodes
from aepo.types import Node, Question, Response, Reward, RolloutTree, ScoredTree, Turn

_Result = TypeVar("_Result")
_Column = list["Value | None"]  # what one function says about the paths of a tree
TAKEN = ("mean", "std")  # reward.mean and reward.std are of the totals
MEASURED = ("format", "tool_calls")  # logged for every path

__all__ = ["RewardError", "Scorer", "read_response", "read_responses"]


def read_responses(chat_format: ChatFormat, tree: RolloutTree) -> tuple[Response, ...]:
    """One per path; a node that several paths share is read once."""
    turns, texts = _read(chat_format, tree.nodes)
    return tuple(_response(tree, path.id, turns, texts) for path in tree.paths)


def read_response(chat_format: ChatFormat, tree: RolloutTree, path: int) -> Response:
    """What a reward sees of one path."""
    return _response(tree, path, *_read(chat_format, path_nodes(tree, path)))


class Scorer:
    """Scores paths with reward functions, each with its weight. `questions` are tried before the first path.

    The total is the weighted sum of those that apply to the path. It succeeds where the first function that applies
    gives at least `success`, or, if that function returned a Reward, where this says so. The built-in `format` does
    not say what is right: it is not asked unless it is alone, and a path to which no other one applies is no success.

    ValueError: two functions of one name, or one that the metrics have, a weight of none, or a function that does not
    fit (`GroupReward`).
    """

    def __init__(
        self,
        weights: Mapping[RewardFunction, float],
        chat_format: ChatFormat,
        success: float = 1.0,
        questions: Sequence[Question] = (),
    ) -> None:
        self._format = chat_format
        self._success = success
        if not weights:
            raise ValueError("task.rewards: expected at least one reward function, got none")
        rewards = [GroupReward(function) for function in weights]
        self._rewards = dict(zip(_unique_names(rewards), rewards, strict=True))
        deciding = [name for name, f in zip(self._rewards, weights, strict=True) if f is not BUILTIN["format"]]
        self._deciding = deciding or list(self._rewards)
        self._weights = {name: _weight(name, w) for name, w in zip(self._rewards, weights.values(), strict=True)}
        self._waiting = {name: reward for name, reward in self._rewards.items() if reward.is_async}
        self._begun: dict[str, tuple[RolloutTree, dict[str, _Column]]] = {}
        for question in questions:
            for reward in rewards:
                reward.check(question)

    def try_out(self, question: Question) -> None:
        """Call the functions that do not wait on two empty answers: what is wrong with one is said before any work.

        RewardError: one raises, or does not return a number or None for each.
        """
        empty = Response("", (Turn("", "", answered=True, answer=""),), (), "answered", (), environment_reward=0.0)
        for name, reward in self._rewards.items():
            if name not in self._waiting:
                try:
                    for value in reward(question, (empty, empty)):
                        if value is not None:
                            self._components(name, value, f"question {question.id!r}")
                except RewardError as error:
                    raise RewardError(f"{error} (tried at the start, on two empty answers)") from error

    def begin(self, tree: RolloutTree) -> Coroutine[Any, Any, None] | None:
        """Await it to run the async functions, say of a judge, while other trees still grow; None: there are none.

        `score` takes what came of it. RewardError, once all of them have ended.
        """
        return self._wait_for(tree) if self._waiting else None

    def score(self, trees: Sequence[RolloutTree]) -> list[ScoredTree]:
        """Every path of every tree, in order. RewardError: a function failed; names the question and the path."""
        late = [tree for tree in trees if self._waiting and self._begun.get(tree.question.id, (None,))[0] != tree]
        if late:
            asyncio.run(_all(map(self._wait_for, late)))
        begun, self._begun = self._begun, {}
        return [self._score(tree, begun[tree.question.id][1] if self._waiting else {}) for tree in trees]

    async def _wait_for(self, tree: RolloutTree) -> None:
        responses = read_responses(self._format, tree)
        columns = await _all(reward.concurrently(tree.question, responses) for reward in self._waiting.values())
        self._begun[tree.question.id] = (tree, dict(zip(self._waiting, columns, strict=True)))

    def _score(self, tree: RolloutTree, waited: Mapping[str, _Column]) -> ScoredTree:
        responses = read_responses(self._format, tree)
        values = {
            name: waited[name] if name in waited else reward(tree.question, responses)
            for name, reward in self._rewards.items()
        }
        rewards = []
        for index, response in enumerate(responses):
            applied = {name: value for name, column in values.items() if (value := column[index]) is not None}
            if not applied:
                raise RewardError(
                    f"question {tree.question.id!r}, path {index}: no reward applies; {', '.join(values)} returned "
                    "None, expected a number from at least one"
                )
            rewards.append(self._reward(response, applied, f"question {tree.question.id!r}, path {index}"))
        return ScoredTree(tree, tuple(rewards))

    def _reward(self, response: Response, values: Mapping[str, Value], where: str) -> Reward:
        components = {"format": float(response.well_formed), "tool_calls": float(sum(1 for _ in response.calls))}
        for name, value in values.items():
            components |= self._components(name, value, where)
        first = next((values[name] for name in self._deciding if name in values), None)
        success = first is not None and (first.total >= self._success if first.success is None else first.success)
        total = sum(self._weights[name] * value.total for name, value in values.items())
        if not math.isfinite(total):
            terms = " + ".join(f"{self._weights[name]:g} * {value.total:g} ({name})" for name, value in values.items())
            raise RewardError(f"{where}: expected a finite weighted sum of the rewards, got {terms} = {total}")
        return Reward(total, components, success)

    def _components(self, name: str, value: Value, where: str) -> dict[str, float]:
        """Of one function; those of several are led by its name. RewardError: the metrics have one of the names."""
        several = len(self._rewards) > 1
        # The only Reward there is says all by its own components.
        found = {name: value.total} if several or value.success is None else {}
        for key, number in value.components.items():
            shown = f"{name}.{key}" if several else key
            if shown in found or shown in TAKEN:
                raise RewardError(
                    f"reward {name}, {where}: expected another name for its component {key!r}, "
                    f"reward.{shown} is logged already"
                )
            found[shown] = number
        return found


async def _all(work: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Wait for all, also where one fails, and then raise its error: nothing runs on afterwards."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def _weight(name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"task.rewards, {name}: expected a finite number as its weight, got {weight!r}")
    return float(weight)


def _unique_names(rewards: Sequence[GroupReward]) -> list[str]:
    """Their own; those that two functions share are led by the module."""
    counts = Counter(reward.name for reward in rewards)
    names = [reward.name if counts[reward.name] == 1 else f"{reward.module}.{reward.name}" for reward in rewards]
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"task.rewards: expected functions of different names, got {doubled[0]!r} twice")
    for name, reward in zip(names, rewards, strict=True):
        if name in TAKEN or (name in MEASURED and not reward.module.startswith("aepo.")):
            raise ValueError(
                f"task.rewards: expected another name than {name!r} for a function of {reward.module}, "
                f"reward.{name} is logged already"
            )
    return names


def _read(chat_format: ChatFormat, nodes: Sequence[Node]) -> tuple[dict[int, Turn], dict[int, str]]:
    """Turns and texts by node. The prompt is left out."""
    turns: dict[int, Turn] = {}
    texts: dict[int, str] = {}
    token_ids = {node.id: node.token_ids for node in nodes}
    for node in nodes:
        if node.source == "model":
            assert node.finish_reason is not None
            assert node.parent is not None
            turns[node.id] = chat_format.read(node.token_ids, node.finish_reason, before=token_ids[node.parent])
            texts[node.id] = turns[node.id].text
        elif node.source == "tool":
            texts[node.id] = chat_format.decode(node.token_ids)
    return turns, texts


def _response(tree: RolloutTree, path: int, turns: Mapping[int, Turn], texts: Mapping[int, str]) -> Response:
    nodes = path_nodes(tree, path)[1:]
    return Response(
        text="".join(texts[node.id] for node in nodes),
        turns=tuple(turns[node.id] for node in nodes if node.source == "model"),
        results=tuple(node.results for node in nodes if node.source == "tool"),
        finish_reason=tree.paths[path].finish_reason,
        token_ids=tuple(token for node in nodes for token in node.token_ids),
        environment_reward=tree.paths[path].environment_reward,
    )
