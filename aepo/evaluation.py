"""Success on held-out questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from aepo.agents.agent import Agent
from aepo.agents.protocol import Task
from aepo.config import Config
from aepo.metrics import Record, evaluation_metrics
from aepo.rollout.engine import Engine
from aepo.rollout.sampler import Sampler
from aepo.scoring import Scorer
from aepo.types import Question


def heldout_questions(task: Task, count: int) -> list[Question]:
    """`count` of them (or all, if there are fewer), evenly spread over the list, always the same."""
    total = len(task.heldout)
    return [task.heldout[i * total // min(count, total)] for i in range(min(count, total))]


def evaluation_sampler(engine: Engine, agent: Agent, config: Config) -> Sampler:
    """One path per question, at the temperature of evaluations."""
    single = replace(config.rollout, paths=1, fresh_paths=1, temperature=config.eval.temperature)
    return Sampler(engine, agent, single)


def evaluate(
    sampler: Sampler,
    scorer: Scorer,
    questions: Sequence[Question],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Record, list[dict[str, Any]]]:
    """Metrics of one path per question, with the time they took, and the answers."""
    start = time.perf_counter()
    scored = scorer.score(sampler.rollout(questions, seed, progress=progress, judge=scorer.begin))
    return {**evaluation_metrics(scored), "seconds": time.perf_counter() - start}, []
