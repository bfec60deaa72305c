"""`aepo report RUN [RUN ...]`: one self-contained HTML page out of the files of a run directory.

    run.json, config.yaml, metrics.jsonl, evals.jsonl, trees/*.json  ->  Run  ->  JSON  ->  templates/report.html.j2

Unfinished runs are reported as they are. What is missing is shown as missing; what cannot be read is listed on the
page. Text that a model or a tool wrote is untrusted: it reaches the page only escaped.

The charts are 150 lines of SVG code (templates/charts.js) instead of plotly: plotly's script alone is 4.8 MB, the whole
page of a 60-step run is 0.3 MB.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Trees take about 20 bytes per token in the page: at most some 4 MB.
MAX_TREE_TOKENS = 200_000

STAGES = ("rollout", "reward", "old_logprobs", "pack", "update", "refresh")


@dataclass(frozen=True)
class Chart:
    """One chart: `keys` maps a metric to its label; a key that ends in "*" stands for every metric that starts so."""

    title: str
    keys: dict[str, str]
    unit: str = ""  # "%": values are shares of 1; "s": seconds
    low: float | None = 0.0  # the axis reaches at least from here ...
    high: float | None = None  # ... to here
    stacked: bool = False
    smooth: bool = False  # also draw the moving mean
    note: str = ""


# Four shelves of the page, in reading order: does it learn, what does the update do, what do the rollouts do, how fast.
CHARTS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        Chart("Held-out success", {"eval.success": "success"}, "%", note="step 0: the warm start"),
        Chart("Held-out success by kind", {"eval.success.*": "*"}, "%"),
        Chart("Reward", {"reward.mean": "mean over all paths"}, smooth=True, note="in training"),
        Chart("Reward components", {"reward.*": "*"}, smooth=True),
        Chart("Training success by kind", {"train.success.*": "*"}, "%", smooth=True),
        Chart("Questions with equal rewards", {"advantage.zero_groups": "share"}, "%", smooth=True, note="no signal"),
    ),
    "Policy update": (
        Chart(
            "Entropy",
            {
                "policy.entropy": "all trained tokens",
                "rollout.root_entropy": "start of the path",
                "rollout.tool_entropy": "after a tool result",
            },
            note="nats per token",
        ),
        Chart(
            "Clipped tokens",
            {"policy.clip_high": "ratio too high", "policy.clip_low": "ratio too low", "policy.dual_clip": "dual clip"},
            "%",
        ),
        Chart("Policy change", {"policy.approx_kl": "approximate KL per token"}, smooth=True, note="nats"),
        Chart("Largest ratio", {"policy.ratio_max": "new over old probability"}, low=1.0),
        Chart(
            "Flipped advantages", {"policy.flipped": "sign turned by the entropy factor"}, "%", note="share of tokens"
        ),
        Chart("Gradient norm", {"optimizer.grad_norm": "before clipping"}, smooth=True),
    ),
    "Rollouts and tools": (
        Chart(
            "Branches per path",
            {"branches.0": "none", "branches.1": "1", "branches.2": "2", "branches.3": "3 and more"},
            "%",
            high=1.0,
            stacked=True,
            note="share of paths",
        ),
        Chart("Fresh paths per question", {"rollout.fresh_paths": "mean"}, note="the others are branches"),
        Chart("How paths end", {"rollout.finish.*": "*"}, "%", high=1.0, stacked=True),
        Chart("Generated tokens per path", {"rollout.path_tokens": "mean"}),
        Chart("Tool calls per path", {"calls.*": "*"}),
        Chart("Failed tool calls", {"failures.*": "*"}, "%"),
    ),
    "Speed": (
        Chart(
            "Tokens per second",
            {"tokens.per_second": "whole step", "tokens.generated_per_second": "generated, in the rollout"},
        ),
        Chart("Time per step", {f"seconds.{stage}": stage.replace("_", "-") for stage in STAGES}, "s", stacked=True),
        Chart("Peak memory", {"memory.peak_rss_mib": "process", "memory.peak_gpu_mib": "GPU"}, note="MiB"),
    ),
}


@dataclass(frozen=True)
class Run:
    """What could be read of one run directory."""

    name: str
    facts: dict[str, Any]  # run.json
    config: dict[str, Any]  # config.yaml
    series: dict[str, dict[str, list]]  # metric -> steps and values; None where a value is undefined
    trees: list[dict[str, Any]]  # in page form, see `_page_tree`
    problems: list[str]


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about one run, or about several overlaid ones, and return its path.

    Default place: report.html in the run directory, or, for several runs, in the directory that holds them all.
    ValueError: nothing was given, a directory is not a run, or a run has not finished a step or an evaluation.
    """
    from jinja2 import Environment, PackageLoader

    if not runs:
        raise ValueError("runs: expected at least one run directory")
    paths = [Path(run) for run in runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"runs: the same directory is named twice: {', '.join(map(str, paths))}")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    loaded = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    parent = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.resolve() for path in paths]))
    out = Path(out) if out is not None else parent / "report.html"

    summaries = [_summary(run) for run in loaded]
    environment = Environment(loader=PackageLoader("aepo"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html.j2").render(
        title=" and ".join(names) if len(names) < 4 else f"{len(names)} runs",
        runs=summaries,
        columns=list(dict.fromkeys(label for summary in summaries for label in summary["tiles"])),
        data=_page_data(loaded),
    )
    # A lone surrogate (half a character, from a damaged file) has no UTF-8 form.
    out.write_bytes(page.encode("utf-8", errors="replace"))
    return out


# ---------------------------------------------------------------- reading


def read_run(path: Path, name: str) -> Run:
    """Everything that the report needs out of a run directory; unreadable parts are listed in `problems`."""
    from omegaconf import OmegaConf

    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    if not any((path / file).exists() for file in ("run.json", "metrics.jsonl", "evals.jsonl")):
        raise ValueError(f"{path}: not a run directory (it has no run.json, metrics.jsonl or evals.jsonl)")
    problems: list[str] = []
    facts = _read(path / "run.json", _read_json, problems) or {}
    config = _read(path / "config.yaml", lambda file: OmegaConf.to_container(OmegaConf.load(file)), problems) or {}
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
        problems.append(f"{file.name} cannot be read: {str(error).splitlines()[0]}")
    return None


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
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


# ---------------------------------------------------------------- the page


def _page_data(runs: Sequence[Run]) -> Any:
    """What the scripts draw, as JSON that may stand inside a <script> element."""
    from markupsafe import Markup

    data = {
        "runs": [{"name": run.name, "series": run.series, "rule": _branch_rule(run)} for run in runs],
        "shelves": [
            {"title": title, "charts": [_chart_data(chart, runs) for chart in charts]}
            for title, charts in CHARTS.items()
        ],
        "trees": [{"run": index, **tree} for index, run in enumerate(runs) for tree in run.trees],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))  # "</script>" and "<!--" would end or bend the element


