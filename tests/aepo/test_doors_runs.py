"""A run remembers its agent: resume, eval and report load exactly that one, or say what is another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from door_toys import FILES, MINE, OWN, SMALL, Done, aepo, save_chat_model, write_home, write_rows

from aepo.agents.remembered import changes
from aepo.run.log import read_facts, read_records

TOOLS = '''
class Tools:
    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b
'''
DOUBLE = '''
    def double(self, a: int) -> int:
        """Double a number.

        Args:
            a: the number
        """
        return 2 * a
'''
AGENT = [*FILES[:-1], "task.rewards=[mine:length,mine:calls]", "task.tools=mine:Tools", "task.system=system.txt"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one step."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_home(home)
        save_chat_model(home / "qwen", "qwen")
        (home / "mine.py").write_text(MINE + TOOLS)
        (home / "system.txt").write_text("Answer with a number.")
        done = aepo("train", *SMALL, *AGENT, "train.steps=1")
        assert done.code == 0, done.output
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current directory."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def both(*settings: str, run: str = "run") -> tuple[Done, Done]:
    return aepo("train", "--resume", run, "train.steps=2", *settings), aepo("eval", run, "--questions", "1", *settings)


def test_nothing_has_changed(home: Path) -> None:
    resumed, evaluated = both()
    assert resumed.code == 0, resumed.output
    assert evaluated.code == 0, evaluated.output
    assert read_facts(Path("run"))["resumed"][0]["changed"] == ["train.steps was 1 and is 2"]
    assert "not as in the run: train.steps was 1 and is 2" in resumed.output
    assert [record["step"] for record in read_records(Path("run/metrics.jsonl"))] == [1, 2]
    assert "not as in the run" not in evaluated.output
    assert aepo("report", "run").code == 0
    page = Path("run/report.html").read_text()
    for remembered in ("mine:length", "rows.jsonl", "system.txt"):
        assert remembered in page


def change_row(home: Path) -> None:
    rows = (home / "rows.jsonl").read_text()
    (home / "rows.jsonl").write_text(rows.replace("What is 3", "What is 4"))


def add_tool(home: Path) -> None:
    (home / "mine.py").write_text(MINE + TOOLS + DOUBLE)


def change_system(home: Path) -> None:
    (home / "system.txt").write_text("Answer with a word.")


def change_template(home: Path) -> None:
    template = home / "qwen" / "chat_template.jinja"
    template.write_text(template.read_text().replace("# Tools", "# Your tools"))


CHANGES = {
    change_row: ("task.data.files.train.rows.jsonl.sha256 was ", "task.seed=0"),
    add_tool: ("tools was ['add'] and is ['add', 'double']", "task.tools=mine:Tools"),
    change_system: ("task.system was 'Answer with a number.' and is 'Answer with a word.'", "task.system=system.txt"),
    change_template: ("format.chat_template was ", "format.calls=auto"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_on_the_disk(home: Path, change) -> None:
    """Refused, unless the settings that change it are given; then it is recorded."""
    change(home)
    expected, setting = CHANGES[change]
    before = Path("run/run.json").read_text()
    resumed, evaluated = both()
    assert f"error: run: the run was begun with another agent: {expected}" in resumed.output
    assert expected in resumed.failure
    assert expected in evaluated.failure
    assert "; " not in resumed.failure, "one thing has changed"
    assert Path("run/run.json").read_text() == before
    meant = aepo("train", "--resume", "run", "train.steps=2", setting)
    assert meant.code == 0, meant.output
    steps, *rest = read_facts(Path("run"))["resumed"][-1]["changed"]
    assert steps == "train.steps was 1 and is 2"
    changed, *edited = [one for one in rest if not one.startswith("task.system was None")]
    assert changed.startswith(expected)
    assert f"not as in the run: {changed}" in meant.output
    parts = "tool add, tool double, reward mine:length, reward mine:calls"
    assert edited == ([f"{parts}: mine.py is not as it was in the run"] if change is add_tool else [])
    assert aepo("train", "--resume", "run", "train.steps=3").code == 0, "what is is now what was"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("task.rewards=mine:length", ["rewards.mine:calls was 1.0 and is None"]),
        ("task.rewards={mine:length: 2, mine:calls: 1}", ["rewards.mine:length was 1.0 and is 2.0"]),
        (
            "task.rewards=[mine:length,exact_match]",
            ["rewards.mine:calls was 1.0", "rewards.aepo.agents.rewards.builtin:exact_match was None and is 1.0"],
        ),
        ("task.environment=mine:World2", ["tools was ['add'] and is ['move', 'add']", "environment was None and is '"]),
        ("format.name=tags", ["format.name was 'chat' and is 'tags'", "format.calls was 'hermes' and is None"]),
        ("task.columns={kind: answer}", ["task.data.columns.kind was None and is 'answer'"]),
        ("task.heldout=0.3", ["task.train_questions was 11 and is 9", "task.data.heldout_share was 0.1 and is 0.3"]),
    ],
)
def test_settings_that_change_the_agent(home: Path, setting: str, expected: list[str]) -> None:
    world = "\n\nclass World2(World):\n    def reset(self, answer):\n        self.count = 0\n"
    (home / "mine.py").write_text(MINE + TOOLS + world)
    done, evaluated = both(setting)
    assert done.code == 0, done.output
    changed = read_facts(Path("run"))["resumed"][-1]["changed"]
    for one in expected:
        assert any(found.startswith(one) for found in changed), changed
    assert evaluated.code == 0, evaluated.output
    name = setting.partition("=")[0]
    assert name.partition(".")[2] in Path("run/config.yaml").read_text()
    again = aepo("train", "--resume", "run", "train.steps=3")
    assert again.code == 0, again.output
    assert read_facts(Path("run"))["resumed"][-1]["changed"] == ["train.steps was 2 and is 3"]


def test_an_evaluation_says_what_is_not_the_runs(home: Path) -> None:
    write_rows(home / "harder.jsonl", 3)
    done = aepo("eval", "run", "task.heldout=harder.jsonl", "--json", "numbers.json")
    assert done.code == 0, done.output
    assert "set here: task.heldout = 'harder.jsonl' (the run: None)" in done.output
    assert "not as in the run: task.heldout_questions was 1 and is 3" in done.output
    assert json.loads((home / "numbers.json").read_text())["changed"] == {"task.heldout": "harder.jsonl"}


def test_what_is_gone(home: Path) -> None:
    """Files of the user's, in the words of the setting that named them."""
    (home / "rows.jsonl").rename("elsewhere.jsonl")
    for done in both():
        assert "task.train = 'rows.jsonl': there is no such file, in " in done.failure
    (home / "elsewhere.jsonl").rename("rows.jsonl")
    (home / "mine.py").rename("yours.py")
    for done in both():
        assert "task.tools = 'mine:Tools': no module 'mine' in " in done.failure
    (home / "yours.py").rename("mine.py")
    (home / "system.txt").unlink()
    for done in both():
        assert "task.system = 'system.txt': there is no such file" in done.failure


