"""Evaluations while a run goes on: at its start, every `eval.every` steps and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from aepo.config import Config
from aepo.evaluation import Evaluator, answer_metrics
from aepo.run.display import Display
from aepo.run.log import RunLog
from aepo.types import Question


class HeldOut:
    """interruptible: in it a signal may end an evaluation, which then is made up for when the run is resumed."""

    def __init__(
        self,
        evaluator: Evaluator,
        questions: Sequence[Question],
        config: Config,
        log: RunLog,
        display: Display,
        interruptible: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._evaluator, self._questions, self._config = evaluator, questions, config
        self._log, self._display, self._interruptible = log, display, interruptible

    def is_due(self, step: int) -> bool:
        """A resumed run repeats none."""
        every, steps = self._config.eval.every, self._config.train.steps
        return self._log.heldout_success(step) is None and (step in (0, steps) or (every > 0 and step % every == 0))

    def evaluate(self, step: int) -> bool:
        """Returns whether it is the best so far."""
        self._display.stage("evaluation")
        start = time.perf_counter()
        with self._interruptible():
            answered = list(self._evaluator.answers(self._questions, self._display.paths))
        metrics = answer_metrics(answered, self._config.eval.pass_at)
        record = {"step": step, **metrics, "seconds": time.perf_counter() - start}
        best = max((before["success"] for before in self._log.evaluations()), default=-1.0)
        self._log.answers(step, answered)
        self._log.evaluation(record)
        self._display.evaluation(record)
        return record["success"] > best
