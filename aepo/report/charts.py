"""Which charts a page has, of which metrics, and the data that templates/charts.js draws them from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context
from typing import Any

from aepo.own_loss import CLIPPED, MEASURED
from aepo.report.files import rounded
from aepo.report.reader import Run

STAGES = ("rollout", "reward", "old_logprobs", "pack", "update", "refresh")

# Of reward.* and policy.*: not a component of the reward, not a metric of the user's own loss.
EXPLAINED = {"reward.mean", "reward.std", *(f"policy.{name}" for name in (*MEASURED, "flipped", *CLIPPED))}


@dataclass(frozen=True)
class Chart:
    """One chart: `keys` maps a metric to its label; a key that ends in "*" stands for every metric that starts so.
    What is before "*" and no dot ends at the next dot: "eval.pass@*" is not eval.pass@4.capital."""

    title: str
    keys: dict[str, str]
    unit: str = ""  # "%": values are shares of 1; "s": seconds
    low: float | None = 0.0  # the axis reaches at least from here ...
    high: float | None = None  # ... to here
    stacked: bool = False
    smooth: bool = False  # the line is the moving mean, and what was measured is a thin one
    note: str = ""
    optional: bool = False  # left out where nothing of it was recorded


# Four shelves of the page, in reading order: does it learn, what does the update do, what do the rollouts do, how fast.
CHARTS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        Chart("Held-out success", {"eval.success": "success"}, "%", note="step 0: before the first step"),
        Chart("Held-out success by kind", {"eval.success.*": "*"}, "%"),
        Chart("Held-out pass@k", {"eval.pass@*": "k = *"}, "%", optional=True),
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
            smooth=True,
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
            smooth=True,
        ),
        Chart("Time per step", {f"seconds.{stage}": stage.replace("_", "-") for stage in STAGES}, "s", stacked=True),
        Chart("Peak memory", {"memory.peak_rss_mib": "process", "memory.peak_gpu_mib": "GPU"}, note="MiB"),
    ),
}


def chart_data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The shelves with their charts; a chart names the series that it shows."""
    return [
        {"title": title, "charts": [data for chart in charts if (data := _chart(chart, runs))["series"]]}
        for title, charts in CHARTS.items()
    ]


def _chart(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
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
            if one.startswith(stem) and one not in EXPLAINED and (stem.endswith(".") or "." not in one[len(stem) :])
        ] or ([] if chart.optional else [{"key": key, "label": label}])
    look = {name: getattr(chart, name) for name in ("title", "unit", "low", "high", "stacked", "smooth", "note")}
    return look | {"id": chart.title.lower().replace(" ", "-"), "series": series}


def chart_of(key: str) -> Chart:
    """The chart that shows a metric."""
    return next(chart for charts in CHARTS.values() for chart in charts if key in chart.keys)


def line_of(points: dict[str, list], chart: Chart) -> list[float | None]:
    """The values of the line of a chart, at the steps of `points`: tiles and charts read the same one."""
    return moving_mean(points["values"]) if chart.smooth else points["values"]


def window(points: int) -> int:
    """How many points, a tenth of them, a moving mean is taken over."""
    return max(1, points // 10)


def moving_mean(values: Sequence[float | None]) -> list[float | None]:
    """At every point the mean of the last tenth of all points up to there."""
    size = window(len(values))
    return [_mean(values[max(0, i + 1 - size) : i + 1]) for i in range(len(values))]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return rounded(sum(there) / len(there), 5) if there else None


def formatted(value: float, unit: str = "") -> str:
    """A number as `formatted` in templates/base.js writes it."""
    if unit == "%":
        return f"{_digits(100 * value, 2 if abs(value) < 0.1 else 3)}%"
    if unit == "s":
        return f"{formatted(value)} s"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return re.sub(r"e([+-])0", r"e\1", f"{value:.1e}")
    return f"{math.floor(value + 0.5):,}" if abs(value) >= 1000 else _digits(value, 3)


def _digits(value: float, digits: int) -> str:
    """So many significant digits; 5 is rounded up as in JavaScript."""
    return format(Context(prec=digits, rounding=ROUND_HALF_UP).create_decimal_from_float(value).normalize(), "f")
