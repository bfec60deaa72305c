"""The page in a real browser. An added script does what a reader does, and leaves what it saw in the page."""

import json
import re
import shutil

import pytest
from report_toys import HOSTILE, Elements, answer_line, browser, hand_made_tree, make_run, save_answers, save_trees

from aepo.report import write_report
from aepo.report.reader import read_run
from aepo.report.summary import summary

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")


def seen(page, tmp_path, script: str) -> dict:
    """What `script`, the body of a function, returns inside the page."""
    page.write_text(
        page.read_text(encoding="utf-8").replace(
            "</body>",
            f"""<pre id="seen"></pre><script>
    document.getElementById("seen").textContent = JSON.stringify((() => {{ {script} }})());</script></body>""",
        )
    )
    drawn, complaints = browser(page, tmp_path / "profile")
    assert complaints == ""
    text = re.search(r'<pre id="seen">(.*?)</pre>', drawn, re.S)[1]
    return json.loads(Elements(f"<p>{text}</p>").text)


def test_everything_is_drawn(tmp_path):
    page = write_report([make_run(tmp_path / "one"), make_run(tmp_path / "two")])
    dom, complaints = browser(page, tmp_path / "profile")
    assert complaints == ""
    drawn = Elements(dom)
    classes = [attributes.get("class", "").strip() for _, attributes in drawn.found]
    assert classes.count("chart") == 21
    assert classes.count("row") + classes.count("row chosen") == 2  # paths
    assert classes.count("tool failed") == 1
    assert "back-6" in classes  # 2.75 nats, on the branched path that is shown first
    for expected in (
        "path 0 branched into path 1 · P 0.6, threshold 0.5",
        "penalty 0.15 (3 branches in a row before)",  # 3 x 0.05
        "· 6,000 ms · failed: timeout",
        "tool: clock that cannot be read: no such argument · 500 ms",
        "the environment says 0.5",
        HOSTILE,
    ):
        assert expected in drawn.text
    assert "img" not in [tag for tag, _ in drawn.found]


def test_it_opens_where_there_is_a_signal_and_filters_search_and_keys_work(tmp_path):
    run = make_run(tmp_path / "run")
    save_trees(run, 2, hand_made_tree("mixed-early", error=None))
    save_trees(run, 4, hand_made_tree("equal", rewards=(1.0, 1.0), error=None), hand_made_tree("mixed"))
    save_trees(run, 6, hand_made_tree("failed", rewards=(0.1, 0.1), error=None))
    saw = seen(
        write_report([run]),
        tmp_path,
        """
        const list = () => [...document.querySelectorAll(".list .ask")].map((node) => node.textContent.split(" ")[2]);
        const shown = () => document.querySelector(".question").textContent.split(" ")[2];
        const press = (i) => document.querySelectorAll("#trees .chips button")[i].click();
        const box = document.querySelector("#trees input");
        const search = (words) => { box.value = words; box.dispatchEvent(new Event("input")); };
        const saw = { first: shown(), all: list() };
        saw.bars = [...document.querySelectorAll(".list .bars")].map((bars) => bars.children.length);
        saw.chips = [...document.querySelectorAll("#trees .chips button")].map((node) => node.textContent);
        press(2); saw.failed = [list(), shown()];
        press(3); saw.tool = list();
        press(0); search("NOON"); saw.nothing = list();
        search("early 43"); saw.early = [list(), document.querySelector(".row.chosen").dataset.path];
        search("");
        document.querySelector(".list button").focus();
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
        document.activeElement.click(); saw.key = shown();
        document.dispatchEvent(new CustomEvent("step", { detail: 3.4 })); saw.step = [list(), shown()];
        document.querySelectorAll("#trees .steps button")[1].click(); saw.later = list();
        let file; download = (name, type, text) => { file = text; };
        [...document.querySelectorAll("#trees .controls > button")].at(-1).click();
        const totals = (paths) => paths.map((path) => path.reward.total);
        saw.exported = JSON.parse(file).map(({ step, question, paths }) =>
          [step, question.id, totals(paths), paths[0].calls.length]);
        return saw;
        """,
    )
    assert saw["first"] == "mixed"  # the newest step, 6, has none
    assert saw["all"] == ["failed", "equal", "mixed", "mixed-early"]
    assert saw["bars"] == [2, 2, 2, 2]
    assert saw["chips"] == ["all 4", "different rewards 2", "no success 1", "tool failure 1"]
    assert saw["failed"] == [["failed"], "failed"]
    assert saw["tool"] == ["mixed"]
    assert saw["nothing"] == []  # noon is a result that no path's text has
    assert saw["early"] == [["mixed-early"], "1"]  # path 1 wrote 43
    assert saw["key"] == "equal"
    assert saw["step"] == [["equal", "mixed"], "mixed"]
    assert saw["later"] == ["failed"]
    assert saw["exported"] == [[6, "failed", [0.1, 0.1], 2]]


