"""The facts task: its questions can be answered through its tools, have one answer, and do not leak between splits."""

import asyncio
import re
from collections import Counter, defaultdict
from contextlib import closing

import pytest

from aepo.agents.agent import Agent
from aepo.agents.tasks.facts.geography import NAMED, documents, real_world
from aepo.agents.tasks.facts.task import KINDS, PAIRS, FactsTask, Plan, make_plan, plans
from aepo.agents.tasks.facts.warmstart import untrained
from aepo.config import Config, WarmStartConfig
from aepo.load import load_agent
from aepo.types import Response, ToolResult, Turn

MODEL = untrained(WarmStartConfig(steps=0))
WORLD = {
    "Oz": {"capital": "Emerald City", "city": "Gillikin", "currency": "Spoon", "population": "8", "area": "16"},
    "Ix": {"capital": "Ixton", "currency": "Button", "population": "3", "area": "999", "neighbour": "Oz"},
}


@pytest.fixture(scope="module")
def task() -> FactsTask:
    return FactsTask(seed=0)


@pytest.mark.parametrize(
    ("kind", "country", "other", "calls", "answer", "entities"),
    [
        ("currency", "Oz", None, ["currency of Oz"], "Spoon", ("Oz", "Spoon")),
        (
            "capital_to_currency",
            "Ix",
            None,
            ["country with capital Ixton", "currency of Ix"],
            "Button",
            ("Ixton", "Ix", "Button"),
        ),
        (
            "city_to_capital",
            "Oz",
            None,
            ["country of city Gillikin", "capital of Oz"],
            "Emerald City",
            ("Gillikin", "Oz", "Emerald City"),
        ),
        ("neighbour_to_currency", "Ix", None, ["neighbour of Ix", "currency of Oz"], "Spoon", ("Ix", "Oz", "Spoon")),
        ("sum", "Ix", "Oz", ["population of Ix", "population of Oz", "print(3 + 8)"], "11", ("Ix", "Oz")),
        ("difference", "Oz", "Ix", ["population of Oz", "population of Ix", "print(8 - 3)"], "5", ("Oz", "Ix")),
        ("density", "Oz", None, ["population of Oz", "area of Oz", "print(round(8 * 1000 / 16))"], "500", ("Oz",)),
    ],
)
def test_hand_made_questions(
    kind: str, country: str, other: str | None, calls: list[str], answer: str, entities: tuple[str, ...]
) -> None:
    plan = make_plan(kind, WORLD, country, other)
    assert plan is not None
    assert ([step.argument for step in plan.steps], plan.answer, plan.entities) == (calls, answer, entities)


def test_questions_without_a_fact_or_with_a_number_out_of_range_do_not_exist() -> None:
    assert make_plan("city_to_capital", WORLD, "Ix") is None  # no city
    assert make_plan("difference", WORLD, "Ix", "Oz") is None  # negative
    assert make_plan("density", {"Oz": {"population": "999", "area": "1"}}, "Oz") is None  # too large


def test_facts_are_those_of_the_world() -> None:
    poland = real_world()["Poland"]
    assert (poland["capital"], poland["currency"], poland["population"], poland["area"]) == (
        "Warsaw",
        "Zloty",
        "38",
        "313",
    )
    assert real_world()["Portugal"]["neighbour"] == "Spain"
    assert "Peru: Lima is the capital of Peru." in documents(real_world())


def test_a_name_stands_for_one_thing() -> None:
    names = [facts[relation] for facts in real_world().values() for relation in NAMED if relation in facts]
    assert max(Counter([*real_world(), *names]).values()) == 1


def test_every_question_has_one_answer() -> None:
    answers = defaultdict(set)
    for kind in KINDS:
        for plan in plans(real_world(), list(real_world()), kind):
            answers[plan.text].add(plan.answer)
    assert len(answers) > 10_000
    assert all(len(found) == 1 for found in answers.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_share_no_answer_path(seed: int) -> None:
    task = FactsTask(seed)
    train = {entity for plan in task.train_plans for entity in plan.entities}
    heldout = {entity for plan in task.heldout_plans for entity in plan.entities}
    assert not train & heldout
    # Nor any name along the way, or in the question, that the entities forgot.
    texts = " ".join(f"{plan.text} {step.result}" for plan in task.train_plans for step in plan.steps)
    assert not [
        name
        for name in heldout
        if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", texts) and name not in str(train)
    ]
    assert len(task.train) > 500
    assert len(task.heldout) > 250
    for questions in (task.train, task.heldout):
        assert len({question.id for question in questions}) == len(questions)
        assert {question.kind for question in questions} == set(KINDS)


def test_a_seed_means_the_same_questions() -> None:
    assert FactsTask(1).train == FactsTask(1).train
    assert FactsTask(1).heldout != FactsTask(0).heldout


def test_an_oracle_is_always_right_through_the_real_tools(task: FactsTask) -> None:
    chosen = [*task.heldout_plans, *task.train_plans[::3]]
    questions = [*task.heldout, *task.train[::3]]
    with closing(load_agent(Config(), MODEL, task)) as agent:
        responses = asyncio.run(_play(chosen, agent))
    for question, response in zip(questions, responses, strict=True):
        reward = task.reward(question, response)
        assert reward.success, (question, response)
        assert reward.total == pytest.approx(1)


async def _play(chosen: list[Plan], agent: Agent) -> list[Response]:
    """Every step written, read and run; the answer is read off the last result, not taken from the plan."""
    turns: list[list[Turn]] = [[] for _ in chosen]
    results: list[list[tuple[ToolResult, ...]]] = [[] for _ in chosen]
    for number in range(max(len(plan.steps) for plan in chosen)):
        active = [i for i, plan in enumerate(chosen) if number < len(plan.steps)]
        for i in active:
            step = chosen[i].steps[number]
            turns[i].append(_written(agent, f"<{step.tool}> {step.argument}</{step.tool}>"))
        found = await agent.toolbox.run([call for i in active for call in turns[i][-1].calls])
        for i, result in zip(active, found, strict=True):
            assert result.error is None
            assert result.text == chosen[i].steps[number].result
            results[i].append((result,))
    for i, plan in enumerate(chosen):
        turns[i].append(_written(agent, f"<answer> {_read(plan, results[i][-1][0].text)}</answer>"))
    return [Response("", tuple(t), tuple(r), "answered", ()) for t, r in zip(turns, results, strict=True)]


def _written(agent: Agent, text: str) -> Turn:
    return agent.format.read(MODEL.tokenizer.encode(text, add_special_tokens=False), "stop")


def _read(plan: Plan, last: str) -> str:
    if plan.kind in (*PAIRS, "density"):
        return last
    match = re.search(r": (?:(.*) is the capital of|the currency of .* is the (.*)\.)", last)
    assert match is not None
    return match[1] or match[2]
