"""Answers of the present weights to questions, and what they say: success, pass@k, intervals, tool calls, tokens.

An evaluation is a rollout in which every path starts from the question, so it needs nothing but a sampler and a scorer.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

from aepo.agents.agent import Agent
from aepo.answers import AnsweredQuestion, read_answers
from aepo.config import Config
from aepo.estimates import Interval, interval, pass_at_k
from aepo.rollout.engine import Engine
from aepo.rollout.sampler import Progress, Sampler
from aepo.run.records import Record
from aepo.scoring import Scorer
from aepo.types import FinishReason, Question, ScoredTree


def sampled_questions(questions: Sequence[Question], count: int | None = None) -> list[Question]:
    """`count` of them (or all, if there are fewer), drawn from the whole list, always the same. None: all.

    Not every n-th one: rows that cycle through kinds would leave kinds out.
    """
    total = len(questions)
    if count is None or count >= total:
        return list(questions)
    return [questions[i] for i in sorted(random.Random(total).sample(range(total), count))]


class Evaluator:
    """Answers to questions with the weights that the engine has: `eval.samples` paths each, all from the question."""

    def __init__(self, engine: Engine, agent: Agent, scorer: Scorer, config: Config) -> None:
        samples = config.eval.samples
        rollout = replace(config.rollout, paths=samples, fresh_paths=samples, temperature=config.eval.temperature)
        self._sampler = Sampler(engine, agent, rollout)
        self._scorer = scorer
        self._format = agent.format
        self._at_once = questions_at_once(config, samples)
        # Every evaluation of a run draws the same random numbers, and none those of a training step.
        self._seed = (config.run.seed << 32) + (1 << 31)

    def answers(self, questions: Sequence[Question], progress: Progress | None = None) -> Iterator[AnsweredQuestion]:
        """In order. Of a tree that has answered, nothing is kept of what only training needs: tokens, log-probs."""
        trees = scored_rollouts(
            self._sampler, self._scorer, questions, self._seed, at_once=self._at_once, progress=progress
        )
        return (read_answers(scored, self._format) for scored in trees)


def questions_at_once(config: Config, paths: int) -> int:
    """How many questions with so many paths fit where a training batch fits, or keep vLLM busy."""
    at_once = config.train.questions * config.rollout.paths
    if config.rollout.engine == "vllm":
        at_once = max(at_once, 4 * config.vllm.max_num_seqs * config.vllm.replicas)
    return max(at_once // paths, 1)


def scored_rollouts(
    sampler: Sampler,
    scorer: Scorer,
    questions: Sequence[Question],
    seed: int,
    *,
    at_once: int,
    progress: Progress | None = None,
) -> Iterator[ScoredTree]:
    """A tree with rewards per question, in order, `at_once` questions at a time: what was yielded is finished,
    whatever happens afterwards. The random numbers of a question do not depend on those it is sampled with."""
    for first in range(0, len(questions), at_once):
        part = questions[first : first + at_once]

        def report(finished: int, total: int, first: int = first, count: int = len(part)) -> None:
            if progress is not None:
                paths = total // count
                progress(first * paths + finished, len(questions) * paths)

        trees = sampler.rollout(part, seed, progress=report, judge=scorer.begin)
        yield from scorer.score(trees)


def answer_metrics(answered: Sequence[AnsweredQuestion], pass_at: Sequence[int] = ()) -> Record:
    """Means over all answers, and by the kind of question. pass@k where there are several samples: of one it is the
    success."""
    samples = [sample for item in answered for sample in item.samples]
    components = defaultdict(list)
    for sample in samples:
        for name, value in sample.components.items():
            components[name].append(value)
    finished = Counter(sample.finish_reason for sample in samples)
    return {
        **{name: _mean(values) for name, values in question_values(answered, pass_at).items()},
        **{f"reward.{name}": _mean(components[name]) for name in sorted(components)},
        "questions": len(answered),
        "samples": len(samples) / len(answered),
        "tool_calls": _mean([sample.tool_calls for sample in samples]),
        "tool_failures": _mean([sample.tool_failures for sample in samples]),
        "tokens": _mean([sample.tokens for sample in samples]),
        **{f"finish.{reason}": finished[reason] / len(samples) for reason in get_args(FinishReason)},
    }


def answer_intervals(
    answered: Sequence[AnsweredQuestion], pass_at: Sequence[int], seed: int
) -> dict[str, Interval | None]:
    """Of those metrics that depend on the choice of questions; None: resampling cannot tell."""
    return {name: interval(values, seed) for name, values in question_values(answered, pass_at).items()}


def question_values(answered: Sequence[AnsweredQuestion], pass_at: Sequence[int]) -> dict[str, list[float]]:
    """One number per question of each metric that has an interval; also of the questions of each kind with a name."""
    groups = {"": answered, **{f".{kind}": group for kind, group in by_kind(answered).items()}}
    values = {f"success{name}": [_share(item) for item in group] for name, group in groups.items()}
    for k in pass_at if len(answered[0].samples) > 1 else ():
        values |= {f"pass@{k}{name}": [_pass_at(item, k) for item in group] for name, group in groups.items()}
    return {**values, "reward": [_mean([sample.reward for sample in item.samples]) for item in answered]}


def by_kind(answered: Sequence[AnsweredQuestion]) -> dict[str, list[AnsweredQuestion]]:
    """The questions of each kind that has a name, in the order of the names."""
    kinds = sorted({item.question.kind for item in answered} - {""})
    return {kind: [item for item in answered if item.question.kind == kind] for kind in kinds}


def _share(item: AnsweredQuestion) -> float:
    return _successes(item) / len(item.samples)


def _pass_at(item: AnsweredQuestion, k: int) -> float:
    return pass_at_k(len(item.samples), _successes(item), k)


def _successes(item: AnsweredQuestion) -> int:
    return sum(sample.success for sample in item.samples)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
