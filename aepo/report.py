"""`aepo report RUN [RUN ...]`: one self-contained HTML page out of the files of a run directory.

    run.json, config.yaml, metrics.jsonl, evals.jsonl, trees/*.json  ->  Run  ->  JSON  ->  templates/report.html.j2

Unfinished runs are reported as they are. What is missing is shown as missing; what cannot be read is listed on the
page. Text that a model or a tool wrote is untrusted: it reaches the page only escaped.

The charts are 150 lines of SVG code (templates/charts.js) instead of plotly: plotly's script alone is 4.8 MB, the whole
page of a 60-step run is 0.3 MB.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aepo.own_loss import CLIPPED, MEASURED
from aepo.run_reader import Run, read_run

STAGES = ("rollout", "reward", "old_logprobs", "pack", "update", "refresh")


# Of reward.* and policy.*: not a component of the reward, not a metric of the user's own loss.
EXPLAINED = {"reward.mean", "reward.std", *(f"policy.{name}" for name in (*MEASURED, "flipped", *CLIPPED))}


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
    optional: bool = False  # left out where nothing of it was recorded


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
        Chart("Metrics of policy.loss", {"policy.*": "*"}, low=None, optional=True),
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


def _page_data(runs: Sequence[Run]) -> Any:
    """What the scripts draw, as JSON that may stand inside a <script> element."""
    from markupsafe import Markup

    data = {
        "runs": [{"name": run.name, "series": run.series, "rule": _branch_rule(run)} for run in runs],
        "shelves": [
            {"title": title, "charts": [data for chart in charts if (data := _chart_data(chart, runs))["series"]]}
            for title, charts in CHARTS.items()
        ],
        "trees": [{"run": index, **tree} for index, run in enumerate(runs) for tree in run.trees],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))  # "</script>" and "<!--" would end or bend the element


def _branch_rule(run: Run) -> dict[str, float]:
    return {key: value for key, value in run.config.get("rollout", {}).items() if key.startswith("branch_")}


def _chart_data(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    known = sorted({key for run in runs for key in run.series})  # sorted: kinds in one order in every chart
    series = []
    for key, label in chart.keys.items():
        if not key.endswith("*"):
            series.append({"key": key, "label": label})
            continue
        stem = key[:-1]
        series += [
            {"key": one, "label": label.replace("*", one.removeprefix(stem).replace("_", " "))}
            for one in known
            if one.startswith(stem) and one not in EXPLAINED
        ] or ([] if chart.optional else [{"key": key, "label": label}])
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
    yield "loss", config.get("policy", {}).get("loss")
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
