"""Time and peak memory against the number of tokens, or the size of the vocabulary, as one figure (matplotlib)."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aepo.bench.harness import Row, is_baseline, is_ours
from aepo.bench.settings import Settings
from aepo.install import pip_install
from aepo.run.outputs import refuse_run_files

PEERS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
"""Colours; red is ours, black is eager."""
FORMATS = (".svg", ".png", ".pdf")


def check_plot(settings: Settings, path: Path) -> None:
    """ValueError where no figure can come of it; asked before minutes of measuring."""
    if path.suffix not in FORMATS:
        raise ValueError(f"a plot's file must end with one of {', '.join(FORMATS)}; got {path}")
    refuse_run_files("--plot", path)
    if max(len(settings.tokens or ()), len(settings.vocab or ())) < 2:
        raise ValueError("a plot needs several numbers of tokens or sizes of the vocabulary, e.g. --tokens 128,256,512")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"a plot needs matplotlib, which is not installed: {pip_install('bench')}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """One line of panels per title and shape that stays the same: time on the left, extra memory on the right."""
    from matplotlib.figure import Figure

    groups = list(_groups(rows))
    figure = Figure(figsize=(12, 4.2 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (time_panel, memory_panel), (over, group) in zip(panels, groups, strict=True):
        _draw_group(over, group, time_panel, memory_panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """("tokens" or "vocab", the rows in which that alone differs)."""
    for title in dict.fromkeys(row.title for row in rows):
        same = [row for row in rows if row.title == title]
        over, fixed = ("tokens", "vocab") if len({row.tokens for row in same}) > 1 else ("vocab", "tokens")
        for value in dict.fromkeys(getattr(row, fixed) for row in same):
            yield over, [row for row in same if getattr(row, fixed) == value]


def _draw_group(over: str, rows: list[Row], time_panel: Any, memory_panel: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    fixed = f"V = {rows[0].vocab:,}" if over == "tokens" else f"T = {rows[0].tokens:,}"
    hidden = "" if rows[0].hidden is None else f", D = {rows[0].hidden:,}"
    strokes, colours = itertools.cycle(("-", "--", ":", "-.")), itertools.cycle(PEERS)
    for key in dict.fromkeys((row.provider, row.computes) for row in rows if row.max_error is not None):
        line = sorted((row for row in rows if (row.provider, row.computes) == key), key=lambda row: getattr(row, over))
        x = [getattr(row, over) for row in line]
        style: dict[str, Any] = {"label": f"{key[0]} ({key[1]})", "marker": "o", "markersize": 4}
        if is_ours(key[0]):
            style |= {"linewidth": 2.5, "color": "tab:red", "linestyle": next(strokes), "zorder": 3}
        elif is_baseline(key[0]):
            style |= {"linewidth": 2.5, "color": "black"}
        else:
            style |= {"color": next(colours)}
        time_panel.plot(x, [row.median_ms for row in line], **style)
        if all(row.extra_bytes is not None for row in line):
            memory_panel.plot(x, [max(row.extra_bytes or 0, 2**12) / 2**20 for row in line], **style)
    for panel, what in ((time_panel, "time [ms]"), (memory_panel, "extra memory at the peak [MiB]")):
        panel.set(xscale="log", yscale="log", xlabel="tokens T" if over == "tokens" else "vocabulary V", ylabel=what)
        ticks = sorted({getattr(row, over) for row in rows})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.xaxis.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        panel.yaxis.minorticks_off()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    time_panel.set_title(f"{rows[0].title}\n{rows[0].dtype}, {fixed}{hidden}", loc="left", fontsize=11)
    memory_panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
