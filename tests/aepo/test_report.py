"""The report: everything in a run's files is on the page, nothing else is, and damage is reported."""

import json
import re
import shutil
from importlib.resources import files

import pytest
from report_toys import (
    HOSTILE,
    Elements,
    answer_line,
    earlier_tree,
    hand_made_tree,
    make_run,
    page_data,
    save_answers,
    save_trees,
)

from aepo.report import trees as page_trees
from aepo.report import write_report, write_rollout_page
from aepo.report.page import SCRIPTS
from aepo.report.reader import read_run
from aepo.report.trees import page_tree


def test_the_page_holds_what_the_files_hold(tmp_path):
    out = write_report([make_run(tmp_path / "demo")])
    assert out == tmp_path / "demo" / "report.html"
    page = out.read_text(encoding="utf-8")
    text = Elements(page).text
    for expected in ("from 25% at the start to 50% at step 2", "2 steps in 1 min 23 s", "aepo", "1,234,567 parameters",
                     "2 cores of <b>CPU</b>", "+25 points", "25%", "2 of 8", "facts, 600 training questions",
                     "train: rows.jsonl, sha256: 0123456789ab..",
                     "name: chat, calls: hermes", "search, clock", "mine.exact: 0.5"):  # fmt: skip
        assert expected in text
    data = page_data(page)
    series = data["runs"][0]["series"]
    assert series["reward.mean"] == {"steps": [1, 2], "values": [0.25, 0.75]}
    assert series["eval.success"] == {"steps": [0, 2], "values": [0.25, 0.5]}
    assert [series[f"branches.{b}"]["values"][0] for b in range(4)] == [0.6, 0.2, 0.0, 0.2]
    assert series["failures.timeout"] == {"steps": [1], "values": [0.25]}  # step 2 had no call that could fail
    assert series["calls.search"]["values"] == [0.5, 0.0]
    assert "policy.kl" not in series  # undefined throughout
    (tree,) = data["trees"]
    assert tree["nodes"][1]["entropies"] == [1.25, 0.0]
    assert tree["nodes"][1]["texts"] == ["<search>", HOSTILE]
    assert tree["decisions"][0]["consecutive"] == 3
    assert data["runs"][0]["rule"] == {"branch_penalty": 0.05, "branch_threshold": 0.5}
    assert tree["rewards"][0]["success"] is True
    assert [call["tool"] for call in tree["nodes"][2]["calls"]] == ["search", "clock"]
    assert tree["nodes"][2]["calls"][1]["problem"] == "no such argument"
    assert [result["error"] for result in tree["nodes"][2]["results"]] == ["timeout", None]
    assert tree["paths"][1]["environment_reward"] == 0.5


def test_no_text_becomes_markup_and_nothing_is_fetched(tmp_path):
    run = make_run(tmp_path / "demo", preset=json.dumps(HOSTILE))
    save_answers(run, 2, answer_line(2, HOSTILE, True, text=HOSTILE))
    page = write_report([run]).read_text(encoding="utf-8")
    elements = Elements(page).found
    assert [tag for tag, _ in elements].count("script") == 1 + len(SCRIPTS)
    assert not {"img", "b", "iframe", "link"} & {tag for tag, _ in elements}
    assert not [attributes for _, attributes in elements if {"src", "href", "onerror"} & attributes.keys()]
    policy = next(attributes["content"] for _, attributes in elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http-equiv", "", page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == len(SCRIPTS)
    assert "\u2028" not in re.search(r'<script type="application/json".*?</script>', page, re.S)[0]
    for script in scripts:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_several_runs_share_a_page(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", success=(0.25, 0.75), preset="grpo")]
    out = write_report(runs)
    assert out == tmp_path / "report.html"
    page = out.read_text(encoding="utf-8")
    data = page_data(page)
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    assert [tree["run"] for tree in data["trees"]] == [0, 1]
    text = Elements(page).text
    assert "+25 points" in text
    assert "+50 points" in text
    assert "grpo" in text


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / seed / "demo") for seed in ("a", "b")]
    names = [run["name"] for run in page_data(write_report(runs, tmp_path / "x.html").read_text())["runs"]]
    assert names == [str(run) for run in runs]


