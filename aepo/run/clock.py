"""How long the stages of a step take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from aepo.run.records import Record


class StageClock:
    """Wall time of the stages of one step; `announce` is told when one begins."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._announce(stage)
        start = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - start

    def metrics(self, generated: int, trained: int) -> Record:
        """Seconds per stage, generated tokens per second of rollout, and trained tokens per second of the step."""
        step = time.perf_counter() - self._start
        return {
            **{f"seconds.{stage}": seconds for stage, seconds in self._seconds.items()},
            "seconds.step": step,
            "tokens.per_second": trained / step,
            "tokens.generated_per_second": generated / self._seconds["rollout"],
        }
