"""Scoring paths, and success on held-out questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aepo.agents.protocol import Task
from aepo.agents.tools.toolbox import ToolBox
from aepo.config import Config
from aepo.metrics import Record, evaluation_metrics
from aepo.rollout.engine import Engine
from aepo.rollout.sampler import Sampler
from aepo.rollout.tree import path_nodes
from aepo.types import Question, Reward, RolloutTree

if TYPE_CHECKING:
    from aepo.load import LanguageModel


def path_rewards(task: Task, language_model: LanguageModel, tree: RolloutTree) -> list[Reward]:
    """The reward of every path, from its text after the prompt."""
    rewards = []
    for path in tree.paths:
        response = [token for node in path_nodes(tree, path.id)[1:] for token in node.token_ids]
        rewards.append(task.reward(tree.question, language_model.decode(response), path.finish_reason))
    return rewards


def heldout_questions(task: Task, count: int) -> list[Question]:
    """`count` of them (or all, if there are fewer), evenly spread over the list, always the same."""
    total = len(task.heldout)
    return [task.heldout[i * total // min(count, total)] for i in range(min(count, total))]


def evaluation_sampler(engine: Engine, toolbox: ToolBox, language_model: LanguageModel, config: Config) -> Sampler:
    """One path per question, at the temperature of evaluations."""
    single = replace(config.rollout, paths=1, fresh_paths=1, temperature=config.eval.temperature)
    return Sampler(engine, toolbox, language_model, single)


def evaluate(
    task: Task,
    language_model: LanguageModel,
    sampler: Sampler,
    questions: Sequence[Question],
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Metrics of one path per question, with the time they took."""
    start = time.perf_counter()
    trees = sampler.rollout(questions, seed, progress=progress)
    rewards = [path_rewards(task, language_model, tree) for tree in trees]
    return {**evaluation_metrics(trees, rewards), "seconds": time.perf_counter() - start}
