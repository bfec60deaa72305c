"""Reading a run directory for the report: whatever can be read, and a list of what cannot.

The files are those of `aepo.run.log` and may be unfinished, damaged or missing; nothing that they hold is trusted.
"""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aepo.report.answers import read_answers
from aepo.report.files import read_json, read_lines, read_part, read_yaml, rounded
from aepo.report.trees import PageTree, read_trees
from aepo.run.lock import is_held, last_holder


class NothingYet(ValueError):
    """A run that has begun and has nothing to show."""


@dataclass(frozen=True)
class Run:
    """What could be read of one run directory."""

    name: str
    facts: dict[str, Any]  # run.json
    config: dict[str, Any]  # config.yaml
    series: dict[str, dict[str, list]]  # metric -> steps and values; None where a value is undefined
    trees: list[PageTree]
    answers: dict[str, Any] | None = None  # see `read_answers`
    problems: list[str] = field(default_factory=list)


def read_run(path: Path, name: str) -> Run:
    """Everything that the report needs out of a run directory; unreadable parts are listed in `problems`."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    if not any((path / file).exists() for file in ("run.json", "metrics.jsonl", "evals.jsonl")):
        raise ValueError(f"{path}: not a run directory (it has no run.json, metrics.jsonl or evals.jsonl)")
    problems: list[str] = []
    facts = read_part(path / "run.json", read_json, problems) or {}
    if facts.get("status") == "running":
        facts["status"] = _status(path)
    config = read_part(path / "config.yaml", read_yaml, problems) or {}
    metrics = read_part(path / "metrics.jsonl", lambda file: read_lines(file, problems), problems) or []
    evals = read_part(path / "evals.jsonl", lambda file: read_lines(file, problems), problems) or []
    if not metrics and not evals:
        raise NothingYet(f"{path}: nothing to report yet, no step and no evaluation has finished")
    tools = {key for record in metrics for key in record if key.startswith("tools.calls.")}
    series = _series([_derived(record, tools) for record in metrics], "", problems)
    series |= _series(evals, "eval.", problems)
    if not series:
        raise ValueError(f"{path}: its records hold no number")
    trees, answers = read_trees(path / "trees", problems), read_answers(path / "answers", problems)
    return Run(name, facts, config, series, trees, answers, problems)


def _status(path: Path) -> str:
    """Of a run whose run.json says that it goes on: running, or ended, or unknown where nothing can be said."""
    held = is_held(path)
    if (
        held is False and last_holder(path).get("host") == socket.gethostname()
    ):  # a lock of another host may not be seen
        return "ended without a word: killed, or the disk was full"
    return "running" if held else "unknown"


def _derived(record: dict[str, Any], tools: set[str]) -> dict[str, Any]:
    """The numbers of one step, with the shares that the charts show in place of counts. A tool without an entry in a
    step was not called in it."""
    values = {key: value for key, value in record.items() if not isinstance(value, list)}
    counts, paths = record.get("rollout.branches_per_path"), record.get("rollout.paths")
    if counts and sum(counts):
        for branches in range(3):
            values[f"branches.{branches}"] = counts[branches] / sum(counts) if branches < len(counts) else 0.0
        values["branches.3"] = sum(counts[3:]) / sum(counts)
    flips, tokens = record.get("policy.advantage_flips"), record.get("tokens.trained")
    if flips is not None and tokens:
        values["policy.flipped"] = flips / tokens
    if paths:
        values |= {f"calls.{key.removeprefix('tools.calls.')}": (record.get(key) or 0) / paths for key in tools}
    if record.get("tools.calls"):
        for key, value in record.items():
            if key.startswith("tools.failures."):
                values[f"failures.{key.removeprefix('tools.failures.')}"] = (value or 0) / record["tools.calls"]
    return values


def _series(records: list[dict[str, Any]], prefix: str, problems: list[str]) -> dict[str, dict[str, list]]:
    series: dict[str, dict[str, list]] = {}
    for record in records:
        for key, value in record.items():
            if key == "step" or isinstance(value, (str, bool, list, dict)):
                continue
            if value is not None and not math.isfinite(value):
                problems.append(f"{prefix}{key} is {value} at step {record['step']}")
                value = None
            points = series.setdefault(prefix + key, {"steps": [], "values": []})
            points["steps"].append(record["step"])
            points["values"].append(rounded(value, 5))
    return {key: points for key, points in series.items() if any(value is not None for value in points["values"])}
