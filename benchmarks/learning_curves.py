"""Does AEPO learn faster than GRPO here? The demo's agent under both, several seeds, the same number of paths.

    python -m benchmarks.learning_curves --json benchmarks/results/learning_curves.json

Runs differ in `policy.preset` and in where paths start (GRPO: all k at the question) and in nothing else: questions,
paths per question, optimiser, evaluation, warm start of the seed. `area` is the mean of held-out success over all
evaluations after the start, so it is higher for a run that learns earlier. The last line is the result as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aepo.bench.clock import machine
from aepo.config import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def method_overrides(method: str) -> list[str]:
    """What is changed in the demo's configuration."""
    paths = load_config(CONFIG).rollout.paths
    return {
        "aepo": ["policy.preset=aepo", "rollout.fresh_paths=null"],
        "grpo": ["policy.preset=grpo", f"rollout.fresh_paths={paths}"],
    }[method]


def train(method: str, seed: int, run: Path, overrides: list[str]) -> dict[str, Any]:
    """One run, as a user starts it; a run that is already there is read, or resumed where it stopped."""
    finished = (run / "run.json").exists() and json.loads((run / "run.json").read_text())["status"] == "finished"
    if not finished:
        resumable = (run / "checkpoints").exists() and any((run / "checkpoints").iterdir())
        start = ["--resume", str(run)] if resumable else ["--config", str(CONFIG), f"run.dir={run}"]
        seeded = [f"run.seed={seed}", f"warm_start.seed={seed}"]
        settings = [] if resumable else [*seeded, *method_overrides(method), *overrides]
        subprocess.run([sys.executable, "-m", "aepo.cli", "train", *start, *settings], check=True)
    facts = json.loads((run / "run.json").read_text())
    evaluations = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(record["step"], record["success"]) for record in evaluations]
    return {
        "method": method,
        "seed": seed,
        "curve": curve,
        "warm_start": curve[0][1],
        "final": curve[-1][1],
        "area": statistics.mean(success for _, success in curve[1:]),
        "seconds": facts["wall_seconds"],
        "tokens_generated": sum(record["tokens.generated"] for record in steps),
        "commit": facts["commit"],
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "seed", "warm start", "final", "gain", "area", "tokens generated", "seconds")
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row for row in rows if row["method"] == method]
        keys = ("warm_start", "final", "area", "tokens_generated", "seconds")
        mean = {key: statistics.mean(row[key] for row in chosen) for key in keys}
        for row in [*chosen, {"method": method, "seed": "mean", **mean}]:
            gain = row["final"] - row["warm_start"]
            figures = [f"{row['warm_start']:.3f}", f"{row['final']:.3f}", f"{gain:+.3f}", f"{row['area']:.3f}"]
            amounts = [f"{row['tokens_generated']:,.0f}", f"{row['seconds']:.0f}"]
            table.add_row(method, str(row["seed"]), *figures, *amounts, end_section=row["seed"] == "mean")
    Console().print(table)


def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated: aepo, grpo.")] = "aepo,grpo",
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of each method.")] = 3,
    runs: Annotated[Path, typer.Option(help="Where the runs go; finished ones are not repeated.")] = Path(
        "runs/learning_curves"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")] = None,
) -> None:
    """Held-out success under AEPO and GRPO, with the configuration of the demo."""
    rows = []
    for seed in range(seeds):  # methods next to each other in time, so that both meet the same machine
        for method in methods.split(","):
            rows.append(train(method, seed, runs / f"{method}-{seed}", overrides or []))
            print_table(rows)
    result = {"benchmark": "learning_curves", "machine": machine("cpu"), "overrides": overrides or [], "runs": rows}
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
