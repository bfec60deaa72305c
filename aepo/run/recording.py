"""What a step leaves in the run directory: its record, and now and then its rollout trees."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from aepo.config import Config
from aepo.learning.batch import Batch, Update
from aepo.run.clock import StageClock
from aepo.run.display import Display
from aepo.run.log import RunLog
from aepo.run.metrics import loss_metrics, memory_metrics, mismatch_metrics, rollout_metrics
from aepo.run.records import Record
from aepo.types import ScoredTree


class StepRecorder:
    """decode: of the agent's format, for the text of every token."""

    def __init__(
        self,
        log: RunLog,
        display: Display,
        config: Config,
        vocab_size: int,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._log, self._display, self._config = log, display, config
        self._vocab_size, self._decode = vocab_size, decode

    @contextlib.contextmanager
    def recording(
        self, step: int, clock: StageClock, scored: Sequence[ScoredTree], batch: Batch, update: Update
    ) -> Iterator[None]:
        """When the block is over, also by an error: the weights are those of this step, whatever fails afterwards."""
        try:
            yield
        finally:
            record = step_record(step, self._config, clock, scored, batch, update)
            try:
                self._log.step(record)
            finally:
                if step == 1 or (self._config.log.trees_every and step % self._config.log.trees_every == 0):
                    self._save_trees(step, scored, batch)
            self._display.step(record)

    def _save_trees(self, step: int, scored: Sequence[ScoredTree], batch: Batch) -> None:
        """The first questions of the batch. A path's advantage is that of its first token; 0 if it was left out."""
        kept = scored[: self._config.log.trees]
        firsts = {(s.question, s.path): s.advantages[s.trajectory.generated.index(True)] for s in batch.samples}
        self._log.trees(
            step,
            kept,
            [[firsts.get((q, path.id), 0.0) for path in one.tree.paths] for q, one in enumerate(kept)],
            vocab_size=self._vocab_size,
            temperature=self._config.rollout.temperature,
            decode=self._decode,
        )


def step_record(
    step: int, config: Config, clock: StageClock, scored: Sequence[ScoredTree], batch: Batch, update: Update
) -> Record:
    """All metrics of a step, in the order in which metrics.jsonl has them."""
    rollout, losses, norms = rollout_metrics(scored), loss_metrics(update.metrics), update.gradient_norms
    return {
        "step": step,
        **rollout,
        **losses,
        "optimizer.grad_norm": sum(norms) / len(norms) if norms else None,
        "optimizer.learning_rate": update.learning_rate,
        **(mismatch_metrics(batch) if config.recomputes_old_logprobs else {}),
        "tokens.packed": sum(len(rows.input_ids) for rows in batch.micro_batches()),
        **clock.metrics(rollout["tokens.generated"], losses["tokens.trained"]),
        **memory_metrics(),
    }
