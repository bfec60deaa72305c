"""Names of the user's own code, package.module:Name: what they lead to, and what the errors say."""

from __future__ import annotations

import _sitebuiltins  # defines exit()
import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aepo.registry import place_of, plain, resolve, resolve_function

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory that nothing can be imported from yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_current_directory_can_be_imported_from(folder: Path) -> None:
    (folder / "pieces").mkdir()
    (folder / "pieces" / "mine.py").write_text("import neighbour\nclass A:\n    B = neighbour.VALUE\n")
    (folder / "neighbour.py").write_text("VALUE = 7\n")
    assert resolve("pieces.mine:A.B", "a.setting") == 7


@pytest.mark.parametrize("hooked", [False, True])
def test_a_module_that_exits_is_a_fault_and_no_success(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hooked: bool
) -> None:
    if hooked:  # wandb puts a function of its own in the place of sys.exit, which then is where that raises
        monkeypatch.setattr(sys, "exit", _sitebuiltins.Quitter("exit", ""))
    (folder / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"importing leaving failed: SystemExit: 0 \(leaving.py, line 2\)"):
        resolve("leaving:anything", "a.setting")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "a.setting = 'mine': expected package.module:name, as in my_losses:clipped"),
        ("mine.py:f", "as in my_losses:clipped; a module is written with dots and without .py"),
        ("pieces/mine:f", "as in my_losses:clipped; a module is written with dots and without .py"),
        ("my-losses:f", "as in my_losses:clipped; a module's name has no dash, the file needs another name"),
        ("my-losses.py:f", "without .py; a module's name has no dash, the file needs another name"),
        ("mine:", "expected package.module:name"),
        ("mine:f(3)", "expected package.module:name"),
        ("mane:clipped", "no module 'mane' in {here} and the installed packages; {here} has mine, broken"),
        ("pieces.mane:f", "no module 'pieces.mane' in package pieces; it has mine, other"),
        ("nowhere.at.all:f", "no module 'nowhere' in"),
        ("mine:cliped", "mine has no 'cliped'; has clipped, Gate, NUMBER"),
        ("mine:Gate.los", "Gate has no 'los'; has loss"),
        ("mine:NUMBER.x", "int has no 'x'; has none"),
        ("broken:f", "importing broken failed: SyntaxError: invalid syntax (broken.py, line 2)"),
        ("raising:f", "importing raising failed: ZeroDivisionError: division by zero (raising.py, line 2)"),
        ("lacking:f", "importing lacking failed: No module named 'not_there' (lacking.py, line 1)"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_is_there(folder: Path, name: str, message: str) -> None:
    source = "import json\nfrom pathlib import Path\nNUMBER = 3\ndef clipped(): ...\n"
    source += "class Gate:\n    @staticmethod\n    def loss(): ...\n_hidden = 4\n"
    (folder / "mine.py").write_text(source)
    (folder / "broken.py").write_text("x = 1\ndef f(:\n")
    (folder / "raising.py").write_text("\n1 / 0\n")
    (folder / "lacking.py").write_text("import not_there\n")
    (folder / "pieces").mkdir()
    for file in ("__init__.py", "mine.py", "other.py"):
        (folder / "pieces" / file).write_text("")
    with pytest.raises(ValueError) as error:  # noqa: PT011, the text is compared below
        resolve(name, "a.setting")
    assert message.format(here=folder) in str(error.value)
    assert str(error.value).startswith(f"a.setting = '{name}': ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"mine": "import json\n\njson.loads('no json')\n"},
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (mine.py, line 3)",
        ),
        (
            {"mine": "import neighbour\n", "neighbour": "\n1 / 0\n"},
            "ZeroDivisionError: division by zero (neighbour.py, line 2)",
        ),
        (
            {"mine": "import importlib\nimportlib.import_module('neighbour')\n"},
            "No module named 'neighbour' (mine.py, line 2)",
        ),
    ],
)
def test_an_import_that_fails_names_the_last_line_that_is_the_users_own(
    folder: Path, files: dict[str, str], message: str
) -> None:
    for name, source in files.items():
        (folder / f"{name}.py").write_text(source)
    with pytest.raises(ValueError, match=re.escape(f"importing mine failed: {message}")):
        resolve("mine:f", "a.setting")


