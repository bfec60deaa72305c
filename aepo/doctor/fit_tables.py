"""How `aepo doctor MODEL_DIR` is printed: as tables, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aepo.config import load_config
from aepo.doctor.fit import Fit, Row, Verdict, as_record, examine_fit
from aepo.doctor.memory import HEAP

PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "state": "state",
    "reference": "ref",
    "activations": "activ.",
    "logits": "logits",
    "backward": "backw.",
    "cache": "cache",
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
    work, here = fit.work, fit.places[0]
    console.print(
        f"{fit.model.parameters:,} parameters; micro-batches of {work.tokens:,} tokens, "
        f"{work.trained(work.tokens):,} of them trained; {work.questions} x {work.paths} paths of {work.prompt} + "
        f"{work.written} tokens; here {here.size / 2**30:.1f} GiB are free ({fit.device})",
        markup=False,
    )
    for table in (_memory(fit), _places(fit)):
        console.print(table)
    console.print(_notes(fit), style="dim", markup=False)


def _memory(fit: Fit) -> Table:
    """device and host: beside a GPU. Without one the process has both, and the heap."""
    table = _table("GiB", *PARTS.values(), "device", "host", "no GPU")
    for row in fit.rows:
        one = row.need
        sizes = (*(getattr(one, name) for name in PARTS), one.device("cuda"), one.host, one.cpu)
        table.add_row(*_names(row), *(f"{size / 2**30:.2f}" for size in sizes))
    return table


def _places(fit: Fit) -> Table:
    table = _table("Fits, up to so many tokens in a micro-batch", *(place.name for place in fit.places), "s per update")
    for row in fit.rows:
        seconds = f"{row.seconds:.1f}" if row.seconds < 100 else f"{row.seconds:,.0f}"
        table.add_row(*_names(row), *map(_words, row.verdicts.values()), seconds)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("dtype", "layers", ""):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _names(row: Row) -> tuple[str, str, str]:
    mark = "> " if row.asked else "  "
    dtype = str(row.plan.dtype).removeprefix("torch.")
    return mark + dtype, "recomputed" if row.plan.checkpointing else "kept", "ref" if row.plan.reference else ""


def _words(verdict: Verdict) -> str:
    if verdict.fits:
        return f"yes, {verdict.largest:,}"
    return f"only {verdict.largest:,}" if verdict.largest else "no"


def _notes(fit: Fit) -> str:
    lines = [
        "> your settings. recomputed: train.gradient_checkpointing. ref: a frozen reference, for policy.kl_coef > 0.",
        "state: masters and moments of AdamW. device: all that is there at one time; the cache of the rollouts and "
        f"what AdamW takes are not there beside a backward. no GPU: with the host's part, and {HEAP} times a "
        "micro-batch, as the heap of the process keeps pieces.",
        "yes, N: it fits, and would with train.tokens_per_microbatch = N (16 times yours at most). only N: with that "
        "many. no: not with a sixteenth of yours.",
        "s per update: on this device, without the rollouts; nothing is known of other devices' speed. How far off all "
        "this is: docs/memory.md",
    ]
    if fit.config.rollout.engine == "vllm":
        part = fit.config.vllm.gpu_memory_utilization
        lines.insert(2, f"vLLM takes {part:.0%} of a GPU (vllm.gpu_memory_utilization), counted in whether it fits.")
    return "\n".join(lines)
