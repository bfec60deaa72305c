"""`aepo bench trainers`: one update of the same tokens by TRL, by TRL with our kernels, and by our own trainer.

Each trainer runs in a process of its own (trainer_process.py), which first has its gradient compared with float64. They
then take turns, and each row is the median of its rounds. trainer_rows.py makes the tokens, trainer_steps.py has the
trainers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aepo.bench.clock import machine
from aepo.bench.harness import UNSTEADY, Refusal, is_unsteady, spread
from aepo.bench.load import missing_cores
from aepo.bench.progress import Progress
from aepo.bench.results import check_json, write_json
from aepo.bench.settings import Settings
from aepo.bench.trainer_process import TrainerProcess, Update
from aepo.bench.trainer_rows import COMPETITORS, HEAD_SIZE, TRL, Cell, Competitor, distinct_positions, make_paths

NAME = "trainers"
CPU = ((2048, 32000), (2048, 151936), (8192, 32000))
QUICK = ((1024, 4096),)
ROUNDS, QUICK_ROUNDS = 3, 2
TOLERANCE = 1e-4
"""Of a gradient. float32 gives 1e-6 to 2e-5, an entropy factor that is left out 0.2."""
PATIENCE_S = 30.0
"""Of all updates of a trainer in a cell, the first one included; one is timed in any case."""
LOADED = 0.1
"""Share of our threads' cores that others may take before we warn."""
NOTE = (
    "One update: log-probs and entropies of the old policy where the method needs them (AEPO), all micro-batches "
    "forward and backward, AdamW's step. TRL's trainers run their train(), eight paths to a micro-batch; aepo's gets "
    "as many tokens. Paths have one length, so nothing is padded. Memory: peak of the process above what it had before "
    "the model."
)


@dataclasses.dataclass(frozen=True)
class TrainerRow:
    """One line of a table, and one entry of the JSON."""

    question: str
    problem: str
    """What is updated, with its shape."""
    trainer: str
    objective: str
    branched: bool
    """Half of the paths share more than the prompt."""
    tokens: int
    """Trained."""
    positions: int
    """Tokens of all paths."""
    distinct: int
    """Of those, with shared prefixes counted once."""
    vocab: int
    hidden: int
    layers: int
    dtype: str
    rounds: int
    seconds: float
    """Median."""
    spread: float | None
    """Interquartile range / median; None for a single round."""
    cpu_seconds: float
    """Median, of all threads."""
    peak_bytes: int | None
    """Median."""
    gradient_error: float
    """Relative to float64 truth."""
    others_cores: float | None
    """Mean number of cores that other programs kept busy during its updates."""
    time_of_trl: float | None = None
    """Its time / TRL's; None where one of the two is unsteady."""
    memory_of_trl: float | None = None


def run(settings: Settings, *, threads: int | None = None, json_path: Path | None = None, console: Console) -> bool:
    """Measure; True if every trainer of ours passed its gate. ValueError for what cannot be measured."""
    cells = chosen_cells(settings)
    try:
        trl = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            'trainers are compared with TRL, which is not installed: pip install "aepo-kernels[trl]"'
        ) from None
    if json_path is not None:
        check_json(json_path)
    threads = threads or torch.get_num_threads()
    here = machine("cpu") | {"threads": threads, "trl": trl, "transformers": importlib.metadata.version("transformers")}
    console.print(" | ".join(f"{key} {value}" for key, value in here.items()) + "\n", style="dim")
    rounds = settings.rounds or (QUICK_ROUNDS if settings.quick else ROUNDS)
    rows: list[TrainerRow] = []
    refused: list[Refusal] = []
    with Progress(console) as progress:
        for cell in cells:
            progress.begin(problem(cell))
            new_rows, new_refused = measure(cell, rounds, threads, progress)
            rows += new_rows
            refused += new_refused
            if json_path is not None:
                write_json(json_path, here, [], rows, refused)
            if new_rows:
                console.print(table(new_rows))
            for refusal in new_refused:
                console.print(f"no row for {refusal.provider}: {refusal.reason}", style="red")
            for warning in warnings(new_rows, threads):
                console.print(warning, style="yellow")
    console.print(NOTE, style="dim")
    return not any(refusal.provider != str(TRL) for refusal in refused)


