"""Reading a run directory for the report: whatever can be read, and a list of what cannot.

The files are those of `aepo.run_log` and may be unfinished, damaged or missing; nothing that they hold is trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Trees take about 20 bytes per token in the page: at most some 4 MB.
MAX_TREE_TOKENS = 200_000


@dataclass(frozen=True)
class Run:
    """What could be read of one run directory."""

    name: str
    facts: dict[str, Any]  # run.json
    config: dict[str, Any]  # config.yaml
    series: dict[str, dict[str, list]]  # metric -> steps and values; None where a value is undefined
    trees: list[dict[str, Any]]  # in page form, see `_page_tree`
    problems: list[str]


def read_run(path: Path, name: str) -> Run:
    """Everything that the report needs out of a run directory; unreadable parts are listed in `problems`."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    if not any((path / file).exists() for file in ("run.json", "metrics.jsonl", "evals.jsonl")):
        raise ValueError(f"{path}: not a run directory (it has no run.json, metrics.jsonl or evals.jsonl)")
    problems: list[str] = []
    facts = _read(path / "run.json", _read_json, problems) or {}
    config = _read(path / "config.yaml", _read_yaml, problems) or {}
    metrics = _read(path / "metrics.jsonl", lambda file: _read_lines(file, problems), problems) or []
    evals = _read(path / "evals.jsonl", lambda file: _read_lines(file, problems), problems) or []
    if not metrics and not evals:
        raise ValueError(f"{path}: nothing to report yet, no step and no evaluation has finished")
    tools = {key for record in metrics for key in record if key.startswith("tools.calls.")}
    series = _series([_derived(record, tools) for record in metrics], "", problems)
    series |= _series(evals, "eval.", problems)
    if not series:
        raise ValueError(f"{path}: its records hold no number")
    return Run(name, facts, config, series, _read_trees(path / "trees", problems), problems)


def _read(file: Path, reader: Callable[[Path], Any], problems: list[str]) -> Any:
    try:
        return reader(file)
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except Exception as error:  # a damaged file, in as many ways as its reader has; the page says so and goes on
        problems.append(f"{file.name} cannot be read: {(str(error).splitlines() or [repr(error)])[0]}")
    return None


def _read_json(file: Path) -> dict[str, Any]:
    return _mapping(json.loads(file.read_text(encoding="utf-8")))


def _read_yaml(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return _mapping(OmegaConf.to_container(OmegaConf.load(file)))


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"expected keys and values, got {type(content).__name__}")
    return content


def _read_lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a line that is not a record with a step is left out and listed."""
    text = file.read_bytes().decode("utf-8", errors="replace")
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError
            records.append(record)
        except (ValueError, TypeError, KeyError):
            # The writer ends every record with a newline: a tail without one was cut off when the process died.
            cut = number == text.count("\n") + 1
            problems.append(f"{file.name}, line {number}: {'cut off' if cut else 'not a record'}, left out")
    return records


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
            points["values"].append(_rounded(value, 5))
    return {key: points for key, points in series.items() if any(value is not None for value in points["values"])}


def _read_trees(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The saved trees in page form. Where they are more than the page can hold: evenly spread steps, ends included."""
    steps = []
    for file in sorted(folder.glob("step_*.json")):
        record = _read(file, _read_json, problems)
        if record is not None:
            try:
                steps.append([_page_tree(record["step"], entry) for entry in record["trees"]])
            except (KeyError, IndexError, TypeError, ValueError) as error:
                problems.append(f"{file.name}: not a record of rollout trees ({type(error).__name__}: {error})")
    sizes = [sum(len(node["texts"]) for tree in step for node in tree["nodes"]) for step in steps]
    keep = len(steps)
    while keep > 1 and sum(sizes[i] for i in _spread(len(steps), keep)) > MAX_TREE_TOKENS:
        keep -= 1
    if keep < len(steps):
        problems.append(f"trees: {keep} of {len(steps)} saved steps are shown, to keep the page small")
    return [tree for i in _spread(len(steps), keep) for tree in steps[i]]


def _spread(total: int, keep: int) -> list[int]:
    """`keep` of the indices 0 .. total - 1, evenly spread, the last one always among them."""
    return [total - 1 - (i * (total - 1)) // max(keep - 1, 1) for i in reversed(range(keep))]


def _page_tree(step: int, entry: dict[str, Any]) -> dict[str, Any]:
    """One saved tree as trees.js wants it: token texts and rounded numbers, without token ids."""
    tree = entry["tree"]
    texts = entry.get("texts") or [[f"[{token}]" for token in node["token_ids"]] for node in tree["nodes"]]
    for links in (tree["nodes"], tree["paths"]):  # the page follows parents: a circle would never end
        if any(link["parent"] is not None and not 0 <= link["parent"] < index for index, link in enumerate(links)):
            raise ValueError("a parent that does not come before its child")
    nodes = []
    for node, pieces in zip(tree["nodes"], texts, strict=True):
        if len(pieces) != len(node["token_ids"]):
            raise ValueError(f"node {node['id']} has {len(node['token_ids'])} tokens and {len(pieces)} texts")
        nodes.append(
            {key: node[key] for key in ("parent", "source", "call", "result")}
            | {key: [_rounded(value, 3) for value in node[key]] for key in ("entropies", "logprobs")}
            | {"texts": pieces}
        )
    decisions = [
        {key: _rounded(value, 4) if isinstance(value, float) else value for key, value in decision.items()}
        for decision in tree["decisions"]
    ]
    question = {key: tree["question"][key] for key in ("id", "text", "answer", "kind")}
    shared = {key: tree[key] for key in ("paths", "budget")}
    scores = {"rewards": entry.get("rewards"), "advantages": entry.get("advantages")}
    return {"step": step, "question": question, "nodes": nodes, "decisions": decisions, **shared, **scores}


def _rounded(value: float | None, digits: int) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")
