"""Evaluations and rollouts for people: progress while they go on, tables afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from aepo.answers import AnsweredQuestion
from aepo.estimates import Interval
from aepo.evaluation import by_kind
from aepo.run.records import Record

WIDE = 160  # where there is no terminal: a log file keeps whole lines
ROLLOUT_ROWS = (
    ("reward", "reward.mean", 3),
    ("reward, standard deviation", "reward.std", 3),
    ("success", "train.success", 3),
    ("questions whose paths all have the same reward", "advantage.zero_groups", 3),
    ("paths", "rollout.paths", 0),
    ("paths that start from the question, per question", "rollout.fresh_paths", 1),
    ("branches that an environment refused", "rollout.refused_branches", 0),
    ("tool calls", "tools.calls", 0),
    ("tool failures", "tools.failures", 0),
    ("tokens per path", "rollout.path_tokens", 1),
)


def wide_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def say(console: Console, text: str) -> None:
    """A line as it is: not wrapped, and brackets in it are no markup."""
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress_display(console: Console) -> Iterator[Callable[[int, int], None]]:
    """To be called with the finished paths and all of them: a bar on a terminal, elsewhere a line per tenth."""
    columns = (TextColumn("paths"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, said = bar.add_task("", total=None), 0

        def report(finished: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=finished, total=total)
            tenth = finished * 10 // total
            if tenth > said and not console.is_terminal:
                console.print(f"{finished} of {total} paths")
            said = max(tenth, said)

        yield report


def evaluation_tables(
    record: Record, intervals: Mapping[str, Interval | None], answered: Sequence[AnsweredQuestion]
) -> list[Table]:
    """All questions; and, where there are several kinds of them, each kind."""
    table = _table("", "mean", "95 %")
    for name in ("success", *(f"pass@{k}" for k in _ks(record)), "reward"):
        table.add_row(name, f"{record[name]:.3f}", _range(intervals[name]))
    for name in record:
        if name.startswith("reward."):
            table.add_row(Text(name), f"{record[name]:.3f}", "")
    for label, name in (("tool calls", "tool_calls"), ("tool failures", "tool_failures"), ("tokens", "tokens")):
        table.add_row(f"{label} per answer", f"{record[name]:.2f}", "")
    for name in record:
        if name.startswith("finish.") and record[name]:
            table.add_row(f"ended: {name.removeprefix('finish.')}", f"{record[name]:.3f}", "")
    kinds = by_kind(answered)
    return [table, _kinds_table(record, intervals, kinds)] if len(kinds) > 1 else [table]


def rollout_table(record: Record) -> Table:
    """Of `metrics.rollout_metrics`."""
    table = _table("", "")
    for label, name, digits in ROLLOUT_ROWS:
        table.add_row(label, "-" if record[name] is None else f"{record[name]:.{digits}f}")
    for branches, paths in enumerate(record["rollout.branches_per_path"]):
        table.add_row(f"paths with {branches} branches", str(paths))
    return table


def _kinds_table(
    record: Record, intervals: Mapping[str, Interval | None], kinds: Mapping[str, Sequence[AnsweredQuestion]]
) -> Table:
    ks = _ks(record)
    table = _table("kind", "questions", "success", "95 %", *(f"pass@{k}" for k in ks))
    for kind, group in kinds.items():
        success = (f"{record[f'success.{kind}']:.3f}", _range(intervals[f"success.{kind}"]))
        passes = [f"{record[f'pass@{k}.{kind}']:.3f}" for k in ks]
        table.add_row(Text(kind), str(len(group)), *success, *passes)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _ks(record: Record) -> list[int]:
    """Of pass@k, over all kinds."""
    return [int(rest) for name in record if (rest := name.removeprefix("pass@")) != name and rest.isdecimal()]


def _range(found: Interval | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"