def chosen_cells(settings: Settings) -> list[Cell]:
    """ValueError: a setting that is not measured here, or a number of tokens that is no whole number of questions."""
    if settings.device != "cpu":
        raise ValueError(f"{NAME} are measured on the CPU only: expected --device cpu; got {settings.device}")
    if settings.dtype not in (None, torch.float32):
        raise ValueError(f"{NAME} are measured in float32 only; got dtype {settings.dtype}")
    hidden = settings.hidden or Cell.hidden
    if hidden % HEAD_SIZE:
        raise ValueError(f"hidden must be a multiple of {HEAD_SIZE}, the size of a head, for {NAME}; got {hidden}")
    question = Cell(questions=1, vocab=2).trained
    cells = []
    for tokens, vocab in settings.shapes(list(CPU), list(CPU), QUICK[0]):
        if tokens % question:
            raise ValueError(f"tokens must be a multiple of {question}, those of a question, for {NAME}; got {tokens}")
        if vocab < 4:
            raise ValueError(f"vocab must be at least 4 for {NAME}; got {vocab}")
        cells.append(Cell(questions=tokens // question, vocab=vocab, hidden=hidden))
    if settings.quick or settings.tokens or settings.vocab:
        return cells
    return [dataclasses.replace(cells[0], branched=False), *cells]


def problem(cell: Cell) -> str:
    paths = "branched paths" if cell.branched else "paths that share a prompt"
    return (
        f"{cell.trained} trained tokens of {cell.sequences} {paths}, {cell.positions} tokens: "
        f"V {cell.vocab}, D {cell.hidden}, {cell.layers} layers, float32"
    )


class _Contestant:
    """One trainer with what is known of it in a cell."""

    def __init__(self, competitor: Competitor, process: TrainerProcess) -> None:
        self.competitor, self._process = competitor, process
        self.gradient_error = float("inf")
        self.updates: list[Update] = []
        self._taken = self._last = 0.0

    def start(self) -> None:
        """The gate, and an update that is not counted: the first one makes AdamW's state."""
        self.gradient_error = self._process.ready().gradient_error
        if not self.gradient_error <= TOLERANCE:
            raise RuntimeError(
                f"wrong: gradient error {self.gradient_error:.2g} relative to float64, {TOLERANCE:.2g} allowed"
            )
        self.update()
        self.updates.clear()

    def update(self) -> None:
        self.updates.append(self._process.update())
        self._last = self.updates[-1].seconds
        self._taken += self._last

    def wants_round(self, rounds: int) -> bool:
        return len(self.updates) < rounds and (not self.updates or self._taken + self._last < PATIENCE_S)

    def to_come_s(self, rounds: int) -> float:
        return self._last * (rounds - len(self.updates)) if self.wants_round(rounds) else 0.0


def measure(cell: Cell, rounds: int, threads: int, progress: Progress) -> tuple[list[TrainerRow], list[Refusal]]:
    """Gate and first update one after the other, then the rounds in turn."""
    refused: list[Refusal] = []
    with contextlib.ExitStack() as stack:
        contestants: list[_Contestant] = []

        def tried(contestant: _Contestant, action: Callable[[], None], doing: str) -> bool:
            progress(f"{doing}, {contestant.competitor}", sum(one.to_come_s(rounds) for one in contestants) or None)
            try:
                action()
            except RuntimeError as failure:
                refused.append(Refusal(NAME, problem(cell), str(contestant.competitor), str(failure)))
                return False
            return True

        for competitor in COMPETITORS:
            progress(f"starting {competitor}", None)
            process = stack.enter_context(TrainerProcess(competitor, cell, threads))
            contestant = _Contestant(competitor, process)
            if tried(contestant, contestant.start, "gate and first update"):
                contestants.append(contestant)
        for index in range(rounds):
            for one in [one for one in contestants if one.wants_round(rounds)]:
                if not tried(one, one.update, f"round {index + 1} of {rounds}"):
                    contestants.remove(one)
    return rows_of(cell, contestants), refused


def rows_of(cell: Cell, contestants: Sequence[_Contestant]) -> list[TrainerRow]:
    distinct = distinct_positions(make_paths(cell))
    rows = []
    for one in contestants:
        seconds = [update.seconds for update in one.updates]
        peaks = [update.peak_bytes for update in one.updates if update.peak_bytes is not None]
        others = [update.others_cores for update in one.updates if update.others_cores is not None]
        rows.append(
            TrainerRow(
                question=NAME,
                problem=problem(cell),
                trainer=one.competitor.trainer,
                objective=one.competitor.objective,
                branched=cell.branched,
                tokens=cell.trained,
                positions=cell.positions,
                distinct=distinct,
                vocab=cell.vocab,
                hidden=cell.hidden,
                layers=cell.layers,
                dtype="float32",
                rounds=len(seconds),
                seconds=statistics.median(seconds),
                spread=spread(seconds),
                cpu_seconds=statistics.median(update.cpu_seconds for update in one.updates),
                peak_bytes=int(statistics.median(peaks)) if peaks else None,
                gradient_error=one.gradient_error,
                others_cores=statistics.mean(others) if others else None,
            )
        )
    return [_beside(row, rows[0]) for row in rows] if rows and rows[0].trainer == TRL.trainer else rows


def _beside(row: TrainerRow, baseline: TrainerRow) -> TrainerRow:
    steady = not (is_unsteady(row.spread) or is_unsteady(baseline.spread))
    known = row.peak_bytes is not None and baseline.peak_bytes
    return dataclasses.replace(
        row,
        time_of_trl=row.seconds / baseline.seconds if steady else None,
        memory_of_trl=row.peak_bytes / baseline.peak_bytes if known else None,  # type: ignore[operator]
    )


def warnings(rows: Sequence[TrainerRow], threads: int) -> Iterator[str]:
    """What a reader has to know about the machine at that time."""
    others = [row.others_cores for row in rows if row.others_cores is not None]
    if others and missing_cores(statistics.mean(others), threads) > LOADED * threads:
        yield (
            f"loaded machine: other programs kept {statistics.mean(others):.1f} of {os.cpu_count()} cores busy during "
            f"the updates, which ran on {threads} threads: times are too long, and ratios only as good as their spread"
        )
    unsteady = [f"{row.trainer}, {row.objective}" for row in rows if is_unsteady(row.spread)]
    if unsteady:
        yield f"spread above {UNSTEADY:.0%}: {'; '.join(unsteady)}; nothing is compared with that (~)"


def table(rows: Sequence[TrainerRow]) -> Table:
    """One cell's rows."""
    result = Table(title=rows[0].problem, title_justify="left", title_style="bold", box=None, pad_edge=False)
    numbers = ("s", "spread", "of TRL's time", "CPU s", "peak MiB", "of TRL's memory", "gradient error", "rounds")
    for index, column in enumerate(("", "objective", *numbers)):
        result.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        compared = any(one.time_of_trl is not None for one in rows)
        result.add_row(
            row.trainer,
            row.objective,
            f"{row.seconds:.3g}",
            "" if row.spread is None else f"{row.spread:.0%}",
            ("~" if compared else "") if row.time_of_trl is None else f"{row.time_of_trl:.2f}",
            f"{row.cpu_seconds:.3g}",
            "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
            "" if row.memory_of_trl is None else f"{row.memory_of_trl:.2f}",
            f"{row.gradient_error:.0e}",
            str(row.rounds),
            style=None if row.trainer == TRL.trainer else "bold",
        )
    return result
