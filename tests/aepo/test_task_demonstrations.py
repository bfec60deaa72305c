"""Demonstrations: their worlds are invented, their searches possible, their quality as documented."""

import itertools
from collections import Counter

from aepo.agents.tasks.facts.demonstrations import CAREFUL, HASTY, demonstrations
from aepo.agents.tasks.facts.geography import real_world
from aepo.agents.tasks.facts.task import KINDS, make_plan, plans


def take(count: int, skill: tuple[float, float, float], seed: str = "0"):
    return list(itertools.islice(demonstrations(seed, skill), count))


def test_no_question_is_demonstrated_with_its_true_answer() -> None:
    countries = list(real_world())
    true = {plan.text: plan.answer for kind in KINDS for plan in plans(real_world(), countries, kind)}
    asked = [d for d in take(3000, CAREFUL) if d.question in true]
    assert len(asked) > 500  # the names are real, so the questions are; the answers are not
    assert not [d for d in asked if true[d.question] == d.answer]


def test_a_careful_demonstrator_is_right_and_a_hasty_one_often_not() -> None:
    assert all(d.right for d in take(500, CAREFUL))
    hasty = take(4000, HASTY)
    right = sum(d.right for d in hasty) / len(hasty)
    # By kinds with 1, 2 and 3 steps: 0.2 * 0.77 + 0.5 * 0.27 + 0.3 * 0.09 = 0.31, standard error 0.008.
    assert abs(right - 0.31) < 0.035
    continued = [d.steps[1:] != () for d in hasty if len(d.steps) > 0 and d.question.startswith("How many")]
    assert sum(continued) / len(continued) < 0.5  # the most frequent next move is the wrong one
    assert 0.05 < sum(d.answer == "unknown" for d in hasty) / len(hasty) < 0.35


def test_the_demonstrator_searches_only_for_what_it_has_read() -> None:
    for demonstration in take(2000, HASTY):
        read = demonstration.question
        for step in demonstration.steps:
            if step.tool == "search":
                assert (
                    step.argument.split(" of ")[-1].removeprefix("city ").removeprefix("country with capital ") in read
                )
            read += " " + step.result
        assert demonstration.answer == "unknown" or demonstration.answer in read


def test_the_same_seed_gives_the_same_demonstrations_of_every_kind() -> None:
    assert take(50, HASTY) == take(50, HASTY)
    assert take(50, HASTY) != take(50, HASTY, seed="1")
    steps = Counter(len(d.steps) for d in take(300, CAREFUL))
    assert set(steps) == {1, 2, 3}


def test_plans_of_invented_worlds_are_plans_of_the_task() -> None:
    world = {"Oz": {"capital": "Ixton"}}
    plan = make_plan("capital", world, "Oz")
    assert plan is not None
    assert plan.steps[0].result == "Oz: Ixton is the capital of Oz."