@pytest.mark.parametrize("name", ["json:clipped", "json:loads", "json.clipped:f"])
def test_a_file_that_another_module_hides(folder: Path, name: str) -> None:
    (folder / "json.py").write_text("def clipped(): ...\n")
    found = f"json of {json.__file__} is found first, and {folder / 'json.py'} is not used: it needs another name"
    with pytest.raises(ValueError) as error:  # noqa: PT011, the text is compared below
        resolve(name, "a.setting")
    assert str(error.value) == f"a.setting = {name!r}: {found}"


def test_modules_that_hide_nothing(folder: Path) -> None:
    assert resolve("json:loads", "a.setting") is json.loads
    (folder / "sys.py").write_text("")
    with pytest.raises(ValueError, match=r"sys of Python itself is found first, and .*sys\.py is not used"):
        resolve("sys:exit", "a.setting")
    (folder / "whole").mkdir()
    for file in ("__init__.py", "part.py"):
        (folder / "whole" / file).write_text("VALUE = 7\n")
    assert resolve("whole:VALUE", "a.setting") == resolve("whole.part:VALUE", "a.setting") == 7


HOSTILE = """
class Unspeakable(Exception):
    def __str__(self):
        raise KeyError("no")


class Raising:
    def __getattr__(self, name):
        raise KeyError(name)

    def __call__(self, a, b):
        raise ValueError("called")


class Itself(Raising):
    def __getattr__(self, name):
        return self


class Anew(Raising):
    def __getattr__(self, name):
        return type(self)()


class Texts(Raising):
    def __getattr__(self, name):
        return name


def function(a, b): ...


raising, itself, anew, texts = Raising(), Itself(), Anew(), Texts()
"""


@pytest.mark.parametrize("name", ["raising", "itself", "anew", "texts"])
def test_objects_whose_attributes_are_made_up(folder: Path, name: str) -> None:
    (folder / "hostile.py").write_text(HOSTILE)
    found = resolve_function(f"hostile:{name}", "a.setting", "a, b")
    assert callable(plain(found))
    with pytest.raises(ValueError, match="called") as caught:
        found(1, 2)
    assert place_of(caught.value, found) == ("" if name == "texts" else " (hostile.py, line 12)")
    assert resolve("hostile:function", "a.setting") is plain(resolve("hostile:function", "a.setting"))
    if name == "raising":
        with pytest.raises(
            ValueError, match=r"^a.setting = 'hostile:raising.x': 'x' of Raising failed: KeyError: 'x' \("
        ):
            resolve("hostile:raising.x", "a.setting")


def test_modules_that_raise_when_they_are_looked_at(folder: Path) -> None:
    (folder / "hostile.py").write_text(f"{HOSTILE}\nraise Unspeakable\n")
    with pytest.raises(ValueError, match=r"importing hostile failed: Unspeakable: its message cannot be shown \(KeyE"):
        resolve("hostile:f", "a.setting")
    (folder / "closed.py").write_text("def __getattr__(name):\n    raise KeyError(name)\nVALUE = 7\n")
    assert resolve("closed:VALUE", "a.setting") == 7
    expected = r"^a.setting = 'closed:VALU': 'VALU' of closed failed: KeyError: 'VALU' \(closed.py, line 2\)$"
    with pytest.raises(ValueError, match=expected):
        resolve("closed:VALU", "a.setting")
    (folder / "shy.py").write_text(
        "class Shy:\n    def __getattr__(self, name):\n        raise ERRORS.get(name, KeyError)\n"
    )
    (folder / "shy.py").open("a").write("ERRORS = {'x': AttributeError}\nshy = Shy()\n")
    with pytest.raises(ValueError, match=r"^a.setting = 'shy:shy.x': Shy has no 'x'; has none$"):
        resolve("shy:shy.x", "a.setting")


def test_the_command_line_says_it_before_the_model_is_made(folder: Path) -> None:
    from aepo.cli import app

    result = CliRunner().invoke(app, ["train", "policy.loss=my_losses:clipped", f"run.dir={folder / 'run'}"])
    assert result.exit_code == 1
    assert result.output.startswith("error: policy.loss = 'my_losses:clipped': no module 'my_losses' in ")
    assert result.output.count("\n") == 1
    assert not (folder / "run").exists()
