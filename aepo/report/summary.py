"""What the head of the page says: how far a run has come, its numbers, what it ran on, and its settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aepo.config import all_keys
from aepo.report.charts import chart_of, formatted, line_of, window
from aepo.report.reader import Run
from aepo.report.trees import PageTree

# Metric -> label of its tile. The value is the last one of the metric's line in its chart.
TILES = {
    "eval.success": "held-out success",
    "reward.mean": "training reward",
    "policy.entropy": "entropy, nats per token",
    "tokens.per_second": "tokens per second",
    "memory.peak_rss_mib": "peak memory, MiB",
}

HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b")

Tile = dict[str, str]  # value and note


def summary(run: Run) -> dict[str, Any]:
    """The head of the page about one run."""
    progress = _progress(run) if run.series else ""
    return {
        "name": run.name,
        "headline": "; ".join(filter(None, [_gain(run), progress])) + "." if progress else "",
        "progress": progress,
        "tiles": dict(_tiles(run)) if run.series else dict(_rollout_tiles(run.trees)),
        "facts": [(name, words) for name, value in _facts(run) if (words := _words(value))],
        "settings": settings(run),
        "problems": run.problems,
    }


def settings(run: Run) -> dict[str, list[dict[str, str]]]:
    """All settings of a run: those that are not the default of this version, then the others."""
    known = {key.name: key for key in all_keys()}
    parts: dict[str, list[dict[str, str]]] = {"changed": [], "default": []}
    for name, value in _flat(run.config).items():
        key = known.get(name)
        default = _written(key.default) if key else "unknown in this version"
        entry = {"name": name, "value": _written(value), "default": default, "help": key.help if key else ""}
        parts["default" if entry["value"] == default else "changed"].append(entry)
    return parts


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings in which several runs differ, with the value of each."""
    flat = [{name: _written(value) for name, value in _flat(run.config).items()} for run in runs]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [{"name": name, "values": [one.get(name, "not set") for one in flat]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names; a setting that is a mapping itself, such as task.options, is one setting."""
    return {
        f"{section}.{name}": value
        for section, content in config.items()
        for name, value in (content.items() if isinstance(content, dict) else [("", content)])
    }


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _progress(run: Run) -> str:
    status, reason = run.facts.get("status"), run.facts.get("reason")
    steps = max(points["steps"][-1] for points in run.series.values())
    planned = run.config.get("train", {}).get("steps")
    wall = (
        None if run.facts.get("resumed") else run.facts.get("wall_seconds")
    )  # of the last part only, if one was killed
    progress = f"{steps} steps" if planned in (None, steps) else f"{steps} of {planned} steps"
    progress += f" in {_duration(wall)}" if wall is not None else ""
    if status == "running":
        return f"{progress}, still going"
    if status == "unknown":
        return f"{progress}, still going (or it died without a word)"
    return progress if status in (None, "finished") else f"{progress}, {status}" + (f": {reason}" if reason else "")


def _gain(run: Run) -> str:
    evaluations = _line(run, "eval.success")
    if len(evaluations) < 2:
        return ""
    (first, before), (last, after) = evaluations[0], evaluations[-1]
    start = "the start" if first == 0 else f"step {first}"
    return f"Held-out success went from {formatted(before, '%')} at {start} to {formatted(after, '%')} at step {last}"


def _line(run: Run, key: str) -> list[tuple[int, float]]:
    """Steps and values of a metric's line in its chart."""
    points = run.series.get(key)
    if points is None:
        return []
    line = line_of(points, chart_of(key))
    return [(step, value) for step, value in zip(points["steps"], line, strict=True) if value is not None]


def _tiles(run: Run) -> Iterator[tuple[str, Tile]]:
    """Label, value at the last step, and what it was at the start. A moving mean starts where its window is full."""
    for key, label in TILES.items():
        line, chart = _line(run, key), chart_of(key)
        if not line:
            continue
        size = window(len(run.series[key]["values"])) if chart.smooth else 1
        (first, before), (last, after) = line[min(size, len(line)) - 1], line[-1]
        notes = [f"mean of {size} steps"] if size > 1 else []
        if key == "eval.success" and len(line) > 1:
            best = formatted(max(value for _, value in line), chart.unit)
            notes += [f"{100 * (after - before):+.0f} points since step {first}, best {best}"]
        elif last > first:
            notes += [f"{formatted(before, chart.unit)} at step {first}"]
        yield label, {"value": formatted(after, chart.unit), "note": ", ".join(notes)}
    calls, failures = (sum(value for _, value in _counts(run, key)) for key in ("tools.calls", "tools.failures"))
    if calls:
        note = f"{failures:,} of {calls:,} in the whole run; the chart has each step"
        yield "tool calls failed", {"value": formatted(failures / calls, "%"), "note": note}


def _counts(run: Run, key: str) -> Iterator[tuple[int, int]]:
    points = run.series.get(key, {"steps": [], "values": []})
    return ((step, value) for step, value in zip(points["steps"], points["values"], strict=True) if value is not None)


def _rollout_tiles(trees: Sequence[PageTree]) -> Iterator[tuple[str, Tile]]:
    """Of trees without a run."""
    rewards = [reward for tree in trees for reward in tree["rewards"] or ()]
    paths = [path for tree in trees for path in tree["paths"]]
    results = [result for tree in trees for node in tree["nodes"] for result in node.get("results", ())]
    yield "questions", {"value": f"{len(trees):,}", "note": f"{len(paths):,} paths"}
    totals = [reward["total"] for reward in rewards if reward["total"] is not None]
    if totals:
        solved = sum(bool(reward["success"]) for reward in rewards)
        yield "mean reward", {"value": formatted(sum(totals) / len(totals)), "note": "over all paths"}
        yield "success", {"value": formatted(solved / len(rewards), "%"), "note": f"{solved:,} of {len(rewards):,}"}
    branches = sum(path["parent"] is not None for path in paths)
    yield "branches", {"value": f"{branches:,}", "note": f"{len(paths) - branches:,} paths start fresh"}
    if results:
        failed = sum(bool(result["error"]) for result in results)
        note = f"{failed:,} of {len(results):,}"
        yield "tool calls failed", {"value": formatted(failed / len(results), "%"), "note": note}


def _facts(run: Run) -> Iterator[tuple[str, Any]]:
    config, facts = run.config, run.facts
    machine, versions = facts.get("machine", {}), facts.get("versions", {})
    model, task = facts.get("model", {}), facts.get("task", {})
    train, rollout = config.get("train", {}), config.get("rollout", {})
    if run.series:
        yield "method", config.get("policy", {}).get("preset")
        yield "loss", config.get("policy", {}).get("loss")
    yield "seed", config.get("run", {}).get("seed")
    if model:
        yield "model", f"{model.get('name')}, {model.get('parameters', 0):,} parameters, V = {model.get('vocab_size')}"
    if task:
        counts = [
            (task.get(f"{part}_questions"), name) for part, name in (("train", "training"), ("heldout", "held-out"))
        ]
        yield (
            "task",
            [task.get("name"), *(f"{count:,} {name} questions" for count, name in counts if count is not None)],
        )
        yield "data", task.get("data")
    if isinstance(facts.get("format"), Mapping):  # a number in older runs: of the files
        yield "format", facts["format"]
    for name in ("tools", "environment", "rewards", "code"):
        yield name, facts.get(name)
    if run.series and train and rollout:
        yield "batch", f"{train.get('questions')} questions x {rollout.get('paths')} paths per step"
    if rollout:
        yield "fresh paths", rollout.get("fresh_paths") or "by entropy pre-monitoring"
    if run.series:
        yield "learning rate", config.get("optimizer", {}).get("learning_rate")
    if machine:
        capability = f" ({machine.get('cpu_capability')})" if machine.get("cpu_capability") else ""
        yield "machine", f"{machine.get('cores')} cores of {machine.get('processor')}{capability}"
        yield "GPU", machine.get("gpu") or "none"
        yield "system", machine.get("platform")
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield "commit", (facts.get("commit") or "")[:12]
    yield "started", facts.get("started")
    yield "status", facts.get("status")
    yield "resumed", [_resumed(resume) for resume in facts.get("resumed", [])]


def _resumed(resume: Mapping[str, Any]) -> str:
    changed = "; ".join(resume.get("changed", ()))
    return f"at step {resume['step']}{f' ({changed})' if changed else ''}"


def _words(value: Any) -> str:
    """A fact for people: keys with values, and lists, without brackets; hashes by their first digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {words}" for name, one in value.items() if (words := _words(one)))
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_words, value)))
    return "" if value is None else HASH.sub(r"\1..", str(value))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
