"""What was edited under the same name between a run and its continuation: what the model reads is an error, code a
line, and nothing is said where nothing has changed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from door_toys import SMALL, Done, aepo, own_modules, save_chat_model, write_home

from aepo.run.log import read_facts

DATA_TASK = """
import json

import mine
from aepo.types import Question


class Numbers(mine.Sums):
    def __init__(self, path):
        super().__init__()
        cases = json.load(open(path))
        self.train = [Question(q.id, q.prompt, q.answer, q.kind, {"case": cases["train"]}) for q in self.train]
        self.heldout = [Question(q.id, q.prompt, q.answer, cases["kind"]) for q in self.heldout]
"""
FILES = {
    "my_task.py": DATA_TASK,
    "my_tool.py": "import mine\n\ndef add(a: int, b: int) -> int:\n"
    '    """Add two numbers.\n\n    Args:\n        a: the first\n        b: the second\n    """\n'
    "    return mine.add(a, b)\n",
    "my_world.py": "from my_base import Base\n\nclass World(Base):\n    pass\n",
    "my_base.py": "import mine\n\nclass Base(mine.World):\n    pass\n",
    "my_format.py": "import mine\n\nclass Counting(mine.Counting):\n    pass\n",
    "my_reward.py": "import mine\nfrom my_scale import SCALE\n\ndef score(question, response):\n"
    "    return SCALE * mine.length(question, response)\n",
    "my_scale.py": "SCALE = 2.0\n",
    "my_loss.py": "import mine\n\ndef loss(*given):\n    return mine.loss(*given)\n",
    "my_advantage.py": "import mine\n\ndef advantage(*given):\n    return mine.advantage(*given)\n",
    "my_rule.py": "import mine\n\ndef rule(point):\n    return mine.rule(point)\n",
    "cases.json": '{"train": 1, "kind": "even"}',
    "corpus.jsonl": '{"text": "The Copper Heron stands in the Linen Room."}\n{"text": "The Owl is in an attic."}\n',
}
SETTINGS = [
    "model.name=qwen",
    "task.name=my_task:Numbers",
    "task.options={path: cases.json}",
    "task.tools=[my_tool:add,search:corpus.jsonl]",
    "task.rewards=[my_reward:score]",
    "task.environment=my_world:World",
    "format.name=my_format:Counting",
    "policy.loss=my_loss:loss",
    "policy.advantage=my_advantage:advantage",
    "rollout.branch_rule=my_rule:rule",
]
AGENT = {
    "my_task.py": "task Numbers",
    "my_tool.py": "tool add",
    "my_world.py": "environment World",
    "my_base.py": "environment World",
    "my_format.py": "format my_format:Counting",
    "my_reward.py": "reward my_reward:score",
    "my_scale.py": "reward my_reward:score",
}
LEARNING = {
    "my_loss.py": "policy.loss my_loss:loss",
    "my_advantage.py": "policy.advantage my_advantage:advantage",
    "my_rule.py": "rollout.branch_rule my_rule:rule",
}
RESUME = ("train", "--resume", "run")
EVAL = ("eval", "run", "--questions", "1")
ROLLOUT = ("rollout", "run", "--questions", "1", "--out")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_home(home)
        save_chat_model(home / "qwen", "qwen")
        for name, text in FILES.items():
            (home / name).write_text(text)
        done = aepo("train", *SMALL, *SETTINGS, "train.steps=0")
        assert done.code == 0, done.output
        assert "not as it was" not in done.output
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def edit(name: str, old: str = "", new: str = "") -> None:
    """Another comment, or what is given."""
    text = Path(name).read_text()
    assert old in text
    Path(name).write_text(text.replace(old, new) if old else f"{text}# a comment\n")


def warned(done: Done) -> list[str]:
    assert done.code == 0, done.output
    return [line.removeprefix("warning: ") for line in done.output.splitlines() if line.startswith("warning: ")]


def test_what_a_run_remembers(home: Path) -> None:
    facts = read_facts(Path("run"))
    assert facts["version"] == 3
    assert facts["code"].keys() == {*AGENT, *LEARNING, "mine.py"}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in facts["code"].values())
    assert list(facts["tools"]) == ["move", "add", "search"]
    assert facts["tools"]["add"].keys() == {"schema"}
    search = facts["tools"]["search"]
    assert (search["documents"], search["top_k"], len(search["sha256"])) == (2, 3, 64)
    assert facts["rewards"] == {"my_reward:score": 1.0}


def test_nothing_is_said_where_nothing_has_changed(home: Path) -> None:
    """Nor from another directory, nor where a file was only written anew."""
    for name in FILES:
        Path(name).write_text(Path(name).read_text())
    for done in (aepo(*RESUME), aepo(*EVAL), aepo(*ROLLOUT, "trees")):
        assert warned(done) == []
        assert "not as in the run" not in done.output
    assert "changed" not in read_facts(Path("run"))["resumed"][-1]


def test_the_same_files_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "elsewhere").mkdir()
    monkeypatch.syspath_prepend(str(home))
    with own_modules():  # those of the folder that is current at the end
        monkeypatch.chdir(home / "elsewhere")
        for name in ("qwen", "cases.json", "corpus.jsonl"):
            Path(name).symlink_to(home / name)
        done = aepo("train", "--resume", "../run")
        monkeypatch.chdir(home)
    assert warned(done) == []
    assert "changed" not in read_facts(home / "run")["resumed"][-1]


def test_every_edited_file_is_said(home: Path) -> None:
    """In one line, with who uses it; where a command does not, nothing is said."""
    for name in AGENT | LEARNING:
        edit(name)
    lines = {name: f"{part}: {name} is not as it was in the run" for name, part in (AGENT | LEARNING).items()}
    assert sorted(warned(aepo(*EVAL))) == sorted(lines[name] for name in AGENT)
    assert sorted(warned(aepo(*ROLLOUT, "trees"))) == sorted(lines[name] for name in [*AGENT, "my_rule.py"])
    assert sorted(warned(aepo(*RESUME))) == sorted(lines.values())
    assert sorted(read_facts(Path("run"))["resumed"][-1]["changed"]) == sorted(lines.values())
    assert warned(aepo(*RESUME)) == [], "what is is now what was"
    assert "changed" not in read_facts(Path("run"))["resumed"][-1]


def test_the_page_shows_it(home: Path) -> None:
    edit("my_scale.py")
    line = "reward my_reward:score: my_scale.py is not as it was in the run"
    assert warned(aepo(*RESUME)) == [line]
    assert aepo("report", "run").code == 0
    page = Path("run/report.html").read_text()
    assert f"at step 0 ({line})" in page
    assert f"my_scale.py: {hashlib.sha256(Path('my_scale.py').read_bytes()).hexdigest()[:12]}.." in page


def test_a_file_of_many_parts_is_one_line(home: Path) -> None:
    edit("mine.py")
    (line,) = warned(aepo(*RESUME))
    parts, _, said = line.rpartition(": ")
    assert said == "mine.py is not as it was in the run"
    assert set(parts.split(", ")) == {*AGENT.values(), *LEARNING.values()}


READ = {
    "a description": (
        ("my_tool.py", "Add two", "Sum two"),
        "tools.add.schema.description was 'Add two numbers.' and is 'Sum two numbers.'",
        "task.tools=[my_tool:add,search:corpus.jsonl]",
    ),
    "a parameter": (
        ("my_tool.py", "a: int, b: int", "a: int, b: int = 1"),
        "tools.add.schema.parameters.required was ['a', 'b'] and is ['a']",
        "task.tools=[my_tool:add,search:corpus.jsonl]",
    ),
    "a method": (
        ("mine.py", "by: how far", "by: how much"),
        "tools.move.schema.parameters.properties.by.description was 'how far' and is 'how much'",
        "task.environment=my_world:World",
    ),
    "a document": (
        ("corpus.jsonl", "an attic", "a cellar"),
        "tools.search.sha256 was ",
        "task.tools=[my_tool:add,search:corpus.jsonl]",
    ),
    "data of questions": (("cases.json", "1", "2"), "task.data.train_data was ", "task.seed=0"),
    "kinds": (("cases.json", "even", "odd"), "task.data.heldout_data was ", "task.seed=0"),
}


@pytest.mark.parametrize("what", READ)
def test_what_is_read_under_the_same_name(home: Path, what: str) -> None:
    """Refused, unless the command changes the agent; then it is recorded."""
    change, expected, setting = READ[what]
    edit(*change)
    before = Path("run/run.json").read_text()
    for command in (RESUME, EVAL):
        failure = aepo(*command).failure
        hashes = r"[0-9a-f]{12}\.\. and is [0-9a-f]{12}\.\." if expected.endswith("was ") else ""
        named = setting.partition("=")[0]
        rest = rf"{hashes}\. Expected the same one, or in this command a setting .*\b{re.escape(named)}\b"
        assert re.search(f"with another agent: {re.escape(expected)}{rest}", failure), failure
    assert Path("run/run.json").read_text() == before
    edited = [change[0]] if change[0].endswith(".py") else []
    evaluated = aepo(*EVAL, setting)  # which has the value that it had
    assert len(warned(evaluated)) == len(edited)
    assert f"not as in the run: {expected}" in evaluated.output
    assert len(warned(aepo(*RESUME, setting))) == len(edited)
    changed = read_facts(Path("run"))["resumed"][-1]["changed"]
    assert [one.startswith(expected) for one in changed] == [True, *(False for _ in edited)]
    assert warned(aepo(*RESUME)) == []


def test_data_without_a_json_form_is_not_compared(home: Path) -> None:
    edit("my_task.py", '{"case": cases["train"]}', '{"case": object()}')
    assert aepo(*RESUME, "task.seed=0").code == 0
    assert read_facts(Path("run"))["task"]["data"]["train_data"] is None
    assert warned(aepo(*RESUME)) == []


OLD = {
    "version": 2,
    "started": "2026-10-01T12:00:00+00:00",
    "model": {"name": "qwen", "parameters": 1, "vocab_size": 1},
    "task": {"name": "Numbers", "train_questions": 10, "heldout_questions": 3, "system": "Be brief.", "data": {}},
    "format": {"name": "my_format:Counting", "calls": None, "answer": "auto"},
    "tools": ["move", "add", "search"],
    "environment": "World",
    "rewards": {"my_reward:score": 1.0},
    "machine": {},
    "versions": {},
    "commit": None,
    "resumed": [],
    "status": "interrupted",
    "wall_seconds": 1.0,
}
"""run.json as version 2 had it, without its hashes."""


def write_old() -> None:
    facts: dict[str, Any] = json.loads(json.dumps(OLD))
    now = read_facts(Path("run"))
    facts["task"]["data"] = {split: now["task"]["data"][split] for split in ("train", "heldout")}
    facts["format"]["chat_template"] = now["format"]["chat_template"]
    Path("run/run.json").write_text(json.dumps(facts))


def test_a_run_of_version_2_goes_on(home: Path) -> None:
    """What it did not remember is not compared, and remembered from then on."""
    write_old()
    assert aepo("report", "run").code == 0
    assert "move, add, search" in Path("run/report.html").read_text()
    edit("my_tool.py", "Add two", "Sum two")
    assert warned(aepo(*EVAL)) == []
    assert warned(aepo(*RESUME)) == []
    facts = read_facts(Path("run"))
    assert facts["version"] == 3
    assert "changed" not in facts["resumed"][-1]
    assert facts["code"].keys() == {*AGENT, *LEARNING, "mine.py"}
    edit("my_tool.py", "Sum two", "Add two")
    assert "tools.add.schema.description was 'Sum two numbers.' and is 'Add two " in aepo(*RESUME).failure


def test_a_run_of_version_2_compares_what_it_knew(home: Path) -> None:
    write_old()
    edit("mine.py", 'system = "Be brief."', 'system = "Be."')
    edit("my_tool.py", "def add", "def plus")
    edit("my_tool.py", "return mine.add", "return 0 * mine.add")
    settings = "task.tools=[my_tool:plus,search:corpus.jsonl]"
    assert "begun with another agent: task.system was 'Be brief.'" in aepo(*RESUME, settings).failure
    done = aepo(*RESUME, settings, "task.seed=0")
    assert done.code == 0, done.output
    assert read_facts(Path("run"))["resumed"][-1]["changed"] == [
        "task.tools was ('my_tool:add', 'search:corpus.jsonl') and is ('my_tool:plus', 'search:corpus.jsonl')",
        "task.system was 'Be brief.' and is 'Be.'",
        "tools was ['move', 'add', 'search'] and is ['move', 'plus', 'search']",
    ]
