"""The default task: questions about countries that take one or more searches, and for some of them a calculation.

    Q: What is the currency of the country whose capital is Warsaw?
    <search> country with capital Warsaw</search><result> Warsaw is the capital of Poland.</result>
    <search> currency of Poland</search><result> The currency of Poland is the Zloty.</result>
    <answer> Zloty</answer>

Countries are divided into training and held-out ones, and every name that a question touches belongs to one country:
no answer path of a held-out question passes through anything that training has seen.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aepo.agents.protocol import Task, Tool
from aepo.agents.tasks.facts.geography import MAX_NUMBER, NAMED, World, documents, real_world, sentence
from aepo.agents.tasks.facts.prompt import opening
from aepo.agents.tasks.facts.reward import answer_reward
from aepo.agents.tools.python import PythonTool
from aepo.agents.tools.search import SearchTool
from aepo.types import Message, Question, Response, Reward

HELDOUT_SHARE = 0.35  # of the countries
MAX_TRAIN = 120  # questions of one kind
MAX_HELDOUT = 60


@dataclass(frozen=True)
class Step:
    """One right tool call."""

    tool: str
    argument: str
    result: str  # what the tool answers
    country: str  # the subject of the search, or "" for a calculation
    found: str  # the name or number that the step is for


@dataclass(frozen=True)
class Plan:
    """A question with the tool calls that answer it."""

    kind: str
    text: str
    steps: tuple[Step, ...]
    answer: str
    entities: tuple[str, ...]


KINDS = (
    "capital",
    "currency",
    "capital_to_currency",
    "city_to_capital",
    "city_to_currency",
    "neighbour_to_capital",
    "neighbour_to_currency",
    "sum",
    "difference",
    "density",
)
PAIRS = ("sum", "difference")  # kinds that ask about two countries


def make_plan(kind: str, world: World, country: str, other: str | None = None) -> Plan | None:
    """The question of a kind about a country (and, for `PAIRS`, another one).

    None where a fact is missing, or the numbers do not fit: results are positive and at most MAX_NUMBER.
    """
    try:
        plan = (
            _calculation(kind, world, country, other) if kind in (*PAIRS, "density") else _look_up(kind, world, country)
        )
    except KeyError:  # a fact that this world does not have
        return None
    fits = plan.steps[-1].tool == "search" or 0 < int(plan.answer) <= MAX_NUMBER
    return plan if fits else None


def _look_up(kind: str, world: World, country: str) -> Plan:
    start, _, relation = kind.rpartition("_to_")
    steps: tuple[Step, ...] = ()
    subject, text = country, f"What is the {relation} of {country}?"
    if start == "neighbour":
        steps = (search(world, "neighbour", country),)
        subject = steps[0].found
        text = f"What is the {relation} of the most populous neighbour of {country}?"
    elif start:
        steps = (reverse_search(world, start, country),)
        clue = world[country][start]
        text = {
            "capital": f"What is the {relation} of the country whose capital is {clue}?",
            "city": f"What is the {relation} of the country in which the city {clue} lies?",
        }[start]
    steps += (search(world, relation, subject),)
    clues = [world[country][start]] if start in NAMED else []
    entities = (*clues, country, *([subject] if subject != country else []), steps[-1].found)
    return Plan(kind, text, steps, steps[-1].found, entities)


def _calculation(kind: str, world: World, country: str, other: str | None) -> Plan:
    first = search(world, "population", country)
    if kind == "density":
        second = search(world, "area", country)
        text = f"How many people per square kilometre live in {country}?"
        code = f"round({first.found} * 1000 / {second.found})"
        result = round(int(first.found) * 1000 / int(second.found))
    else:
        if other is None:
            raise TypeError(f"kind {kind!r} asks about two countries: other is None")
        second = search(world, "population", other)
        sign, text = {
            "sum": ("+", f"How many million people live in {country} and {other} together?"),
            "difference": ("-", f"How many more million people live in {country} than in {other}?"),
        }[kind]
        code = f"{first.found} {sign} {second.found}"
        result = int(first.found) + int(f"{sign}{second.found}")
    steps = (first, second, Step("python", f"print({code})", str(result), "", str(result)))
    return Plan(kind, text, steps, str(result), (country, *([other] if other else [])))


def search(world: World, relation: str, country: str) -> Step:
    """Look up a fact about a country. KeyError: the world does not have it."""
    value = world[country][relation]
    return Step("search", f"{relation} of {country}", sentence(relation, country, value), country, value)


def reverse_search(world: World, relation: str, country: str) -> Step:
    """Find the country by its capital or one of its cities."""
    value = world[country][relation]
    query = {"capital": f"country with capital {value}", "city": f"country of city {value}"}[relation]
    return Step("search", query, sentence(relation, country, value), country, country)


def plans(world: World, countries: Sequence[str], kind: str, draw: random.Random | None = None) -> Iterator[Plan]:
    """All questions of a kind that pass through no other countries, in a random order if `draw` is given."""
    pairs = kind in PAIRS
    subjects = list(itertools.permutations(countries, 2)) if pairs else [(country, None) for country in countries]
    if draw is not None:
        draw.shuffle(subjects)
    for country, other in subjects:
        plan = make_plan(kind, world, country, other)
        if plan is not None and all(step.country in countries for step in plan.steps if step.country):
            yield plan


def split_countries(world: World, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out countries."""
    names = sorted(world)
    random.Random(f"split {seed}").shuffle(names)
    count = round(HELDOUT_SHARE * len(names))
    return names[count:], names[:count]


def choose_plans(world: World, countries: Sequence[str], most: int, seed: str) -> list[Plan]:
    """At most so many questions of each kind, in a random order.

    A few facts are left out that the search does not find: names that share words with others (El Salvador and San
    Salvador) can rank another sentence first.
    """
    draw, find = random.Random(seed), SearchTool(documents(world), top_k=1)
    chosen: list[Plan] = []
    for kind in KINDS:
        of_kind = plans(world, countries, kind, draw)
        answerable = (p for p in of_kind if all(find(s.argument) == s.result for s in p.steps if s.tool == "search"))
        chosen += itertools.islice(answerable, most)
    draw.shuffle(chosen)
    return chosen


class FactsTask(Task):
    """Questions over the real world. seed: of the division into training and held-out questions.

    The tools are made anew each time (the Python tool starts a process); the `ToolBox` that is given them closes them.
    """

    name = "facts"
    tool_instructions = ""  # INSTRUCTIONS say it all

    def __init__(self, seed: int = 0) -> None:
        world = real_world()
        train, heldout = split_countries(world, seed)
        self.train_plans = choose_plans(world, train, MAX_TRAIN, f"train {seed}")
        self.heldout_plans = choose_plans(world, heldout, MAX_HELDOUT, f"heldout {seed}")
        self.train = [_question(plan) for plan in self.train_plans]
        self.heldout = [_question(plan) for plan in self.heldout_plans]

    @property
    def tools(self) -> Sequence[Tool]:  # type: ignore[override]  # made anew: the Python tool holds a process
        return SearchTool(documents(real_world()), top_k=1), PythonTool()

    def reward(self, question: Question, response: Response) -> Reward:
        """See `aepo.agents.tasks.facts.reward.answer_reward`."""
        return answer_reward(question, response)

    def messages(self, question: Question, *, chat: bool) -> tuple[Message, ...]:
        """A pretrained model is told about the tools and shown two dialogues; the tiny one knows what to do."""
        return (*opening(), *question.messages) if chat else question.messages


def _question(plan: Plan) -> Question:
    return Question(f"{plan.kind}: {' > '.join(plan.entities)}", plan.text, plan.answer, plan.kind)
