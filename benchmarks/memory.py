"""Which model fits where, and how right that is: `aepo doctor MODEL_DIR` beside what real updates take.

    python -m benchmarks.memory sizes                                                  the tables of docs/memory.md
    python -m benchmarks.memory measure --json benchmarks/results/memory_cpu.json      predicted and measured, minutes

A measured point is a Learner in a fresh process, with random weights and made-up paths: two updates of two
micro-batches each. Its memory is the peak of the resident set over the second one, less what the process had before
the model.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from aepo.advantages import Sample
from aepo.bench.clock import machine
from aepo.config import Config, load_config
from aepo.doctor.memory import PROCESS, Model, Plan, Workload, need
from aepo.doctor.speed import measured_rates, update_seconds
from aepo.learning.learner import Learner
from aepo.parallel import OneProcess
from aepo.types import Trajectory
from benchmarks.model_sizes import page

SHAPES = {  # vocabulary, hidden size, layers, heads, key-value heads, intermediate size; tied
    "14M": (32000, 256, 8, 4, 2, 768),
    "38M": (49152, 384, 12, 6, 2, 1024),
    "135M": (49152, 576, 30, 9, 3, 1536),
}
PATHS, PROMPT = 2, 128  # of a micro-batch; tokens of each
NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # every tensor is given back when it is freed

app = typer.Typer(help=(__doc__ or "").partition("\n")[0], no_args_is_help=True, add_completion=False)


@dataclass(frozen=True)
class Point:
    model: str
    dtype: str
    tokens: int
    checkpointing: bool
    heap: bool = True  # as glibc has it

    @property
    def config(self) -> LlamaConfig:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        shape = dict(zip((*names, "intermediate_size"), SHAPES[self.model], strict=True))
        return LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=8192)

    @property
    def settings(self) -> Config:
        """Two paths fill a micro-batch, and there are two of these."""
        return load_config(
            overrides=[
                f"model.dtype={self.dtype}",
                f"train.tokens_per_microbatch={self.tokens}",
                f"train.gradient_checkpointing={str(self.checkpointing).lower()}",
                f"rollout.max_tokens={self.tokens // PATHS - PROMPT}",
                f"rollout.paths={PATHS}",
                "train.questions=2",
                "rollout.fresh_paths=null",
            ]
        )


POINTS = [
    *(
        Point(model, dtype, tokens, checkpointing)
        for model in ("14M", "38M")
        for tokens in (512, 2048)
        for dtype in ("float32", "bfloat16")
        for checkpointing in (False, True)
    ),
    Point("14M", "float32", 2048, False, heap=False),
    Point("38M", "float32", 512, False, heap=False),
    Point("38M", "bfloat16", 512, False, heap=False),
    Point("135M", "float32", 512, False),
    Point("135M", "bfloat16", 512, False),
    Point("135M", "float32", 2048, True),
    Point("135M", "float32", 2048, False),
]


@app.command()
def sizes() -> None:
    """Print the tables of docs/memory.md, from the configurations of well-known models."""
    print(page())


@app.command()
def measure(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")] = None,
    models: Annotated[str, typer.Option(help="Comma-separated, of the sizes that are measured.")] = ",".join(SHAPES),
) -> None:
    """Predicted and measured memory and seconds of an update, one fresh process for each point."""
    rows: list[dict[str, Any]] = []
    command = "python -m benchmarks.memory measure"
    for point in POINTS:
        if point.model not in models.split(","):
            continue
        environment = {**os.environ, **({} if point.heap else NO_HEAP)}
        program = [sys.executable, "-m", "benchmarks.memory", "point", json.dumps(asdict(point))]
        done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print_table(rows)
        if json_file is not None:
            result = {"benchmark": "memory", "command": command, "machine": machine("cpu"), "points": rows}
            json_file.write_text(json.dumps(result, indent=1) + "\n")


@app.command()
def point(given: str) -> None:
    """One point, in this process."""
    print(json.dumps(measured(Point(**json.loads(given)))))


def measured(point: Point) -> dict[str, Any]:
    _warm_up()
    before = _resident("VmRSS")
    torch.manual_seed(0)
    dtype = getattr(torch, point.dtype)
    network = AutoModelForCausalLM.from_config(point.config, dtype=dtype)
    learner = Learner(network, point.settings, str, OneProcess())
    batch = learner.pack_samples(_samples(point), ["a", "b"])
    learner.update(1, batch)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, cpu_start = time.perf_counter(), time.process_time()
    learner.update(2, learner.add_log_probs(batch))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = _resident("VmHWM") - before
    rows = next(batch.micro_batches())
    model, plan = Model(point.config), Plan(dtype, point.checkpointing, False)
    work = Workload.of(point.settings, PROMPT)
    assert (len(rows.input_ids), len(rows.rows)) == (work.tokens, work.trained(work.tokens)), "made as predicted"
    expected = need(model, plan, work, point.settings)
    predicted = expected.cpu - PROCESS
    allocated = predicted - expected.device("cpu") + expected.device("cuda")
    rates = measured_rates(model, (dtype,), "cpu")
    predicted_seconds = update_seconds(model, plan, work, rates, recomputed=False)
    return {
        **asdict(point),
        "parameters": model.parameters,
        "measured_bytes": peak,
        "allocated_bytes": allocated,
        "predicted_bytes": predicted if point.heap else allocated,
        "process_bytes": before,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "predicted_seconds": predicted_seconds,
        "product_rate": rates.products[dtype],
        "copy_rate": rates.copy,
        "load_average": os.getloadavg()[0],
    }


def _warm_up() -> None:
    """What torch loads for its first training step is no part of the model."""
    x = torch.randn(64, 64, requires_grad=True)
    (x @ x).sum().backward()
    torch.optim.AdamW([x]).step()


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _samples(point: Point) -> list[Sample]:
    """Paths that fill the micro-batches to the last position: the last token of a path takes none."""
    draw, length = random.Random(0), point.tokens // PATHS + 1
    generated = tuple(position > PROMPT for position in range(length))
    numbers = tuple(float(one) for one in generated)
    paths = [
        Trajectory(
            token_ids=tuple(draw.randrange(SHAPES[point.model][0]) for _ in range(length)),
            generated=generated,
            logprobs=tuple(-number for number in numbers),
            entropies=numbers,
            steps=tuple(0 if one else -1 for one in generated),
            anchors=(),
        )
        for _ in range(2 * PATHS)
    ]
    return [
        Sample(index // PATHS, index % PATHS, path, tuple((-1) ** index * number for number in numbers))
        for index, path in enumerate(paths)
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "model",
        "dtype",
        "tokens",
        "recomputed",
        "heap",
        "MB predicted",
        "measured",
        "ratio",
        "s",
        "CPU s",
        "s predicted",
    )
    for row in rows:
        ratio = row["predicted_bytes"] / row["measured_bytes"]
        names = (row["model"], row["dtype"], str(row["tokens"]), str(row["checkpointing"]), str(row["heap"]))
        megabytes = (f"{row[key] / 1e6:,.0f}" for key in ("predicted_bytes", "measured_bytes"))
        seconds = (f"{row[key]:.2f}" for key in ("seconds", "cpu_seconds", "predicted_seconds"))
        table.add_row(*names, *megabytes, f"{ratio:.2f}", *seconds)
    Console(stderr=True, width=140).print(table)


if __name__ == "__main__":
    app()
