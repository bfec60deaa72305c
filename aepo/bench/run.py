"""`aepo bench` as a function: measure the questions, print tables, write JSON and a figure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from aepo.bench import decode, linear, peers, policy_loss, sample, token_stats
from aepo.bench.clock import clock_for, machine
from aepo.bench.harness import UNSTEADY, Refusal, Row, is_ours, measure
from aepo.bench.load import missing_cores
from aepo.bench.progress import Progress
from aepo.bench.results import check_json, write_json
from aepo.bench.settings import Settings
from aepo.install import pip_install

TRAINERS = "trainers"
"""Measured alone: what they need is imported only then."""
QUESTIONS: dict[str, ModuleType] = {
    "token-stats": token_stats,
    "policy-loss": policy_loss,
    "linear": linear,
    "decode": decode,
    "sample": sample,
}
ROUNDS, QUICK_ROUNDS = 7, 3
WIDTH = 155
"""Of the tables [characters]."""
LOADED = 0.1
"""Share of our threads' cores that others may take before we warn."""


def run(
    settings: Settings,
    questions: Sequence[str] = (),
    *,
    threads: int | None = None,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Measure (all questions but the trainers if none is named); True if every row of ours passed its gate.

    json_path is written after every problem, so that a run that is stopped leaves what it had. Raises ValueError for
    settings that cannot be met, before anything is measured.
    """
    unknown = [question for question in questions if question not in (*QUESTIONS, TRAINERS)]
    if unknown:
        names = ", ".join((*QUESTIONS, TRAINERS))
        raise ValueError(f"question must be one of {names}; got {', '.join(unknown)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be an integer >= 1; got {threads}")
    if TRAINERS in questions:
        if len(questions) > 1 or plot_path is not None:
            raise ValueError(f"{TRAINERS} are measured alone, and not drawn: expected no other question, no --plot")
        try:
            from aepo.bench import trainers  # with transformers, TRL and our own trainer
        except ModuleNotFoundError as error:
            raise ValueError(f"trainers need more than the others ({error}): {pip_install('trl')}") from None
        return trainers.run(settings, threads=threads, json_path=json_path, console=console or make_console())
    for question in questions or QUESTIONS:
        module = QUESTIONS[question]
        settings.shapes(module.CPU, module.CUDA, module.QUICK)  # says which does not fit
    if json_path is not None:
        check_json(json_path)
    if plot_path is not None:
        from aepo.bench.plot import check_plot

        check_plot(settings, plot_path)
    console = console or make_console()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rows, refused = _measure(settings, questions or list(QUESTIONS), json_path, console)
    finally:
        torch.set_num_threads(before)
    if plot_path is not None:
        from aepo.bench.plot import draw

        draw(rows, plot_path)
        console.print(f"wrote {plot_path}")
    return not any(is_ours(refusal.provider) for refusal in refused)


def _measure(
    settings: Settings, questions: Sequence[str], json_path: Path | None, console: Console
) -> tuple[list[Row], list[Refusal]]:
    here, clock = machine(settings.device), clock_for(settings.device)
    compared = list(peer_status(settings.device))
    console.print(" | ".join(f"{key} {value}" for key, value in here.items()) + "\n", style="dim")
    rounds = settings.rounds or (QUICK_ROUNDS if settings.quick else ROUNDS)
    rows: list[Row] = []
    refused: list[Refusal] = []

    def keep(new_rows: Sequence[Row], new_refused: Sequence[Refusal]) -> None:
        if json_path is not None:
            write_json(json_path, here, compared, [*rows, *new_rows], [*refused, *new_refused])

    with Progress(console) as progress:
        for question in questions:
            torch.compiler.reset()  # a question's shapes do not count against the next one's limit of compilations
            progress.begin(question)
            for problem in QUESTIONS[question].problems(settings):
                progress.begin(problem.name)
                new_rows, new_refused = measure(problem, clock, rounds, progress, keep)
                console.print(table(new_rows))
                for refusal in new_refused:
                    console.print(f"no row for {refusal.provider}: {refusal.reason}", style="red")
                for warning in warnings(new_rows, settings.device):
                    console.print(warning, style="yellow")
                rows += new_rows
                refused += new_refused
                keep((), ())
                progress.begin(question)
            console.print(QUESTIONS[question].NOTE + "\n", style="dim")
    return rows, refused


def warnings(rows: Sequence[Row], device: str) -> Iterator[str]:
    """What a reader of one problem's rows has to know about the machine at that time."""
    others, threads = rows[0].others_cores, torch.get_num_threads()
    if device == "cpu" and others is not None and missing_cores(others, threads) > LOADED * threads:
        yield (
            f"loaded machine: other programs kept {others:.1f} of {os.cpu_count()} cores busy during these rounds, "
            f"which ran on {threads} threads: times are too long, and ratios only as good as their spread"
        )
    unsteady = [row.provider for row in rows if row.unsteady]
    if unsteady:
        yield (
            f"spread above {UNSTEADY:.0%}: {', '.join(unsteady)}; nothing is compared with that (~). "
            "Measure again on a quiet machine"
        )


def make_console() -> Console:
    """Wide enough for the tables: on a narrow terminal lines are rather wrapped than numbers cut."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    return console


def peer_status(device: str) -> Iterator[dict[str, Any]]:
    """Every peer with its version and why it is missing, if it is."""
    for peer in peers.PEERS:
        reason = peers.missing(peer, device)
        found = {} if reason else {"version": peers.version(peer)}
        yield {"name": peer.name, "package": peer.package, "computes": peer.computes, **found, "missing": reason}


def list_peers(device: str, console: Console | None = None) -> None:
    """Print who would be compared with on this device."""
    result = Table(box=None, pad_edge=False)
    for column in ("peer", "computes", "package", "here?"):
        result.add_column(column, overflow="fold")
    for peer in peer_status(device):
        here = f"no: {peer['missing']}" if peer["missing"] else f"yes, {peer['version']}"
        result.add_row(peer["name"], peer["computes"], peer["package"], here)
    (console or make_console()).print(result)


def table(rows: Sequence[Row]) -> Table:
    """One problem's rows."""
    result = Table(title=rows[0].problem, title_justify="left", title_style="bold", box=None, pad_edge=False)
    numbers = ("ms", "spread", rows[0].unit, "% of ceiling", "faster than eager", "extra MiB", "/ logits", "max error")
    for index, column in enumerate(("", "computes", *numbers)):
        result.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form.rstrip("x")) + "x" * form.endswith("x")

    def compared(row: Row, value: float | None, form: str) -> str:
        """ "~" for what was left out because it is unsteady."""
        unknown = value is None and row.max_error is not None and any(one.unsteady for one in rows)
        return "~" if unknown else text(value, form)

    for row in rows:
        result.add_row(
            row.provider,
            row.computes,
            f"{row.median_ms:.3g}" if row.median_ms < 1000 else f"{row.median_ms:.0f}",
            text(row.spread, ".0%"),
            f"{row.rate:.3g}",
            compared(row, row.percent_of_ceiling, ".0f"),
            compared(row, row.times_faster_than_eager, ".3gx"),
            "?" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.4g}",
            text(row.extra_share, ".1%"),
            text(row.max_error, ".0e"),
            style="bold" if is_ours(row.provider) else None,
        )
    return result