def test_charts_and_tiles_say_the_same_and_charts_can_be_saved(tmp_path):
    run = make_run(tmp_path / "run")
    records = [{"step": step, "reward.mean": step**2 / 1700} for step in range(1, 41)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "evals.jsonl").write_text(json.dumps({"step": 0, 'success.of "x", y': 0.5}) + "\n")
    saw = seen(
        write_report([run]),
        tmp_path,
        """
        let files = {}; download = (name, type, text) => { files[name] = text; };
        const chart = document.getElementById("reward");
        document.querySelectorAll(".export button").forEach((node) => node.click());
        const legend = () => chart.querySelector(".legend b").textContent;
        const last = legend(), svg = chart.querySelector("svg");
        const key = (name) => svg.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
        key("ArrowLeft"); key("ArrowLeft"); const before = legend();
        const picture = new DOMParser().parseFromString(files["reward.svg"], "image/svg+xml");
        const { nodeName, textContent } = picture.documentElement;
        const csv = files["reward.csv"], quoted = files["held-out-success-by-kind.csv"];
        return { last, before, csv, quoted, svg: nodeName, text: textContent,
          strokes: [...picture.querySelectorAll(".line")].map((node) => node.getAttribute("stroke")) };
        """,
    )
    tile = summary(read_run(run, "run"))["tiles"]["training reward"]
    assert saw["last"] == tile["value"] == "0.873"  # (37^2 + .. + 40^2) / 4 / 1700
    assert saw["before"] == "0.828"  # (36^2 + .. + 39^2) / 4 / 1700
    lines = saw["csv"].splitlines()
    assert lines[0] == "step,reward.mean,reward.mean (moving mean)"
    assert len(lines) == 41
    assert lines[2] == "2,0.0023529,0.0014706"
    assert saw["quoted"] == 'step,"eval.success.of ""x"", y"\n0,0.5\n'
    assert saw["svg"] == "svg"
    assert "Reward" in saw["text"]
    assert "mean over all paths" in saw["text"]
    assert saw["strokes"][0].startswith("rgb(")  # no style sheet is needed


def test_held_out_questions_that_were_learned_and_lost(tmp_path):
    run = make_run(tmp_path / "run")
    save_answers(
        run, 0, answer_line(0, "q1", False), answer_line(0, "q2", True), answer_line(0, "q3", False, text="<b>1</b>")
    )
    save_answers(
        run, 2, answer_line(2, "q1", True), answer_line(2, "q2", False), answer_line(2, "q3", False, text=HOSTILE)
    )
    saw = seen(
        write_report([run]),
        tmp_path,
        """
        const list = () => [...document.querySelectorAll("#heldout .ask")].map((node) => node.textContent);
        const saw = { chips: [...document.querySelectorAll("#heldout .chips button")].map((node) => node.textContent) };
        const press = (i) => document.querySelectorAll("#heldout .chips button")[i].click();
        press(1); saw.learned = list();
        press(2); saw.lost = list();
        press(0);
        const details = document.querySelectorAll(".heldout")[2];
        details.open = true; details.dispatchEvent(new Event("toggle"));
        saw.texts = [...details.querySelectorAll(".text")].map((node) => node.textContent);
        return saw;
        """,
    )
    assert saw["chips"] == ["all 3", "learned 1", "lost 1", "not right at the end 2"]
    assert saw["learned"] == ["What is q1?"]
    assert saw["lost"] == ["What is q2?"]
    assert saw["texts"] == ["<b>1</b>", HOSTILE]
