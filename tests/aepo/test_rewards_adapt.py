"""Reward functions of three signatures: as the documentation of TRL and of verl has them, and wrong ones."""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scoring_toys import response_of, tokens

from aepo.agents.rewards.adapt import GroupReward, RewardError
from aepo.agents.rewards.make import make_rewards
from aepo.types import Question, Response, Reward, ToolCall, ToolResult, Turn

SAID = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 3 + 4?"})
TEXT = Question("t", "What is 3 + 4?", "7", "sums", {"solution": "7", "ground_truth": "7", "task": "math"})
CHAT = Question("c", SAID, "7", "openai/gsm8k", {"solution": "7", "extra_info": {"index": 3}})
SEVEN, EIGHT = response_of("<think>3 + 4</think><answer>7</answer>"), response_of("8")

CALLED = Response(
    text="let me<call/>[7]7",
    turns=(
        Turn("let me<call/>", "let me", (ToolCall("add", {"a": 3, "b": 4}),)),
        Turn("7", "7", (), True, "7"),
    ),
    results=((ToolResult("7!", None, 0.1),),),
    finish_reason="answered",
    token_ids=(1, 2, 3),
)


def totals(function: Any, question: Question = TEXT, responses: tuple[Response, ...] = (SEVEN, EIGHT)) -> list[Any]:
    reward = GroupReward(function)
    values = asyncio.run(reward.concurrently(question, responses)) if reward.is_async else reward(question, responses)
    return [None if value is None else value.total for value in values]


# Ours.


def ours(question: Question, response: Response) -> float:
    return float(response.answer == "8")


class Judge:
    """An object that can be called."""

    def __init__(self, scale: float = 2.0) -> None:
        self.scale = scale

    def __call__(self, question: Question, response: Response) -> float:
        return self.scale * ours(question, response)

    def method(self, response: Response, question: Question, strict: bool = False) -> float:
        return self.scale * ours(question, response)


class AsyncJudge:
    async def __call__(self, question: Question, response: Response) -> float:
        await asyncio.sleep(0)
        return ours(question, response)


def scaled(scale: float, question: Question, response: Response) -> float:
    return scale * ours(question, response)


async def waiting(question: Question, response: Response) -> float:
    await asyncio.sleep(0)
    return ours(question, response)


def decorated(function: Callable[..., float]) -> Callable[..., float]:
    @functools.wraps(function)
    def inner(*arguments: Any, **named: Any) -> float:
        return function(*arguments, **named)

    return inner


@pytest.mark.parametrize(
    ("function", "last", "name"),
    [
        (ours, 1.0, "ours"),
        (Judge, 2.0, "Judge"),
        (Judge(3.0), 3.0, "Judge"),
        (Judge(3.0).method, 3.0, "method"),
        (AsyncJudge, 1.0, "AsyncJudge"),
        (functools.partial(scaled, 5.0), 5.0, "scaled"),
        (functools.partial(scaled, scale=5.0), 5.0, "scaled"),
        (waiting, 1.0, "waiting"),
        (functools.partial(waiting), 1.0, "waiting"),
        (decorated(ours), 1.0, "ours"),
        (lambda response, question, **more: ours(question, response), 1.0, "<lambda>"),
        (lambda _question, response: ours(_question, response), 1.0, "<lambda>"),
        (lambda question, response: waiting(question, response), 1.0, "<lambda>"),  # returns something to wait for
    ],
)
def test_functions_objects_and_classes(function: Any, last: float, name: str) -> None:
    reward = GroupReward(function)
    assert (reward.name, reward.signature) == (name, "ours")
    assert totals(function) == [0.0, last]


def test_values_of_all_kinds() -> None:
    import torch

    values = [1, True, 0.5, np.float32(0.25), np.bool_(True), np.int64(3), np.array([2.0]), torch.tensor(1.5), None]
    assert [totals(lambda question, response, v=v: v, responses=(SEVEN,))[0] for v in values] == [
        *(1.0, 1.0, 0.5, 0.25, 1.0, 3.0, 2.0, 1.5, None)
    ]
    [value] = GroupReward(lambda question, response: Reward(np.float32(0.5), {"a": np.float64(1)}, np.bool_(True)))(  # type: ignore[arg-type]
        TEXT, (SEVEN,)
    )
    assert value is not None
    assert (value.total, dict(value.components), value.success) == (0.5, {"a": 1.0}, True)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("1", "expected a number or None, got str '1'"),
        ([1.0, 2.0], "expected a number or None, got list [1.0, 2.0]"),
        ({"score": 1.0}, "expected a number or None, got dict"),
        (1j, "expected a number or None, got complex"),
        (Fraction(1, 2), "expected a number or None, got Fraction"),
        (np.array([1.0, 2.0]), "expected a number or None, got ndarray"),
        (10**400, "expected a number or None, got int"),
        (float("nan"), "expected a finite number, got nan"),
        (np.float32("inf"), "expected a finite number, got inf"),
        (Reward(float("nan"), {}, True), "expected a finite number, got nan"),
    ],
)
def test_values_that_are_no_rewards(value: Any, problem: str) -> None:
    def wrong(question: Question, response: Response) -> Any:
        return value if response is EIGHT else 0.0

    with pytest.raises(RewardError, match=re.escape(f"reward wrong, question 't', path 1: {problem}")) as error:
        totals(wrong)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


