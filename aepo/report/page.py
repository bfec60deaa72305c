"""Writes the page: of runs, and of rollouts without a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aepo.report.charts import chart_data, moving_mean, window
from aepo.report.reader import Run, read_run
from aepo.report.summary import differences, summary
from aepo.report.trees import fitting_trees, page_tree
from aepo.run.files import write_file
from aepo.run.outputs import refuse_output, refuse_run_files

SCRIPTS = ("base.js", "charts.js", "export.js", "trees.js", "browser.js", "answers.js", "page.js")


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about one run, or about several overlaid ones, and return its path.

    Default place: report.html in the run directory, or, for several runs, in the directory that holds them all.
    ValueError: nothing was given, a directory is not a run, a run has not finished a step or an evaluation, or the page
    would be written over a run's own files, also by a link, or cannot be written.
    """
    if out is not None:
        refuse_output("--out", Path(out))
    paths = named_runs(runs)
    first = next(iter(paths.values()))
    parent = first if len(paths) == 1 else Path(os.path.commonpath([path.resolve() for path in paths.values()]))
    page = Path(out or parent / "report.html")
    if out is None:
        refuse_run_files("report", page)
    return _write(render([read_run(path, name) for name, path in paths.items()]), page)


def write_rollout_page(
    trees: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], out: Path, *, config: Mapping[str, Any] | None = None
) -> Path:
    """Write the page about rollouts without a training run, and return its path.

    trees: entries of "trees" as in RUN/trees/step_*.json. facts: as in run.json, such as model, task, format, tools,
    versions; its "name", or that of the directory, is the title. config: all settings, section -> name -> value.
    ValueError: `out` is one of a run's own files.
    """
    refuse_run_files("out", Path(out))
    plain = json.loads(json.dumps(list(trees), default=str), parse_constant=lambda name: None)
    problems: list[str] = []
    shown = fitting_trees([page_tree(0, entry) for entry in plain], problems)
    name = str(facts.get("name") or Path(out).resolve().parent.name)
    run = Run(name, dict(facts), dict(config or {}), {}, shown, None, problems)
    return _write(render([run]), out)


def named_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """Run directories by the names that the page calls them. ValueError: none, or one is named twice."""
    if not runs:
        raise ValueError("runs: expected at least one run directory")
    paths = [Path(run) for run in runs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"runs: the same directory is named twice: {', '.join(map(str, paths))}")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return dict(zip(names, paths, strict=True))


def render(runs: Sequence[Run], *, live: str = "") -> str:
    """The whole page. live: the tag of a page that asks the server it came from for newer ones."""
    from jinja2 import Environment, PackageLoader

    summaries = [summary(run) for run in runs]
    environment = Environment(
        loader=PackageLoader("aepo.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=summaries,
        columns=list(dict.fromkeys(label for one in summaries for label in one["tiles"])),
        differences=differences(runs),
        curves=any(run.series for run in runs),
        data=_page_data(runs),
        scripts=(*SCRIPTS, "live.js") if live else SCRIPTS,
        live=live,
    )


def encoded(page: str) -> bytes:
    """UTF-8; a lone surrogate (half a character, from a damaged file) has no such form."""
    return page.encode("utf-8", errors="replace")


def _write(page: str, out: Path) -> Path:
    out = Path(out)
    write_file(out, encoded(page))
    return out


def _page_data(runs: Sequence[Run]) -> Any:
    """What the scripts draw, as JSON that may stand inside a <script> element."""
    from markupsafe import Markup

    shelves = chart_data(runs)
    averaged = {
        one["key"] for shelf in shelves for chart in shelf["charts"] if chart["smooth"] for one in chart["series"]
    }
    data = {
        "runs": [
            {
                "name": run.name,
                "series": _series(run, averaged),
                "rule": _branch_rule(run),
                "answers": run.answers,
            }
            for run in runs
        ],
        "shelves": shelves,
        "trees": [{"run": index, **tree} for index, run in enumerate(runs) for tree in run.trees],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))  # "</script>" and "<!--" would end or bend the element


def _series(run: Run, averaged: set[str]) -> dict[str, dict[str, list]]:
    return {
        key: points | {"line": moving_mean(points["values"])}
        if key in averaged and window(len(points["values"])) > 1
        else points
        for key, points in run.series.items()
    }


def _branch_rule(run: Run) -> dict[str, float]:
    return {key: value for key, value in run.config.get("rollout", {}).items() if key.startswith("branch_")}
