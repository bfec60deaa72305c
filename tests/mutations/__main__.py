"""`python -m tests.mutations [NAME ..] [--list]`: exit code 1 if a mutation survives, 2 if tests fail without one."""

from __future__ import annotations

import argparse
import signal
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.mutations.runner import BrokenTree, Outcome, try_all
from tests.mutations.table import MUTATIONS

COLOURS = {"killed": "green", "survived": "red", "timed out": "red", "broken": "red"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations; without any: all")
    parser.add_argument("--list", action="store_true", help="say which there are, and try none")
    arguments = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"no mutation {unknown[0]!r}; --list says which there are")
    chosen = [known[name] for name in arguments.names] or list(MUTATIONS)
    if arguments.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
        for mutation in chosen:
            print(f"{mutation.name:40} {mutation.file:40} {' '.join(mutation.tests)}")
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file keeps whole lines
    try:
        outcomes = tried(chosen, console)
    except BrokenTree as error:
        print(error, file=sys.stderr)
        return 2
    console.print(table(outcomes))
    left = [outcome for outcome in outcomes if outcome.verdict != "killed"]
    for outcome in left:
        if outcome.verdict == "broken":
            console.print(outcome.output, markup=False, highlight=False)
    console.print(f"{len(outcomes) - len(left)} of {len(outcomes)} mutations were killed")
    return 1 if left else 0


def tried(chosen: list, console: Console) -> list[Outcome]:
    """In the order of the table."""
    files = {test.partition("::")[0] for mutation in chosen for test in mutation.tests}
    columns = (TextColumn("{task.description:40}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("the tests as they are", total=len(files) + len(chosen))
        found = {}
        for outcome in try_all(chosen, lambda name: bar.update(task, advance=1, description=name)):
            found[outcome.mutation.name] = outcome
            if not console.is_terminal:
                console.print(
                    f"{outcome.verdict:10} {outcome.seconds:6.1f} s  {outcome.mutation.name}", highlight=False
                )
    return [found[mutation.name] for mutation in chosen]


def table(outcomes: list[Outcome]) -> Table:
    result = Table("mutation", "file", "verdict", "seconds", "by", box=None)
    for outcome in outcomes:
        verdict = f"[{COLOURS[outcome.verdict]}]{outcome.verdict}[/]"
        by = outcome.by.rpartition("::")[2].partition("[")[0]
        result.add_row(outcome.mutation.name, outcome.mutation.file, verdict, f"{outcome.seconds:.1f}", by)
    return result


if __name__ == "__main__":
    sys.exit(main())