# TRL: the examples of its documentation ("Using a custom reward function").


def reward_func(completions: list[str], **kwargs: Any) -> list[float]:
    """Rewards longer completions."""
    return [float(len(completion)) for completion in completions]


def by_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def format_reward_func(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """For the conversational format."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content) else 0.0 for content in contents]


def against_a_column(completions: list[str], ground_truth: list[str], **kwargs: Any) -> list[float]:
    found = [re.search(r"<answer>(.*?)</answer>", completion) for completion in completions]
    return [1.0 if f and f.group(1) == gt else 0.0 for f, gt in zip(found, ground_truth, strict=True)]


def math_reward_func(prompts: list[str], completions: list[str], task: list[str], **kwargs: Any) -> list[float | None]:
    """Of several tasks: None where it does not apply."""
    return [1.0 if t == "math" else None for _, _, t in zip(prompts, completions, task, strict=True)]


def coding_reward_func(
    prompts: list[str], completions: list[str], task: list[str], **kwargs: Any
) -> list[float | None]:
    return [1.0 if t == "coding" else None for t in task]


async def async_reward_func(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [float("7" in completion) for completion in completions]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (reward_func, [float(len(SEVEN.text)), 1.0]),
        (by_ids, [float(len(SEVEN.token_ids)), 1.0]),
        (against_a_column, [1.0, 0.0]),
        (math_reward_func, [1.0, 1.0]),
        (coding_reward_func, [None, None]),
        (async_reward_func, [1.0, 0.0]),
        (lambda completions: np.array([0.5, 1.0], dtype=np.float32), [0.5, 1.0]),
        (lambda completions: (1, None), [1.0, None]),
    ],
)
def test_functions_written_for_trl(function: Any, expected: list[float | None]) -> None:
    assert GroupReward(function).signature == "trl"
    assert totals(function) == expected


def test_a_dialogue_gives_functions_for_trl_messages() -> None:
    assert totals(format_reward_func, CHAT) == [1.0, 0.0]
    seen: dict[str, Any] = {}

    def look(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    totals(look, CHAT, (CALLED, SEVEN))
    assert seen["completions"][0] == [
        {
            "role": "assistant",
            "content": "let me",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}],
        },
        {"role": "tool", "name": "add", "content": "7!"},
        {"role": "assistant", "content": "7"},
    ]
    assert seen["prompts"] == [list(SAID)] * 2
    assert (seen["solution"], seen["answer"], seen["id"]) == (["7", "7"], ["7", "7"], ["c", "c"])


def test_one_call_for_all_paths_of_a_question() -> None:
    calls = []

    def count(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    totals(count)
    assert calls == [2]


def test_what_functions_for_trl_log_becomes_components() -> None:
    def logs(completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_extra("length", [len(completion) for completion in completions])
        log_extra("text", completions)
        log_metric("mean", 2)
        return [0.0, 1.0]

    values = GroupReward(logs)(TEXT, (SEVEN, EIGHT))
    assert [dict(value.components) for value in values if value] == [
        {"length": float(len(SEVEN.text)), "mean": 2.0},
        {"length": 1.0, "mean": 2.0},
    ]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda completions: [1.0], "expected a list of 2 numbers or None, one per completion, got 1 values"),
        (lambda completions: 1.0, "expected a list of 2 numbers or None, one per completion, got float 1.0"),
        (lambda completions: None, "expected a list of 2 numbers or None, one per completion, got NoneType None"),
        (lambda completions: [1.0, "a"], "path 1: expected a number or None, got str 'a'"),
        (lambda completions: np.array([1.0, np.nan]), "path 1: expected a finite number, got nan"),
        (lambda completions, solutions: [0.0, 0.0], "its parameter 'solutions' is no column; columns: id, kind"),
        (lambda completions, trainer_state: [0.0, 0.0], "the trainer's state is not known"),
        (lambda completions, environments: [0.0, 0.0], "environments end with their paths"),
        (lambda completions: [1 / 0], "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_with_a_function_for_trl(function: Any, problem: str) -> None:
    with pytest.raises(RewardError, match=re.escape(problem)) as error:
        totals(function)
    assert str(error.value).startswith("reward <lambda>, question 't'")


def test_optional_parameters_that_are_not_known_here_keep_their_defaults() -> None:
    assert totals(lambda completions, trainer_state=None, weight=2.0: [weight, weight]) == [2.0, 2.0]


# verl: the examples of its documentation ("Implement Reward Function for Dataset").


def my_reward_fn(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return len(solution_str) / 100


def gsm8k(solution_str: str, ground_truth: str, method: str = "strict", score: float = 1.0) -> float:
    found = re.findall(r"<answer>(-?[0-9.,]+)</answer>", solution_str)
    return score if found and found[-1] == ground_truth else 0.0


def details(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **kwargs: Any) -> Any:
    assert (data_source, extra_info) == ("openai/gsm8k", {"index": 3})
    right = ground_truth in solution_str
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str}


async def generative(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
    await asyncio.sleep(0)
    return float(ground_truth in solution_str)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (my_reward_fn, [len(SEVEN.text) / 100, 0.01]),
        (gsm8k, [1.0, 0.0]),
        (details, [1.0, -1.0]),
        (generative, [1.0, 0.0]),
        (functools.partial(gsm8k, score=3.0), [3.0, 0.0]),
    ],
)
def test_functions_written_for_verl(function: Any, expected: list[float]) -> None:
    assert GroupReward(function).signature == "verl"
    assert totals(function, CHAT) == expected


def test_numbers_beside_the_score_become_components() -> None:
    values = GroupReward(details)(CHAT, (SEVEN, EIGHT))
    assert [dict(value.components) for value in values if value] == [{"acc": 1.0}, {"acc": 0.0}]


def test_a_dict_without_a_score() -> None:
    with pytest.raises(RewardError, match=r"expected a number or a dict with 'score', got the keys \['acc'\]"):
        totals(lambda solution_str: {"acc": 1.0})


# What is none of the three.


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda answer, text: 1.0, r"got <lambda>\(answer, text\)"),
        (lambda *arguments: 1.0, r"got <lambda>\(\*arguments\)"),
        (lambda question: 1.0, r"got <lambda>\(question\)"),
        (lambda question, response, judge: 1.0, r"nothing is known here for judge of <lambda>"),
        (lambda solution_str, tokenizer: 1.0, r"nothing is known here for tokenizer of"),
        (lambda question, response, /: 1.0, r"parameters are given by name, and <lambda>"),
        (7, "it is of type int"),
    ],
)
def test_other_signatures_are_refused(function: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        GroupReward(function)
    assert "\n" not in str(error.value)


def test_all_three_forms_are_named() -> None:
    def strange(text: str) -> float:
        return 1.0

    with pytest.raises(ValueError, match="strange") as error:
        GroupReward(strange)
    for form in (r"f(question, response)", "prompts, completions", "data_source, solution_str", "strange(text"):
        assert form in str(error.value)


def test_the_line_that_raised_is_named() -> None:
    def broken(question: Question, response: Response) -> float:
        raise KeyError("x")

    line = inspect.getsourcelines(broken)[1] + 1
    with pytest.raises(RewardError, match=rf"path 0: KeyError: 'x' \(test_rewards_adapt.py, line {line}\)"):
        totals(broken)


# By name.


def test_names_and_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(question, response):\n    return 1.0\n"
        "class Judge:\n    def __call__(self, completions):\n        return [0.0] * len(completions)\n"
        "class Bad:\n    def __init__(self, model):\n        pass\n"
        "def other(text):\n    return 1.0\n"
        "limit = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    made = make_rewards({"my_rewards:short": 2, "my_rewards:Judge": 0.5, "exact_match": 1})
    assert [(GroupReward(function).name, weight) for function, weight in made.items()] == [
        ("short", 2.0),
        ("Judge", 0.5),
        ("exact_match", 1.0),
    ]
    assert list(make_rewards(["math", "format"]).values()) == [1.0, 1.0]
    assert [function.__name__ for function in make_rewards("choice")] == ["choice"]
    for named, problem in (
        (
            "maths",
            "task.rewards = 'maths': expected exact_match, math, numbers, choice, environment, format or package",
        ),
        ("my_rewards:shrt", "task.rewards = 'my_rewards:shrt': my_rewards has no 'shrt'; has short"),
        ("my_rewards:limit", "it is of type int"),
        ("my_rewards:Bad", "making one without arguments failed: TypeError"),
        ("my_rewards:other", "got other(text)"),
        ([], "task.rewards = []: expected a list of names"),
        (["math", "math"], "expected every function once"),
        ({"math": "2"}, "task.rewards.math = '2': expected a finite number as its weight"),
        ({"math": True}, "task.rewards.math = True: expected a finite number as its weight"),
        (3, "task.rewards = 3: expected a list of names or {name: weight}"),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)) as error:
            make_rewards(named)
        assert "\n" not in str(error.value)


def test_tokens_of_a_response_are_given() -> None:
    assert totals(lambda completion_ids: [float(ids == list(tokens("8"))) for ids in completion_ids]) == [0.0, 1.0]


# Faults of the user's code.


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Odd:
    """Its own methods raise."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def item(self) -> float:
        raise KeyError("nothing")

    tolist = item


async def leaves_later(question: Question, response: Response) -> float:
    await asyncio.sleep(0)
    sys.exit(0)


def leaves(question: Question, response: Response) -> float:
    sys.exit(0)


@pytest.mark.parametrize(
    "function", [leaves, leaves_later, lambda question, response: leaves_later(question, response)]
)
def test_exit_is_a_fault_and_not_the_end_of_the_run(function: Any) -> None:
    problem = r"reward \S+, question 't', path 0: SystemExit: 0( \(test_rewards_adapt.py, line \d+\))?$"
    with pytest.raises(RewardError, match=problem):
        totals(function)


def test_ctrl_c_in_a_reward_ends_the_run() -> None:
    def interrupted(question: Question, response: Response) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        totals(interrupted)


def test_an_exception_without_a_text_is_named() -> None:
    def silent(question: Question, response: Response) -> float:
        raise Silent

    with pytest.raises(RewardError, match=r"path 0: Silent: its message cannot be shown \(RuntimeError\) \(test_rew"):
        totals(silent)


def test_values_whose_own_methods_raise() -> None:
    with pytest.raises(RewardError, match="path 0: expected a number or None, got Odd a value that cannot be shown"):
        totals(lambda question, response: Odd())
    with pytest.raises(RewardError, match="expected a list of 2 numbers or None, one per completion, got Odd"):
        totals(lambda completions: Odd())


def test_components_have_texts_as_names() -> None:
    with pytest.raises(RewardError, match="path 0: expected texts as names of components, got int 1"):
        totals(lambda question, response: Reward(1.0, {"a": 1.0, 1: 2.0}, True))  # type: ignore[dict-item]


def test_success_is_true_or_false() -> None:
    def says(success: Any) -> Any:
        return GroupReward(lambda question, response: Reward(0.0, {}, success))(TEXT, (SEVEN,))[0].success  # type: ignore[union-attr]

    assert [says(value) for value in (True, False, np.bool_(True), np.bool_(False), 1, 0.0)] == [True, False] * 3
    for value in ("no", None, 0.5, [True]):
        with pytest.raises(RewardError, match="path 0: expected True or False as the Reward's success, got"):
            says(value)


def test_arrays_beside_verls_score_are_no_components() -> None:
    function = GroupReward(lambda solution_str: {"score": 1.0, "one": np.array([2.0]), "many": np.array([1.0, 2.0])})
    assert [dict(value.components) for value in function(TEXT, (SEVEN,)) if value] == [{"one": 2.0}]


def test_verls_data_source_is_the_column_and_else_the_kind() -> None:
    seen: list[str] = []

    def look(data_source: str, solution_str: str) -> float:
        seen.append(data_source)
        return 0.0

    for data in ({"data_source": "column"}, {}):
        GroupReward(look)(Question("d", "?", "7", "kind", data), (SEVEN,))
    assert seen == ["column", "kind"]


def test_what_a_function_changes_in_a_question_no_other_call_sees() -> None:
    data: dict[str, Any] = {"seen": [0], "nested": {"list": [0]}, "extra_info": {"list": [0]}}
    question, expected = Question("m", "?", [7], "", data), {"seen": 1, "nested": 1, "extra_info": 1}

    def ours(question: Question, response: Response) -> float:
        lengths = {
            name: len(value["list"] if isinstance(value, dict) else value) for name, value in question.data.items()
        }
        question.data["seen"].append(1)
        question.data["nested"]["list"].append(1)
        question.data["extra_info"]["list"].append(1)
        question.data["answer"] = "8"  # type: ignore[index]
        question.answer.append(1)
        return float(lengths == expected)

    def trl(completions: Any, seen: Any, nested: Any) -> list[float]:
        values = []
        for one, other in zip(seen, nested, strict=True):
            values.append(float(len(one) + len(other["list"]) == 2))
            one.append(1)
            other["list"].append(1)
        return values

    def verl(solution_str: str, ground_truth: Any, extra_info: Any) -> float:
        ground_truth.append(1)
        extra_info["list"].append(1)
        return float(len(extra_info["list"]) + len(ground_truth) == 4)

    for function in (ours, trl, verl):
        assert totals(function, question) == [1.0, 1.0]
    assert (question.answer, data) == ([7], {"seen": [0], "nested": {"list": [0]}, "extra_info": {"list": [0]}})


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^task.rewards = .*: expected a weight that is not 0"):
        make_rewards({"math": 0, "format": 0.0})
    assert list(make_rewards({"math": 0, "format": 0.1}).values()) == [0.0, 0.1]
