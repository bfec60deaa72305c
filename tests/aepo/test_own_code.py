"""Which files are behind the user's own things, and what is said where they have changed."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from door_toys import own_modules

from aepo.agents.rewards.builtin import BUILTIN
from aepo.agents.tools.search import SearchTool
from aepo.own_code import code_changes, code_facts, code_of, named_part

SOURCES = {
    "scores.py": (
        "from numbers_of_mine import SCALE\nimport json, torch\nfrom pack.inner import part\n"
        "def score(question, response):\n    from late import never\n    return SCALE\n"
        "small = lambda question, response: 0.0\n"
    ),
    "numbers_of_mine.py": "SCALE = 2.0\n",
    "late.py": "never = 1\n",
    "pack/__init__.py": "",
    "pack/inner/__init__.py": "",
    "pack/inner/part.py": "from ..other import thing\nfrom . import beside\n",
    "pack/inner/beside.py": "",
    "pack/other.py": "thing = 1\n",
    "bases.py": "class Base:\n    def __call__(self):\n        return 1\n",
    "worlds.py": "import bases\nBase = bases.Base\nclass World(Base):\n    def step(self):\n        return 1\n",
    "unrelated.py": "",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, source in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    with own_modules():
        yield tmp_path


def files(*things: Any) -> dict[str, str | None]:
    return dict(code_of({"it": things})["it"])


def digest(name: str) -> str:
    return hashlib.sha256(SOURCES[name].encode()).hexdigest()


def test_a_functions_file_and_what_it_imports(home: Path) -> None:
    """Also where only a number is imported, and relatively; not what is never imported, nor what others installed."""
    found = files(importlib.import_module("scores").score)
    names = {"scores.py", "numbers_of_mine.py", "pack/inner/part.py", "pack/other.py", "pack/inner/beside.py"}
    packages = {"pack/inner/__init__.py"}  # of `from pack.inner import`
    assert found.keys() == names | packages
    assert found == {name: digest(name) for name in names | packages}


@pytest.mark.parametrize("wrap", [functools.partial, lambda f: functools.partial(functools.partial(f), 1)])
def test_what_a_partial_is_of(wrap: Any) -> None:
    scores = importlib.import_module("scores")
    assert "scores.py" in files(wrap(scores.small))


def test_classes_with_their_bases() -> None:
    worlds = importlib.import_module("worlds")
    expected = {name: digest(name) for name in ("worlds.py", "bases.py")}
    for thing in (worlds.World, worlds.World(), worlds.World().step, worlds.World()):
        assert files(thing) == expected
    assert files(type("Here", (worlds.Base,), {"__module__": "nowhere"})) == {
        "nowhere": None,
        "bases.py": digest("bases.py"),
    }


def test_what_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's function is known to be there, and nothing more."""
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    spaces: dict[str, Any] = {"__name__": "__main__"}
    exec("def score(question, response):\n    return 1.0", spaces)
    assert files(spaces["score"]) == {"__main__": None}


def test_a_script_that_is_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(home / "late.py"), raising=False)
    spaces: dict[str, Any] = {"__name__": "__main__"}
    exec("def score(question, response):\n    return 1.0", spaces)
    assert files(spaces["score"]) == {"late.py": digest("late.py")}


def test_what_others_installed_is_a_version() -> None:
    assert files(math.sqrt, len) == {}
    assert files(torch.relu) == files(torch.nn.Linear) == {"torch": importlib.metadata.version("torch")}


def test_what_is_ours_is_left_out() -> None:
    assert files(*BUILTIN.values(), SearchTool(["one document"]), SearchTool) == {}


def test_scripts(home: Path) -> None:
    assert files(Path("late.py")) == {"late.py": digest("late.py")}
    (home / "b").mkdir()
    (home / "b" / "late.py").write_text("")
    found = files(Path("late.py"), Path("b/late.py"), Path("gone.py"))  # two of one name, as the command has them
    assert found == {"late.py": digest("late.py"), "b/late.py": hashlib.sha256(b"").hexdigest(), "gone.py": None}


@pytest.mark.parametrize("held", ["decorated", "partial", "method", "deep"])
def test_what_a_function_holds(home: Path, held: str) -> None:
    """A decorator's wrapper is defined elsewhere than what it calls."""
    (home / "wrapping.py").write_text("def wrap(f):\n    def g(*given):\n        return f(*given)\n    return g\n")
    wrap, scores, worlds = importlib.import_module("wrapping").wrap, importlib.import_module("scores"), "worlds.py"
    world = importlib.import_module("worlds").World()
    thing, expected = {
        "decorated": (wrap(scores.small), {"wrapping.py", "scores.py"}),
        "partial": (functools.partial(wrap(scores.small), judge=world.step), {"wrapping.py", "scores.py", worlds}),
        "method": (wrap(world.step), {"wrapping.py", worlds, "bases.py"}),
        "deep": (wrap(wrap(wrap(scores.small))), {"wrapping.py", "scores.py"}),
    }[held]
    assert files(thing).keys() >= expected


def test_an_object_that_makes_up_attributes(home: Path) -> None:
    """As clients of servers do: each is another object that can be called."""

    class Remote:
        def __getattr__(self, name: str) -> Any:
            return Remote()

        def __call__(self, *given: Any) -> Any:
            return Remote()

    (home / "wrapping.py").write_text("def wrap(f):\n    def g(*given):\n        return f(*given)\n    return g\n")
    assert "wrapping.py" in files(importlib.import_module("wrapping").wrap(Remote()))
    assert files(functools.partial(Remote())).keys() == files(Remote).keys()


def test_a_name_that_has_no_value_yet() -> None:
    def make() -> Any:
        def early() -> Any:
            return late

        found = files(early)
        late = 1
        return found, late

    assert make()[0].keys() >= {"test_own_code.py"}


def test_a_function_that_holds_itself() -> None:
    def again(n: int) -> int:
        return again(n - 1) if n else 0

    assert "test_own_code.py" in next(iter(files(again)))


def test_a_file_that_was_broken_since(home: Path) -> None:
    worlds = importlib.import_module("worlds")
    (home / "worlds.py").write_text("class World(\n")
    assert files(worlds.World).keys() == {"worlds.py", "bases.py"}
    (home / "worlds.py").unlink()
    assert files(worlds.World)["worlds.py"] is None


def test_the_part_of_a_setting() -> None:
    (part,) = named_part("policy.loss", "worlds:World").items()
    assert part == ("policy.loss worlds:World", [sys.modules["worlds"].World])
    assert named_part("policy.advantage", "group") == named_part("policy.loss", None) == {}


def test_changes() -> None:
    """A line per file, with all that uses it."""
    code = {"reward a:b": {"a.py": "1", "c.py": "2"}, "tool d": {"c.py": "2"}, "tool e": {"f": None}}
    assert code_facts(code) == {"a.py": "1", "c.py": "2", "f": None}
    assert code_changes(code_facts(code), code) == []
    assert code_changes({**code_facts(code), "old.py": "3"}, code) == [], "a part that is not used here"
    assert code_changes(None, code) == []
    assert code_changes({"a.py": "1", "c.py": "0"}, code) == [
        "reward a:b, tool d: c.py is not as it was in the run",
        "tool e: f was not in the run",
    ]
