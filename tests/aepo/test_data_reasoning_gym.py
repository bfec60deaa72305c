"""The task of reasoning-gym's generators, with the package itself."""

from __future__ import annotations

import time
from typing import Any

import pytest
from scoring_toys import response_of

from aepo.agents.tasks.reasoning_gym import ReasoningGymTask, _harmless
from aepo.config import load_config
from aepo.load import load_task

pytest.importorskip("reasoning_gym")


def test_questions_of_several_generators_in_turn() -> None:
    task = ReasoningGymTask({"chain_sum": {"max_terms": 3}, "leg_counting": {}}, size=50, heldout=10, seed=3)
    assert (len(task.train), len(task.heldout)) == (50, 10)
    assert [question.kind for question in task.train[:4]] == ["chain_sum", "leg_counting"] * 2
    again = ReasoningGymTask({"chain_sum": {"max_terms": 3}, "leg_counting": {}}, size=50, heldout=10, seed=3)
    assert list(again.train) == list(task.train)
    assert again.heldout == task.heldout
    assert again.identity == task.identity
    other = ReasoningGymTask({"chain_sum": {"max_terms": 3}, "leg_counting": {}}, size=50, heldout=10, seed=4)
    assert not {q.prompt for q in other.train} & {q.prompt for q in task.train if q.kind == "leg_counting"}
    assert other.identity != task.identity
    assert task.train[-1] == task.train[49]
    with pytest.raises(IndexError):
        task.train[50]


def test_training_and_held_out_prompts_are_disjoint() -> None:
    """One-digit sums of two: 81 prompts or a few more, of which many come twice."""
    settings = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    task = ReasoningGymTask(settings, size=200, heldout=20)
    heldout = {question.prompt for question in task.heldout}
    assert len({question.prompt for question in task.train}) > 30
    assert not heldout & {question.prompt for question in task.train}
    assert len({question.id for question in task.train}) == 200


def test_a_generator_with_too_few_questions() -> None:
    settings = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    with pytest.raises(ValueError, match="chain_sum has too few different questions: 50 in a row are held-out ones"):
        list(ReasoningGymTask(settings, size=100, heldout=5000).train)


def test_the_packages_scorer_is_the_reward() -> None:
    task = ReasoningGymTask("chain_sum", size=5, heldout=5)
    question = task.train[0]
    assert task.reward(question, response_of(f" {question.answer} ")) == 1.0
    assert task.reward(question, response_of("no")) == 0.0
    assert task.reward(question, response_of(question.answer, "length")) == 0.0  # it gave no answer


def test_making_a_large_task_is_quick() -> None:
    start = time.process_time()
    assert len(ReasoningGymTask("chain_sum", size=1_000_000, heldout=100).train) == 1_000_000
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("name", "answer", "harmless"),
    [
        ("chain_sum", "__import__('os')", True),  # compared as text
        ("n_queens", "[['_', 'Q'], ['Q', '_']]", True),
        ("n_queens", "[print(1)]", False),
        ("binary_matrix", "[[0] * 9999999999]", False),
        ("countdown", "(3 + 4) * 5 - 2/1", True),
        ("countdown", "9**9**9", False),
        ("countdown", "exit()", False),
        ("polynomial_multiplication", "3*x**12 - 4*x*y + 1", True),
        ("simple_integration", "(2*x + 1)**3/6 + sin(x) + C", True),
        ("polynomial_multiplication", "9**9**9", False),
        ("polynomial_multiplication", "((((9**99)**9)**9)**9)**9", False),
        ("polynomial_multiplication", "x**999999999", False),
        ("simple_integration", "exec", False),
        ("simple_integration", "x.__class__", False),
        ("simple_integration", "open(x)", False),
    ],
)
def test_scorers_that_run_answers_get_harmless_ones(name: str, answer: str, harmless: bool) -> None:
    assert _harmless(name, answer) == harmless


def test_an_answer_is_never_run(capsys: pytest.CaptureFixture[str]) -> None:
    task = ReasoningGymTask(["countdown", "n_queens", "spiral_matrix"], size=6, heldout=3)
    for question in task.train:
        assert task.reward(question, response_of("[print('run')]")) in (0.0, 0.01)
        assert task.reward(question, response_of("print('run')")) in (0.0, 0.01)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dataset": "chain_sums"}, "task.options.dataset = 'chain_sums': reasoning-gym has none of this name; it has"),
        ({"dataset": []}, r"task.options.dataset = \[\]: expected a name"),
        ({"dataset": 7}, "task.options.dataset = 7: expected a name"),
        ({"dataset": {"chain_sum": {"terms": 1}}}, "task.options.dataset.chain_sum = {'terms': 1}: TypeError"),
        ({"dataset": {"chain_sum": {"max_terms": 1}}}, "AssertionError: max_terms must be >= min_terms"),
        ({"dataset": {"chain_sum": {"seed": 1}}}, "task.options.dataset.chain_sum.seed: expected task.seed"),
        ({"size": 0}, "task.options.size = 0: expected a number of questions from 1 to"),
        ({"heldout": 0.1}, "task.options.heldout = 0.1: expected a number of questions"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        ReasoningGymTask(**options)
    assert "\n" not in str(error.value)


def test_a_seed_among_the_options_comes_before_the_tasks() -> None:
    def prompts(*settings: str) -> list[str]:
        options = ["task.options.dataset=chain_sum", "task.options.size=5", "task.options.heldout=2"]
        task = load_task(load_config(None, ["task.name=reasoning_gym", *options, *settings]).task)
        return [question.prompt for question in task.train]

    assert prompts("task.seed=3") != prompts("task.seed=4")
    assert prompts("task.options.seed=3", "task.seed=4") == prompts("task.seed=3")
