"""The files of a run directory, except checkpoints.

    config.yaml    the whole configuration
    run.json       what ran where, since when, and how it ended
    metrics.jsonl  one record per step; step n = after n rollout batches
    evals.jsonl    one record per held-out evaluation; step 0 = before the first step
    trees/         step_000010.json: rollout trees of a step with rewards, advantages and the text of every token
    answers/       step_000010.jsonl: every answer of a held-out evaluation, one question per line
    tensorboard/   the same numbers as event files; wandb/ those of log.wandb

Before a run is resumed, `RunDirectory.set_aside` takes out what is later than the step it starts from, so they read
like those of one run.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aepo.answers import AnsweredQuestion, write_answers
from aepo.config import Config, to_yaml
from aepo.run.boards import Boards, require_boards
from aepo.run.directory import RunDirectory
from aepo.run.files import FORMAT, append_lines, read_facts, read_records, write_file
from aepo.run.machine import machine_facts
from aepo.run.records import Record, finite
from aepo.run.saved_trees import tree_entry
from aepo.types import ScoredTree


class RunLog:
    """Writes the files above. `facts` are the model's and the agent's entries of run.json, `changed` how they and the
    settings differ from those that a resumed run was begun with.

    What cannot be written, on a full disk, is an OSError, and kept: `flush` tries again.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: Config,
        facts: dict[str, Any],
        step: int,
        *,
        resumed: bool,
        changed: Sequence[str] = (),
    ) -> None:
        require_boards(config)
        self.directory, self._path = directory, directory.path
        self._left: dict[str, list[str]] = {"metrics.jsonl": [], "evals.jsonl": []}  # lines that are not in their files
        self._left_files: dict[str, Callable[[Path], None]] = {}  # files that are not there, with what writes them
        self._start = time.perf_counter()
        if resumed:
            self._facts = read_facts(self._path)
            self._facts["resumed"].append({"step": step, "time": _now(), **({"changed": changed} if changed else {})})
            self._facts.update(facts, version=FORMAT)
            self._start -= self._facts["wall_seconds"] or 0.0  # None: it was killed
        else:
            started = {"version": FORMAT, "started": _now(), "directory": str(Path.cwd())}
            self._facts = {**started, **facts, **machine_facts(), "resumed": []}
        if config.log.wandb is not None:
            self._facts.setdefault("wandb_id", uuid.uuid4().hex[:8])
        # First: it explains the others. And true, should the run end before it begins.
        before = {"finished": _now(), "reason": "it had not begun", "wall_seconds": self._facts.get("wall_seconds")}
        self._state(status="interrupted", **before)
        try:
            write_file(self._path / "config.yaml", to_yaml(config))
        except OSError as error:
            self._state(status="failed", finished=_now(), reason=str(error), wall_seconds=0.0)
            raise
        self._boards = Boards(config, self._path, step, self._facts["wandb_id"] if config.log.wandb else None)

    def begin(self) -> None:
        """From here to `close`, run.json says that the run is running."""
        self._state(status="running", finished=None, reason=None, wall_seconds=None)

    def step(self, record: Record) -> None:
        self._append("metrics.jsonl", record, prefix="")

    def evaluation(self, record: Record) -> None:
        self._append("evals.jsonl", record, prefix="heldout.")

    def evaluations(self) -> list[Record]:
        return [*read_records(self._path / "evals.jsonl"), *map(json.loads, self._left["evals.jsonl"])]

    def heldout_success(self, step: int) -> float | None:
        """None: there was no evaluation after that step."""
        return {record["step"]: record["success"] for record in self.evaluations()}.get(step)

    def flush(self) -> None:
        """All records are on the disk itself when this returns, so a checkpoint may follow. OSError: they are not, or
        the directory is no longer that of this run."""
        self.directory.require()
        for name in self._left:
            self._write_left(name, flush=True)
        for name in list(self._left_files):
            self._write_left_file(name)

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
        text = json.dumps(record, default=str)
        self._write_whole(f"trees/step_{step:06d}.json", lambda path: write_file(path, text))

    def answers(self, step: int, answered: Sequence[AnsweredQuestion]) -> None:
        """Of a held-out evaluation."""
        self._write_whole(f"answers/step_{step:06d}.jsonl", lambda path: write_answers(path, step, answered))

    def close(self, status: str, reason: str | None = None) -> None:
        """`status`: finished, interrupted or failed; `reason`: the error's text. Records that are still left are tried
        once more; those that cannot be written are in `reason`, and the run has not finished."""
        self.directory.require()
        lost = []
        for name, left in self._left.items():
            try:
                self._write_left(name)
            except OSError as error:
                steps = ", ".join(str(json.loads(line)["step"]) for line in left)
                lost.append(f"{name} lacks step {steps}: {error}")
        for name in list(self._left_files):
            try:
                self._write_left_file(name)
            except OSError as error:
                lost.append(f"{name} is not there: {error}")
        if lost:
            status = "failed" if status == "finished" else status
            reason = "; ".join(filter(None, [reason, *lost]))
        try:
            self._state(status=status, finished=_now(), reason=reason, wall_seconds=time.perf_counter() - self._start)
        finally:
            self._boards.close(finished=status == "finished")

    def _append(self, name: str, record: Record, prefix: str) -> None:
        self._left[name].append(json.dumps(finite(record), allow_nan=False) + "\n")
        try:
            self.directory.require()
            self._write_left(name)
        finally:
            self._boards.write(record, prefix, record["step"])

    def _write_left(self, name: str, *, flush: bool = False) -> None:
        append_lines(self._path / name, "".join(self._left[name]), flush=flush)
        self._left[name].clear()

    def _write_whole(self, name: str, write: Callable[[Path], None]) -> None:
        self._left_files[name] = write
        self._write_left_file(name)

    def _write_left_file(self, name: str) -> None:
        path = self._path / name
        path.parent.mkdir(exist_ok=True)
        self._left_files[name](path)
        del self._left_files[name]

    def _state(self, **changes: Any) -> None:
        self._facts.update(changes)
        write_file(self._path / "run.json", json.dumps(self._facts, indent=2) + "\n")


@contextlib.contextmanager
def naming_its_directory(run: Path | None) -> Iterator[None]:
    """Settings name files as seen from the directory in which a run was begun: a ValueError in another one says so. Of
    a model that cannot be found, that the command may name it."""
    try:
        yield
    except ValueError as error:
        if run is None:
            raise
        began = read_facts(run).get("directory")
        elsewhere = "" if began in (None, str(Path.cwd())) else f" ({run} was begun in {began})"
        moved = "; if it was moved, add model.name=PLACE to this command" * str(error).startswith("model.name = ")
        if not (elsewhere or moved):
            raise
        raise ValueError(f"{error}{moved}{elsewhere}") from error


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