def test_missing_files_are_named_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "demo")
    for name in ("run.json", "config.yaml", "metrics.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "trees")
    page = write_report([run]).read_text(encoding="utf-8")
    for name in ("run.json is missing", "config.yaml is missing", "metrics.jsonl is missing"):
        assert name in Elements(page).text
    assert page_data(page)["trees"] == []
    assert "from 25% at the start to 50%" in page


def test_damage_is_listed_and_left_out(tmp_path):
    run = make_run(tmp_path / "demo")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'not json\n[3]\n{"step": 3, "reward.mean": NaN}\n\xff\xfe\n{"step": 4, "rew')
    (run / "run.json").write_text('{"status": ')
    (run / "trees" / "step_000003.json").write_text('{"step": 3, "trees": [{"tree": {}}]}')
    uneven = {"step": 4, "trees": [hand_made_tree()]}
    uneven["trees"][0]["texts"][1].pop()
    save_trees(run, 4, *uneven["trees"])
    circle = {"step": 5, "trees": [hand_made_tree()]}
    circle["trees"][0]["tree"]["nodes"][1]["parent"] = 3
    save_trees(run, 5, *circle["trees"])
    (run / "config.yaml").write_text("- a list\n")
    loaded = read_run(run, "demo")
    problems = "\n".join(loaded.problems)
    for expected in (
        "run.json cannot be read",
        "config.yaml cannot be read: expected keys and values, got list",
        "metrics.jsonl, line 3: not a record",
        "line 4: not a record",
        "reward.mean is nan at step 3",
        "line 6: not a record",
        "line 7: cut off",
        "step_000003.json cannot be read: not a record",
        "node 1 has 2 tokens and 1 texts",
        "a parent that does not come before its child",
    ):
        assert expected in problems
    assert len(loaded.problems) == 10
    assert loaded.series["reward.mean"] == {"steps": [1, 2, 3], "values": [0.25, 0.75, None]}
    assert [tree["step"] for tree in loaded.trees] == [2]
    assert "line 7: cut off" in Elements(write_report([run]).read_text(encoding="utf-8")).text


def test_an_unfinished_run_says_so(tmp_path):
    run = make_run(tmp_path / "demo")
    (run / "run.json").write_text(json.dumps({"status": "failed", "reason": "disk full", "wall_seconds": 5}))
    (run / "config.yaml").write_text("train: {steps: 40}\n")
    assert "2 of 40 steps in 5 s, failed: disk full" in write_report([run]).read_text(encoding="utf-8")


def test_token_ids_stand_in_for_missing_texts_and_odd_characters_survive(tmp_path):
    run = make_run(tmp_path / "demo")
    entry = hand_made_tree()
    del entry["texts"], entry["rewards"]
    odd = hand_made_tree()
    odd["texts"][3] = ["\ud800"]  # half a character
    save_trees(run, 2, entry, odd)
    trees = page_data(write_report([run]).read_text(encoding="utf-8"))["trees"]
    assert trees[0]["nodes"][0]["texts"] == ["[1]", "[2]"]
    assert trees[0]["rewards"] is None
    assert trees[1]["nodes"][3]["texts"] == ["\ud800"]


def test_too_many_trees_are_thinned_evenly_and_that_is_said(tmp_path, monkeypatch):
    run = make_run(tmp_path / "demo")
    for step in range(3, 12):
        save_trees(run, step, *[hand_made_tree()] * 5)
    large = (run / "trees" / "step_000003.json").stat().st_size
    monkeypatch.setattr(page_trees, "MAX_FILE_BYTES", int(3.5 * large))
    loaded = read_run(run, "demo")
    steps = list(dict.fromkeys(tree["step"] for tree in loaded.trees))
    assert steps == [2, 5, 8, 11]  # the small one and three large ones fit
    assert loaded.problems == ["trees: 4 of 10 saved steps are shown, to keep the page small"]


