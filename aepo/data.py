"""The questions of a run: those that the model has room for, and which of them a step draws."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from aepo.agents.agent import Agent
from aepo.agents.question_checks import Context, check_questions, fitting, one_of_each_row
from aepo.config import Config
from aepo.evaluation import sampled_questions
from aepo.types import Question


class RunQuestions:
    """What is trained on, and what is held out. ValueError: the task is too small for the configuration."""

    def __init__(self, config: Config, agent: Agent) -> None:
        self._config, self._agent = config, agent
        _check_sizes(config, agent.task.name, agent.task.train, agent.task.heldout)
        self.train: Sequence[Question] = agent.task.train
        self.heldout: Sequence[Question] = sampled_questions(agent.task.heldout, config.eval.questions)

    def one_of_each_row(self) -> list[Question]:
        return [*one_of_each_row(self.train), *one_of_each_row(self.heldout)]

    def check(self, console: Console) -> None:
        """ValueError: what would end a run when such a question is drawn."""
        check_questions(self._agent, self.train, "training", console)
        check_questions(self._agent, self.heldout, "held-out", console)

    def drop_long_prompts(self, positions: int, console: Console) -> dict[str, Any]:
        """The entry of run.json. positions: of the engine. ValueError: there are some, and `task.long_prompts` is not
        drop; or too few others."""
        config, context = self._config, Context.of(self._config, positions)
        drop, before = config.task.long_prompts == "drop", (len(self.train), len(self.heldout))
        self.train = fitting(self._agent, self.train, "training", context, console, drop=drop)
        self.heldout = fitting(self._agent, self.heldout, "held-out", context, console, drop=drop)
        _check_sizes(config, self._agent.task.name, self.train, self.heldout)
        train, heldout = before[0] - len(self.train), before[1] - len(self.heldout)
        return {"long_prompts_dropped": {"train": train, "heldout": heldout}} if drop else {}

    def of_step(self, step: int) -> list[Question]:
        return questions_of_step(self.train, self._config.run.seed, step, self._config.train.questions)


def _check_sizes(config: Config, task: str, train: Sequence[Question], heldout: Sequence[Question]) -> None:
    if len(train) < config.train.questions:
        raise ValueError(
            f"train.questions = {config.train.questions}: expected <= the task's {len(train)} training questions"
        )
    if not heldout:
        raise ValueError(f"task {task!r} has no held-out questions")


def stream(seed: int, step: int) -> int:
    """The seed of everything random in a step."""
    return (seed << 32) + step


def questions_of_step(questions: Sequence[Question], seed: int, step: int, count: int) -> list[Question]:
    """The `count` different questions of a step (1, 2, ...): every pass over the data is a new shuffle, and ends where
    no full batch is left."""
    batches = len(questions) // count
    epoch, batch = divmod(step - 1, batches)
    order = list(range(len(questions)))
    random.Random(stream(seed, epoch)).shuffle(order)
    return [questions[i] for i in order[batch * count : (batch + 1) * count]]
