"""Live progress: a line per step and evaluation, and on a terminal a bar with the stage that is running.

Output that cannot be written any more ends no step (aepo/output.py).
"""

from __future__ import annotations

import contextlib
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from aepo.output import guarded_output
from aepo.run.records import Record


class Display:
    """Without a terminal (a pipe, a log file) only the lines."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._steps = steps
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=steps)
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> Display:
        self._entered.enter_context(guarded_output())
        self._entered.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def stage(self, name: str) -> None:
        self._bar.update(self._task, description=name.replace("_", " "))

    def paths(self, finished: int, total: int) -> None:
        """Progress of a rollout."""
        self._bar.update(self._task, description=f"rollout: {finished} of {total} paths")

    def resumed(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        self.console.print(f"resumed after step {step}")

    def step(self, record: Record) -> None:
        self._bar.update(self._task, completed=record["step"])
        parts = [
            f"step {record['step']:>{len(str(self._steps))}}/{self._steps}",
            f"reward {_number(record['reward.mean'])}",
            f"success {_number(record['train.success'])}",
            f"entropy {_number(record['policy.entropy'])}",
            f"clipped {_number(record['policy.clip_high'])}+{_number(record['policy.clip_low'])}",
            f"fresh {_number(record['rollout.fresh_paths'], 1)}",
            f"tools {record['tools.calls']} ({record['tools.failures']} failed)",
            f"grad {_number(record['optimizer.grad_norm'])}",
            f"{record['tokens.per_second']:.0f} tok/s",
            f"{record['seconds.step']:.1f} s",
        ]
        self.console.print("  ".join(parts))

    def evaluation(self, record: Record) -> None:
        kinds = ", ".join(
            f"{key.removeprefix('success.')} {_number(v)}" for key, v in record.items() if key.startswith("success.")
        )
        self.console.print(
            f"held-out after step {record['step']}: success {_number(record['success'])}{kinds and f' ({kinds})'}  "
            f"{record['questions']} questions  {record['seconds']:.1f} s"
        )


class WarmStartDisplay:
    """Supervised training before the run: a bar on a terminal, elsewhere a line per tenth. Silent if there is none."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("warm start"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> WarmStartDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, steps: int, loss: float) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=steps)
        self._bar.update(self._task, completed=step, description=f"loss {loss:.2f}")
        if not self.console.is_terminal and step % max(steps // 10, 1) == 0:
            self.console.print(f"warm start {step}/{steps}  loss {loss:.2f}")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
