"""The report: everything in a run's files is on the page, nothing else is, and damage is reported.

The runs are made by hand, in the files that the trainer writes.
"""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from aepo.report import write_report
from aepo.run_reader import MAX_TREE_TOKENS, read_run
from aepo.types import BranchDecision, BudgetDecision, Node, Path, Question, Reward, RolloutTree, ToolCall, ToolResult

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"


def hand_made_tree() -> dict:
    """Two paths: path 1 leaves path 0 after its tool result."""
    nodes = (
        Node(0, None, "prompt", (1, 2)),
        Node(1, 0, "model", (3, 4), (-0.5, -0.1), (1.25, 0.0), finish_reason="stop"),
        Node(2, 1, "tool", (5,), call=ToolCall("search", HOSTILE), result=ToolResult("", "timeout", 6.0)),
        Node(3, 2, "model", (6,), (-0.25,), (0.6,), finish_reason="stop"),
        Node(4, 2, "model", (7,), (-1.5,), (2.75,), finish_reason="stop"),
    )
    paths = (Path(0, 3, None, None, "answered"), Path(1, 4, 0, 2, "answered"))
    decisions = (BranchDecision(0, 2, 0.6, 0.02, 0.7, 3, 0.6, True),)
    question = Question("q7", f"What is {HOSTILE}?", "42", "capital", ("Peru",))
    tree = RolloutTree(question, nodes, paths, decisions, BudgetDecision(0.9, 0.4, 1))
    rewards = [asdict(Reward(1.0, {"answer": 1.0}, True)), asdict(Reward(0.0, {"answer": 0.0}, False))]
    texts = [["What", "?"], ["<search>", HOSTILE], ["<result/>"], ["42"], ["43"]]
    return {"tree": asdict(tree), "rewards": rewards, "advantages": [0.7, -0.7], "texts": texts}


def make_run(path, *, success=(0.25, 0.5), preset="aepo"):
    (path / "trees").mkdir(parents=True)
    metrics = [
        {"step": 1, "reward.mean": 0.25, "policy.kl": None, "rollout.branches_per_path": [6, 2, 0, 1, 1],
         "rollout.paths": 10, "tools.calls": 8, "tools.calls.search": 5,
         "tools.failures": 2, "tools.failures.timeout": 2},
        {"step": 2, "reward.mean": 0.75, "policy.kl": None, "rollout.branches_per_path": [10],
         "rollout.paths": 10, "tools.calls": 0, "tools.failures": 0, "tools.failures.timeout": 0},
    ]  # fmt: skip
    evals = [
        {"step": step, "success": value, "success.capital": value} for step, value in zip((0, 2), success, strict=True)
    ]
    facts = {"status": "finished", "wall_seconds": 83.2, "model": {"name": "tiny", "parameters": 1234567},
             "machine": {"cores": 2, "processor": "<b>CPU</b>"}, "versions": {"torch": "2.13.0"}}  # fmt: skip
    (path / "run.json").write_text(json.dumps(facts))
    (path / "config.yaml").write_text(
        f"policy: {{preset: {preset}}}\nrollout: {{paths: 2, branch_penalty: 0.05, branch_threshold: 0.5}}\n"
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (path / "evals.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evals))
    (path / "trees" / "step_000002.json").write_text(json.dumps({"step": 2, "trees": [hand_made_tree()]}))
    return path


def page_data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


class Elements(HTMLParser):
    """Every element of a page, with its attributes, and the text outside of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data if self.cdata_elem is None else ""


def test_the_page_holds_what_the_files_hold(tmp_path):
    out = write_report([make_run(tmp_path / "demo")])
    assert out == tmp_path / "demo" / "report.html"
    page = out.read_text(encoding="utf-8")
    text = Elements(page).text
    for expected in ("from 25% at the start to 50%", "2 steps in 1 min 23 s", "aepo", "1,234,567 parameters",
                     "2 cores of <b>CPU</b>", "+25 points", "25.0%", "2 of 8"):  # fmt: skip
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


def test_no_text_becomes_markup_and_nothing_is_fetched(tmp_path):
    page = write_report([make_run(tmp_path / "demo")]).read_text(encoding="utf-8")
    elements = Elements(page).found
    assert [tag for tag, _ in elements].count("script") == 3
    assert not {"img", "b", "iframe", "link"} & {tag for tag, _ in elements}
    assert not [attributes for _, attributes in elements if {"src", "href", "onerror"} & attributes.keys()]
    policy = next(attributes["content"] for _, attributes in elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|http-equiv", "", page)
    for script in re.findall(r"<script>(.*?)</script>", page, re.S):
        assert "innerHTML" not in script
        assert "insertAdjacentHTML" not in script


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
    (run / "trees" / "step_000004.json").write_text(json.dumps(uneven))
    circle = {"step": 5, "trees": [hand_made_tree()]}
    circle["trees"][0]["tree"]["nodes"][1]["parent"] = 3
    (run / "trees" / "step_000005.json").write_text(json.dumps(circle))
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
        "step_000003.json: not a record",
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
    (run / "trees" / "step_000002.json").write_text(json.dumps({"step": 2, "trees": [entry, odd]}))
    trees = page_data(write_report([run]).read_text(encoding="utf-8"))["trees"]
    assert trees[0]["nodes"][0]["texts"] == ["[1]", "[2]"]
    assert trees[0]["rewards"] is None
    assert trees[1]["nodes"][3]["texts"] == ["\ud800"]


def test_too_many_trees_are_thinned_evenly_and_that_is_said(tmp_path):
    run = make_run(tmp_path / "demo")
    entry = hand_made_tree()
    length = MAX_TREE_TOKENS // 4
    entry["tree"]["nodes"][0]["token_ids"], entry["texts"][0] = [1] * length, ["a"] * length
    for step in range(3, 12):
        (run / "trees" / f"step_{step:06d}.json").write_text(json.dumps({"step": step, "trees": [entry]}))
    loaded = read_run(run, "demo")
    assert [tree["step"] for tree in loaded.trees] == [2, 5, 8, 11]  # the small one and three large ones fit
    assert loaded.problems == ["trees: 4 of 10 saved steps are shown, to keep the page small"]


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
    assert packed == {*(root / "aepo" / "templates").iterdir(), root / "aepo" / "py.typed"}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_draws_the_page(tmp_path):
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    page = write_report([make_run(tmp_path / "one"), make_run(tmp_path / "two")])
    result = subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in result.stderr  # no script error
    drawn = Elements(result.stdout)
    classes = [attributes.get("class", "").strip() for _, attributes in drawn.found]
    assert classes.count("chart") == 21
    assert classes.count("row") + classes.count("row chosen") == 2  # paths
    assert classes.count("tool failed") == 1
    assert "back-6" in classes  # 2.75 nats, on the branched path that is shown first
    assert "path 0 branched into path 1 · P 0.6, threshold 0.5" in drawn.text
    assert "penalty 0.15 (3 branches in a row before)" in drawn.text  # 3 x 0.05
    assert HOSTILE in drawn.text
    assert "img" not in [tag for tag, _ in drawn.found]
