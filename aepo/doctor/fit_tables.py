"""How `aepo doctor MODEL_DIR` is printed: as tables, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aepo.config import load_config
from aepo.doctor.fit import Fit, Row, Verdict, as_record, examine_fit
from aepo.doctor.memory import HEAP

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "state": "masters and moments",
    "reference": "reference",
    "activations": "activations",
    "logits": "logits",
    "backward": "backward, beside both",
    "cache": "cache of the rollouts",
}


def main(
    directory: Path, config_file: Path | None, overrides: Sequence[str], *, prompt: int, as_json: bool = False
) -> None:
    """ValueError, in one line: a setting, or a model that cannot be trained here."""
    fit = examine_fit(directory, load_config(config_file, overrides), prompt)
    if as_json:
        print(json.dumps(as_record(fit), indent=2))
    else:
        print_fit(fit)


def print_fit(fit: Fit) -> None:
    console = Console()
    work = fit.work
    console.print(
        f"{fit.model.parameters:,} parameters; micro-batches of {work.tokens:,} tokens, "
        f"{work.trained(work.tokens):,} of them trained; {work.questions} x {work.paths} paths of {work.prompt} + "
        f"{work.written} tokens; this device: {fit.device}",
        markup=False,
    )
    for dtype in dict.fromkeys(row.plan.dtype for row in fit.rows):
        console.print(_table(fit, [row for row in fit.rows if row.plan.dtype == dtype]))
    console.print(*_advice(fit), sep="\n", markup=False, highlight=False)
    console.print(_notes(fit), style="dim", markup=False)


def _table(fit: Fit, rows: Sequence[Row]) -> Table:
    """Of a dtype: what there is, whole numbers also where a page has 80 columns. device and host: beside a GPU. Without
    one the process has both, and the heap."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"{_dtype(rows[0])}, GiB", no_wrap=True)
    for row in rows:
        table.add_column(_name(row), justify="right", no_wrap=True)
    needs = [row.need for row in rows]
    for part, label in PARTS.items():
        table.add_row(label, *(_gib(getattr(one, part)) for one in needs))
    table.add_row("device", *(_gib(one.device("cuda")) for one in needs), style="bold")
    table.add_row("host", *(_gib(one.host) for one in needs), style="bold")
    table.add_row("without a GPU", *(_gib(one.cpu) for one in needs), style="bold", end_section=True)
    for place in fit.places:
        free = f"here, {place.size / 2**30:.1f} GiB free" if place is fit.places[0] else place.name
        table.add_row(free, *(_words(row.verdicts[place.name]) for row in rows))
    table.add_row("seconds per update", *(_seconds(row.seconds) for row in rows), end_section=True)
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def _dtype(row: Row) -> str:
    return str(row.plan.dtype).removeprefix("torch.")


def _name(row: Row) -> str:
    layers = "recomputed" if row.plan.checkpointing else "kept"
    return f"{'> ' if row.asked else ''}{layers}{', ref' if row.plan.reference else ''}"


def _words(verdict: Verdict) -> str:
    if verdict.fits:
        return f"yes, {verdict.largest:,}"
    return f"only {verdict.largest:,}" if verdict.largest else "no"


def _advice(fit: Fit) -> Iterator[str]:
    """For the places where the settings do not fit: what to change, as little as possible, or why nothing helps."""
    asked = next(row for row in fit.rows if row.asked)
    places: dict[str, list[str]] = {}
    for place in fit.places:
        if not asked.verdicts[place.name].fits:
            places.setdefault(_remedy(fit, asked, place.name), []).append(place.name)
    return (f"{', '.join(names)}: {remedy}" for remedy, names in places.items())


def _remedy(fit: Fit, asked: Row, place: str) -> str:
    near = [row for row in fit.rows if row.plan.reference == asked.plan.reference]
    fitting = [row for row in near if row.verdicts[place].largest]
    if not fitting:
        least = min(row.need.weights + row.need.gradients + row.need.state for row in near)
        return f"does not fit; weights, gradients, masters and moments alone take {_gib(least)} GiB"
    changes = [[*_changes(asked, row, place, fit.work.tokens)] for row in fitting]
    smaller = [not row.verdicts[place].fits for row in fitting]
    best = min(range(len(fitting)), key=lambda index: (len(changes[index]), smaller[index]))
    return f"fits with {' '.join(changes[best])}"


def _changes(asked: Row, row: Row, place: str, tokens: int) -> Iterator[str]:
    if row.plan.dtype != asked.plan.dtype:
        yield f"model.dtype={_dtype(row)}"
    if row.plan.checkpointing != asked.plan.checkpointing:
        yield f"train.gradient_checkpointing={str(row.plan.checkpointing).lower()}"
    if not row.verdicts[place].fits:
        yield f"train.tokens_per_microbatch={min(row.verdicts[place].largest, tokens)}"


def _notes(fit: Fit) -> str:
    lines = [
        "> your settings. recomputed: train.gradient_checkpointing. ref: a frozen reference, for policy.kl_coef > 0.",
        "device: all that is there at one time; gradients and a micro-batch are not there beside the cache of the "
        f"rollouts. without a GPU: with the host's part, and {HEAP} times a micro-batch, as the heap of the process "
        "keeps pieces.",
        "yes, N: it fits, and would with train.tokens_per_microbatch = N (16 times yours at most). only N: with that "
        "many. no: not with a sixteenth of yours.",
        "seconds per update: on this device, without the rollouts; nothing is known of other devices' speed. How far "
        "off all this is: docs/memory.md",
    ]
    if fit.config.rollout.engine == "vllm":
        part = fit.config.vllm.gpu_memory_utilization
        lines.insert(2, f"vLLM takes {part:.0%} of a GPU (vllm.gpu_memory_utilization), counted in whether it fits.")
    return "\n".join(lines)