def _branch_rule(run: Run) -> dict[str, float]:
    return {key: value for key, value in run.config.get("rollout", {}).items() if key.startswith("branch_")}


def _chart_data(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    known = list(dict.fromkeys(key for run in runs for key in run.series))
    series = []
    for key, label in chart.keys.items():
        if not key.endswith("*"):
            series.append({"key": key, "label": label})
            continue
        stem = key[:-1]
        series += [
            {"key": one, "label": label.replace("*", one.removeprefix(stem).replace("_", " "))}
            for one in known
            if one.startswith(stem) and one not in ("reward.mean", "reward.std")
        ] or [{"key": key, "label": label}]
    look = {name: getattr(chart, name) for name in ("title", "unit", "low", "high", "stacked", "smooth", "note")}
    return look | {"id": chart.title.lower().replace(" ", "-"), "series": series}


def _summary(run: Run) -> dict[str, Any]:
    """What the head of the page says about a run."""
    progress = _progress(run)
    return {
        "name": run.name,
        "headline": "; ".join(filter(None, [_gain(run), progress])) + ".",
        "progress": progress,
        "tiles": dict(_tiles(run)),
        "facts": [(name, value) for name, value in _facts(run) if value not in (None, "")],
        "problems": run.problems,
    }


def _progress(run: Run) -> str:
    status, reason = run.facts.get("status"), run.facts.get("reason")
    steps = max(points["steps"][-1] for points in run.series.values())
    planned = run.config.get("train", {}).get("steps")
    wall = (
        None if run.facts.get("resumed") else run.facts.get("wall_seconds")
    )  # a resumed run counts its last part only
    progress = f"{steps} steps" if planned in (None, steps) else f"{steps} of {planned} steps"
    progress += f" in {_duration(wall)}" if wall is not None else ""
    if status == "running":
        return f"{progress}, the run was still going or had died when this page was written"
    return progress if status in (None, "finished") else f"{progress}, {status}" + (f": {reason}" if reason else "")


def _gain(run: Run) -> str:
    points = run.series.get("eval.success")
    values = _finite(run, "eval.success")
    if points is None or len(values) < 2:
        return ""
    start = "the start" if points["steps"][0] == 0 else f"step {points['steps'][0]}"
    return f"Held-out success went from {values[0]:.0%} at {start} to {values[-1]:.0%}"


def _finite(run: Run, key: str) -> list[float]:
    return [value for value in run.series.get(key, {"values": []})["values"] if value is not None]


def _tiles(run: Run) -> Iterator[tuple[str, dict[str, str]]]:
    """Label, value now, and what it was at the start. Noisy metrics: means over the first and last tenth of the run."""
    success = _finite(run, "eval.success")
    if success:
        gain = f"{100 * (success[-1] - success[0]):+.0f} points, best {max(success):.0%}" if len(success) > 1 else ""
        yield "held-out success", {"value": f"{success[-1]:.0%}", "note": gain}
    for key, label, form in (
        ("reward.mean", "training reward", "{:.2f}"),
        ("policy.entropy", "entropy, nats per token", "{:.2f}"),
        ("tokens.per_second", "tokens per second", "{:,.0f}"),
        ("memory.peak_rss_mib", "peak memory, MiB", "{:,.0f}"),
    ):
        values = _finite(run, key)
        if values:
            part = max(1, len(values) // 10)
            first, last = sum(values[:part]) / part, sum(values[-part:]) / part
            note = f"{form.format(first)} at the start" if len(values) > part else ""
            yield label, {"value": form.format(last), "note": note}
    calls, failures = sum(_finite(run, "tools.calls")), sum(_finite(run, "tools.failures"))
    if calls:
        yield "tool calls failed", {"value": f"{failures / calls:.1%}", "note": f"{failures:,} of {calls:,}"}


def _facts(run: Run) -> Iterator[tuple[str, Any]]:
    config, facts = run.config, run.facts
    machine, versions = facts.get("machine", {}), facts.get("versions", {})
    model, task = facts.get("model", {}), facts.get("task", {})
    train, rollout = config.get("train", {}), config.get("rollout", {})
    yield "method", config.get("policy", {}).get("preset")
    yield "seed", config.get("run", {}).get("seed")
    if model:
        yield "model", f"{model.get('name')}, {model.get('parameters', 0):,} parameters, V = {model.get('vocab_size')}"
    if task:
        counts = f"{task.get('train_questions')} training and {task.get('heldout_questions')} held-out questions"
        yield "task", f"{task.get('name')}, {counts}"
    if train and rollout:
        yield "batch", f"{train.get('questions')} questions x {rollout.get('paths')} paths per step"
    if rollout:
        yield "fresh paths", rollout.get("fresh_paths") or "by entropy pre-monitoring"
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
    yield "resumed", ", ".join(f"at step {resume['step']}" for resume in facts.get("resumed", []))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