def test_a_model_that_was_moved(home: Path) -> None:
    """What is said to do about it works."""
    save_chat_model(home / "model", "qwen")
    assert aepo("train", *SMALL, *AGENT, "model.name=model", "run.dir=of_model", "train.steps=0").code == 0
    (home / "model").rename("moved")
    for done in both(run="of_model"):
        assert "directory with a config.json; if it was moved, add model.name=PLACE to this command" in done.failure
    for done in both("model.name=moved", run="of_model"):
        assert done.code == 0, done.output


def test_another_directory_than_the_run_was_begun_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings name files as seen from there."""
    (home / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    began = read_facts(Path("../run"))["directory"]
    for done in both(run="../run"):
        assert "task.train = 'rows.jsonl': there is no such file, in " in done.failure
        assert done.failure.endswith(f"elsewhere (../run was begun in {began})")


def test_a_run_that_is_not_there(home: Path) -> None:
    for done in both(run="nowhere"):
        assert "nowhere: expected a run" in done.failure


def test_a_task_that_is_gone(home: Path) -> None:
    done = aepo("train", *SMALL, *OWN, "run.dir=own", "train.steps=0")
    assert done.code == 0, done.output
    (home / "mine.py").rename("yours.py")
    for done in both(run="own"):
        assert "': no module 'mine' in " in done.failure
    (home / "mine.py").write_text(MINE.replace("size: int = 10", "size: int = 11"))
    for done in both(run="own"):
        assert "task.train_questions was 10 and is 11; task.data.train was " in done.failure
    (home / "mine.py").write_text(MINE.replace('system = "Be brief."', 'system = "Be very brief."'))
    for done in both(run="own"):
        assert "task.system was 'Be brief.' and is 'Be very brief.'" in done.failure


def test_a_run_that_was_moved(home: Path) -> None:
    (home / "archive").mkdir()
    Path("run").rename("archive/moved")
    resumed, evaluated = both(run="archive/moved")
    assert resumed.code == 0, resumed.output
    assert evaluated.code == 0, evaluated.output
    assert not Path("run").exists()
    assert [record["step"] for record in read_records(Path("archive/moved/metrics.jsonl"))] == [1, 2]
    assert aepo("report", "archive/moved").code == 0
    rolled = aepo("rollout", "archive/moved", "--out", "trees", "--questions", "2")
    assert rolled.code == 0, rolled.output
    assert not Path("run").exists()


def test_hashes_are_shown_by_their_beginning() -> None:
    was, now = "a1" * 32, "b2" * 32
    assert changes({"task": {"data": was}}, {"task": {"data": now}}) == [
        "task.data was a1a1a1a1a1a1.. and is b2b2b2b2b2b2.."
    ]
    assert changes({"task": {"name": "x"}}, {"task": {"name": "y"}}) == ["task.name was 'x' and is 'y'"]
