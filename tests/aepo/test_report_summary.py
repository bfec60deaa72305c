"""The head of the page: its numbers are those of the charts, its settings those of the run."""

import json

import pytest
from report_toys import Elements, make_run, page_data

from aepo.config import load_config, to_yaml
from aepo.report import write_report
from aepo.report.charts import formatted, moving_mean
from aepo.report.reader import read_run
from aepo.report.summary import differences, settings, summary


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.12345, "", "0.123"), (0.5, "", "0.5"), (0, "", "0"), (12, "", "12"), (999.4, "", "999"), (1234.5, "", "1,235"),
     (0.00012, "", "1.2e-4"), (3_000_000, "", "3.0e+6"), (-0.25, "", "-0.25"), (0.7083, "%", "70.8%"), (1, "%", "100%"),
     (0.05678, "%", "5.7%"), (0.1225, "%", "12.3%"), (0.25, "s", "0.25 s"), (100, "", "100"),
     (0.002346, "", "0.00235")],
)  # fmt: skip
def test_numbers_are_written_as_in_the_charts(value, unit, text):
    assert formatted(value, unit) == text


def test_a_moving_mean_looks_back_over_a_tenth_of_the_points():
    assert moving_mean([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    values = [float(i) for i in range(30)]
    values[10] = None
    means = moving_mean(values)
    assert means[0] == 0.0
    assert means[1] == 0.5
    assert means[5] == 4.0  # of 3, 4, 5
    assert means[11] == 10.0  # of 9 and 11
    assert means[29] == 28.0


def long_run(path):
    run = make_run(path)
    records = [{"step": step, "reward.mean": step / 100, "policy.entropy": 1 / step, "memory.peak_rss_mib": 900 + step}
               for step in range(1, 41)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_tiles_say_what_the_lines_of_the_charts_say(tmp_path):
    run = long_run(tmp_path / "run")
    tiles = summary(read_run(run, "run"))["tiles"]
    assert tiles["training reward"] == {
        "value": "0.385",
        "note": "mean of 4 steps, 0.025 at step 4",
    }  # (37 + .. + 40) / 4
    assert tiles["peak memory, MiB"] == {"value": "940", "note": "901 at step 1"}
    assert tiles["held-out success"] == {"value": "50%", "note": "+25 points since step 0, best 50%"}
    series = page_data(write_report([run]).read_text(encoding="utf-8"))["runs"][0]["series"]
    for label, key, unit in (("training reward", "reward.mean", ""), ("entropy, nats per token", "policy.entropy", "")):
        assert formatted(series[key]["line"][-1], unit) == tiles[label]["value"]
        assert f"{formatted(series[key]['line'][3], unit)} at step 4" in tiles[label]["note"]
    assert "line" not in series["memory.peak_rss_mib"]
    assert series["memory.peak_rss_mib"]["values"][-1] == 940


@pytest.mark.parametrize(("planned", "words"), [(None, "40 steps"), (40, "40 steps"), (50, "40 of 50 steps")])
def test_how_far_a_run_has_come(tmp_path, planned, words):
    run = long_run(tmp_path / "run")
    (run / "config.yaml").write_text("{}\n" if planned is None else f"train: {{steps: {planned}}}\n")
    (run / "run.json").write_text(json.dumps({"status": "finished", "wall_seconds": None}))
    assert summary(read_run(run, "run"))["progress"] == words


def test_settings_begin_with_those_that_were_changed(tmp_path):
    run = make_run(tmp_path / "run")
    config = load_config(None, ["train.steps=7", "task.tools=[python]", f"run.dir={run}"])
    (run / "config.yaml").write_text(to_yaml(config) + "later: {knob: 3}\n")
    parts = settings(read_run(run, "run"))
    assert [(one["name"], one["value"], one["default"]) for one in parts["changed"]] == [
        ("run.dir", str(run), "runs/default"),
        ("task.tools", '["python"]', "[]"),
        ("train.steps", "7", str(load_config().train.steps)),
        ("later.knob", "3", "unknown in this version"),
    ]
    names = [one["name"] for one in parts["default"]]
    assert {"task.train", "optimizer.learning_rate", "task.options", "eval.pass_at", "rollout.branch_alpha"} <= {*names}
    text = Elements(write_report([run]).read_text(encoding="utf-8")).text
    assert text.index("task.tools") < text.index("optimizer.learning_rate")
    assert f"4 changed, {len(names)} as by default" in text


def test_several_runs_are_told_apart_by_their_settings(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", preset="grpo")]
    (runs[1] / "config.yaml").write_text((runs[1] / "config.yaml").read_text() + "train: {steps: 3}\n")
    loaded = [read_run(run, run.name) for run in runs]
    assert differences(loaded) == [
        {"name": "policy.preset", "values": ["aepo", "grpo"]},
        {"name": "train.steps", "values": ["not set", "3"]},
    ]
    text = Elements(write_report(runs).read_text(encoding="utf-8")).text
    assert "Settings in which the runs differ: 2" in text
    assert "not set" in text


def test_pass_at_k_is_one_chart_without_its_kinds(tmp_path):
    run = make_run(tmp_path / "run")
    record = {"step": 2, "success": 0.5, "pass@1": 0.5, "pass@4": 0.75, "pass@4.capital": 1.0}
    (run / "evals.jsonl").write_text(json.dumps(record) + "\n")
    shelves = page_data(write_report([run]).read_text(encoding="utf-8"))["shelves"]
    (chart,) = [chart for shelf in shelves for chart in shelf["charts"] if chart["title"] == "Held-out pass@k"]
    assert chart["series"] == [{"key": "eval.pass@1", "label": "k = 1"}, {"key": "eval.pass@4", "label": "k = 4"}]


def test_the_headline_goes_from_the_first_evaluation_to_the_last(tmp_path):
    run = make_run(tmp_path / "run")
    found = [{"step": step, "success": success} for step, success in ((0, 0.25), (1, 0.75), (2, 0.5))]
    (run / "evals.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    head = summary(read_run(run, "run"))
    assert head["headline"].startswith("Held-out success went from 25% at the start to 50% at step 2;")
    assert head["tiles"]["held-out success"] == {"value": "50%", "note": "+25 points since step 0, best 75%"}