def test_one_step_with_too_many_trees_is_thinned_too(tmp_path, monkeypatch):
    run = make_run(tmp_path / "demo")
    save_trees(run, 2, *[hand_made_tree(f"q{i}") for i in range(5)])
    monkeypatch.setattr(page_trees, "MAX_TOKENS", 3 * 7)  # of 7 tokens each
    loaded = read_run(run, "demo")
    assert [tree["question"]["id"] for tree in loaded.trees] == ["q0", "q2", "q4"]
    assert loaded.problems == ["trees: 3 of 5 questions are shown, to keep the page small"]


def test_trees_of_runs_with_one_call_per_turn_are_read():
    node = page_tree(3, earlier_tree())["nodes"][2]
    assert node["calls"] == [{"tool": "search", "arguments": {"": HOSTILE}, "problem": None}]
    assert node["results"] == [{"text": "", "error": "timeout", "seconds": 6.0}]
    missing = earlier_tree()
    missing["tree"]["nodes"][2] |= {"call": None, "result": None}
    assert page_tree(3, missing)["nodes"][2]["calls"] == page_tree(3, missing)["nodes"][2]["results"] == []


def test_a_question_may_be_a_dialogue_and_an_answer_any_value():
    entry = hand_made_tree()
    dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    entry["tree"]["question"] = {"id": 7, "prompt": dialogue, "answer": {"min": 1}, "kind": ""}
    shown = page_tree(1, entry)["question"]
    assert shown == {"id": "7", "text": "How many?", "answer": '{"min": 1}', "kind": ""}


def test_rewards_that_are_not_finite_are_shown_as_missing(tmp_path):
    run = make_run(tmp_path / "demo")
    save_trees(run, 2, hand_made_tree(rewards=(float("nan"), 1.0)))
    (tree,) = page_data(write_report([run]).read_text(encoding="utf-8"))["trees"]
    assert [reward["total"] for reward in tree["rewards"]] == [None, 1.0]


def test_rollouts_have_a_page_without_a_run(tmp_path):
    facts = {"name": "first look", "task": {"name": "cities"}, "tools": ["search"]}
    entries = [hand_made_tree("q1"), hand_made_tree("q2", rewards=(0.0, 0.0), error=None)]
    for entry in entries:
        del entry["advantages"]
    config = {"rollout": {"branch_threshold": 0.25, "paths": 2}}
    out = write_rollout_page(entries, facts, tmp_path / "page.html", config=config)
    page = out.read_text(encoding="utf-8")
    text = Elements(page).text
    for expected in ("first look", "cities", "1 of 4", "25%", "2 paths start fresh", "rollout.branch_threshold"):
        assert expected in text
    assert 'id="charts"' not in page
    assert [tree["question"]["id"] for tree in page_data(page)["trees"]] == ["q1", "q2"]
    assert page_data(page)["runs"][0]["rule"] == {"branch_threshold": 0.25}


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_report([])
    with pytest.raises(ValueError, match="no such run directory"):
        write_report([tmp_path / "absent"])
    with pytest.raises(ValueError, match="not a run directory"):
        write_report([tmp_path])
    run = make_run(tmp_path / "demo")
    with pytest.raises(ValueError, match="named twice"):
        write_report([run, run])
    (run / "metrics.jsonl").write_text("")
    (run / "evals.jsonl").unlink()
    with pytest.raises(ValueError, match="nothing to report yet"):
        write_report([run])


def test_an_installed_package_has_all_parts_of_the_page():
    root = files("aepo").parent
    (patterns,) = re.findall(r"package-data\]\naepo = \[(.*)\]", (root / "pyproject.toml").read_text())
    packed = {path for pattern in re.findall(r'"(.*?)"', patterns) for path in (root / "aepo").glob(pattern)}
    assert packed == {*(root / "aepo" / "report" / "templates").iterdir(), root / "aepo" / "py.typed"}
