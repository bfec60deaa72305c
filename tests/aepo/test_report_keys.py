"""Every metric that the report, the tables or the display name is one that a real run writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_trainer import trainer_for

from aepo.evaluation_display import ROLLOUT_ROWS
from aepo.report.charts import CHARTS, EXPLAINED, STAGES, chart_data
from aepo.report.reader import Run, read_run
from aepo.report.summary import TILES, summary
from aepo.run.log import read_records


def own_loss(logprobs, entropy, batch):
    """With a metric of its own."""
    loss = -((logprobs - batch.old_logprobs).exp() * batch.advantages).sum() / batch.tokens
    return loss, {"mine": loss.detach()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with calls and branches at a temperature, and one with a loss of the user's own."""
    settings = ("rollout.max_tokens=60", "eval.samples=2", "eval.temperature=1", "eval.pass_at=[1,2]", "train.steps=2")
    settings += ("policy.entropy_advantage=3", "policy.kl_coef=0.1")
    found = {}
    for name, changed in (
        ("preset", settings),
        ("own", ("policy.loss=test_report_keys:own_loss", "policy.old_logprobs=recompute")),
    ):
        found[name] = tmp_path_factory.mktemp(name) / "run"
        trainer_for(found[name], *changed).train()
    return found


def read(runs: dict[str, Path]) -> list[Run]:
    return [read_run(path, name) for name, path in runs.items()]


def written(runs: dict[str, Path]) -> set[str]:
    """Keys of the records, also those without a value here (memory of a GPU), and of what is made of them."""
    found: set[str] = set()
    for path, run in zip(runs.values(), read(runs), strict=True):
        found |= {key for record in read_records(path / "metrics.jsonl") for key in record}
        found |= {f"eval.{key}" for record in read_records(path / "evals.jsonl") for key in record}
        found |= set(run.series)
    return found


def test_every_key_of_a_chart_is_a_metric(runs: dict[str, Path]) -> None:
    keys = written(runs)
    named = [key for charts in CHARTS.values() for chart in charts for key in chart.keys]
    assert len(named) > 25
    for key in named:
        stem = key.removesuffix("*")
        assert (key in keys) if stem == key else any(one.startswith(stem) and one not in EXPLAINED for one in keys), key


def test_every_chart_has_a_line(runs: dict[str, Path]) -> None:
    found = read(runs)
    series = set().union(*(run.series for run in found))
    for shelf in chart_data(found):
        for chart in shelf["charts"]:
            assert any(line["key"] in series for line in chart["series"]), chart["title"]


def test_stages_of_the_chart_are_those_that_are_timed(runs: dict[str, Path]) -> None:
    timed = {key.removeprefix("seconds.") for key in written(runs) if re.fullmatch(r"seconds\.\w+", key)}
    assert timed - {"step"} == set(STAGES)


def test_every_tile_and_every_row_of_a_table_is_a_metric(runs: dict[str, Path]) -> None:
    keys = written(runs)
    assert set(TILES) <= keys
    assert {key for _, key, _ in ROLLOUT_ROWS} <= keys
    tiles = summary(read(runs)[0])["tiles"]
    assert [*tiles] == [*TILES.values(), "tool calls failed"]


def test_what_is_explained_is_a_metric(runs: dict[str, Path]) -> None:
    """Else a component of that name would be left out of its chart for nothing."""
    assert written(runs) >= EXPLAINED


def test_shares_on_the_page_are_those_of_the_records(runs: dict[str, Path]) -> None:
    records = read_records(runs["preset"] / "metrics.jsonl")
    series = read(runs)[0].series
    flipped = [record["policy.advantage_flips"] / record["tokens.trained"] for record in records]
    assert series["policy.flipped"]["values"] == pytest.approx(flipped, rel=1e-4)
    assert 0 < max(flipped) <= 1
    for name, points in series.items():
        if name.startswith(("branches.", "failures.", "policy.clip_", "policy.flipped")):
            assert all(value is None or 0 <= value <= 1 for value in points["values"]), name
