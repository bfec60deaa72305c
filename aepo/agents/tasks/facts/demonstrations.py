"""What the tiny model imitates before AEPO: a hasty demonstrator who searches and calculates in invented worlds.

An invented world has real names and random facts, and no question is asked whose answer there is its true one. So no
answer to a question of the task is learned here, held-out or not, only the format, the tools, and to copy from results.

The demonstrator knows the right steps and often does not take them: it answers with what it has just read, looks up
something else, or gives up. A model that imitates it can do everything and decides badly: what is left to improve are
the decisions, most of them right after a tool result.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from aepo.agents.tasks.facts.geography import MAX_NUMBER, NAMED, World, real_world
from aepo.agents.tasks.facts.task import KINDS, PAIRS, Plan, Step, make_plan, plans, search

# Chance of the right step: at the first step, at later ones, at the answer. After a tool result, the hasty one most
# often (0.44) answers with what it has just read: imitating it at temperature 0 is no better than at temperature 1.
CAREFUL = (1.0, 1.0, 1.0)
HASTY = (0.85, 0.35, 0.9)
OTHER_SEARCH = 0.2  # of the mistakes after a tool result; those at the first step are all searches for something else
GIVES_UP = 0.15  # of the answers after a mistake
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Demonstration:
    """A question, the tool calls that the demonstrator made with their results, and its answer."""

    question: str
    steps: tuple[Step, ...]
    answer: str
    right: bool


def demonstrations(seed: str, skill: tuple[float, float, float]) -> Iterator[Demonstration]:
    """Without end; every kind of question equally often."""
    draw = random.Random(seed)
    while True:
        plan, world = _invented_question(draw.choice(KINDS), draw)
        yield demonstrate(plan, world, skill, draw)


def invented_world(draw: random.Random) -> World:
    """Three countries with a fact of every relation."""
    real = real_world()
    countries = draw.sample(list(real), 3)
    world: dict[str, dict[str, str]] = {country: {} for country in countries}
    for relation in NAMED:
        names = [facts[relation] for facts in real.values() if relation in facts]
        for country, name in zip(countries, draw.sample(names, 3), strict=True):
            world[country][relation] = name
    for country, facts in world.items():
        facts["neighbour"] = draw.choice([other for other in countries if other != country])
        for relation in ("population", "area"):  # small numbers as often as large ones
            facts[relation] = str(round(math.exp(draw.uniform(0, math.log(MAX_NUMBER)))))
    return world


def demonstrate(plan: Plan, world: World, skill: tuple[float, float, float], draw: random.Random) -> Demonstration:
    """Follow a plan up to the first mistake, and answer after it."""
    first, later, last = skill
    taken: list[Step] = []
    for step in plan.steps:
        if draw.random() < (later if taken else first):
            taken.append(step)
            continue
        if not taken or draw.random() < OTHER_SEARCH:
            taken += _other_search(step, taken, world, draw)
        answer = UNKNOWN if not taken or draw.random() < GIVES_UP else taken[-1].found
        break
    else:
        answer = plan.answer if draw.random() < last else UNKNOWN
    return Demonstration(plan.text, tuple(taken), answer, answer == plan.answer)


def _invented_question(kind: str, draw: random.Random) -> tuple[Plan, World]:
    while True:
        world = invented_world(draw)
        country, other = draw.sample(list(world), 2)
        plan = make_plan(kind, world, country, other)
        if plan is not None and plan.answer != _true_answer(plan, country, other):
            return plan, world


def _true_answer(plan: Plan, country: str, other: str) -> str | None:
    """Of the same question about the real world; None: it is not asked there."""
    if plan.kind in PAIRS:
        real = make_plan(plan.kind, real_world(), country, other)
        return real.answer if real else None
    return _true_answers().get(plan.text)


@functools.cache
def _true_answers() -> Mapping[str, str]:
    """Of all questions but those about two countries, which are very many."""
    world = real_world()
    return {p.text: p.answer for kind in KINDS if kind not in PAIRS for p in plans(world, list(world), kind)}


def _other_search(step: Step, taken: list[Step], world: World, draw: random.Random) -> list[Step]:
    """In place of a step, something else about the country in question; nothing, if no country is known yet."""
    if step.argument.endswith(f" of {step.country}"):
        country = step.country
    elif taken:
        country = taken[-1].country
    else:
        return []
    asked = step.argument.removesuffix(f" of {country}")
    return [search(world, draw.choice([relation for relation in world[country] if relation != asked]), country)]
