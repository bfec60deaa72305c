"""From settings and Python objects to tools; what is none is one line that says what is expected."""

import asyncio
import contextlib

import pytest

from aepo.agents.tools.functions import FunctionTool
from aepo.agents.tools.make import make_tools
from aepo.agents.tools.toolbox import ToolBox
from aepo.types import ToolCall

MODULE = '''
import asyncio

def double(n: int) -> int:
    """Twice as much."""
    return 2 * n

async def later(n: int) -> int:
    """One more."""
    await asyncio.sleep(0)
    return n + 1

def no_hint(n):
    """One."""

class Account:
    """Not a tool itself."""

    closed = 0

    def __init__(self):
        self.balance = 0

    def deposit(self, amount: int) -> int:
        """Put money in."""
        self.balance += amount
        return self.balance

    def read(self) -> int:
        """How much there is."""
        return self.balance

    def _secret(self):
        pass

    def close(self):
        Account.closed += 1

class Clock:
    name, timeout, description = "clock", 1.0, "The time."
    parameters = {"type": "object", "properties": {}}

    def __call__(self):
        return "12:00"

clock = Clock()

class Half:
    name, timeout = "half", 1.0
    parameters = {"type": "object"}

    def __call__(self):
        return ""

class Game:
    def reset(self):
        """Begin."""

class Needs:
    def __init__(self, path):
        pass

class Nothing:
    pass

number = 5
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's own file, under a new name for each test."""
    own.count = getattr(own, "count", 0) + 1
    name = f"own_tools_{own.count}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "corpus.jsonl").write_text('{"text": "Lima is in Peru."}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def run(tools, *calls):
    with contextlib.closing(ToolBox(tools)) as toolbox:
        return [result.text for result in asyncio.run(toolbox.run([ToolCall(*call) for call in calls]))]


def test_functions_classes_and_tools_by_name(own):
    specs = [f"{own}:double", f"{own}:later", f"{own}:Account", f"{own}:Clock", "search:corpus.jsonl"]
    tools = make_tools(specs, timeout=7.0)
    assert [tool.name for tool in tools] == ["double", "later", "deposit", "read", "clock", "search"]
    assert [tool.timeout for tool in tools] == [7.0] * 4 + [1.0, 10.0]
    texts = run(tools, ("double", {"n": 4}), ("later", {"n": 4}), ("deposit", {"amount": 3}), ("clock", {}))
    assert texts == ["8", "5", "3", "12:00"]


def test_the_methods_of_a_class_share_an_instance_which_is_closed_once(own):
    tools = make_tools([f"{own}:Account"], timeout=7.0)
    account = __import__(own).Account
    with contextlib.closing(ToolBox(tools)) as toolbox:
        asyncio.run(toolbox.run([ToolCall("deposit", {"amount": 3})]))
        assert asyncio.run(toolbox.run([ToolCall("read", {})]))[0].text == "3"
    assert account.closed == 1


def test_the_sandbox():
    python = pytest.importorskip("aepo.agents.tools.python")
    if python.sandbox_problem():
        pytest.skip("no sandbox here")
    assert run(make_tools(["python"], timeout=7.0), ("python", {"code": "1 + 1"})) == ["2"]


def test_python_objects(own):
    module = __import__(own)
    account = module.Account()
    tools = make_tools([module.double, module.clock, account, FunctionTool(module.later, 3.0)], 7.0)
    assert [tool.name for tool in tools] == ["double", "clock", "deposit", "read", "later"]
    assert tools[-1].timeout == 3.0
    run(tools, ("deposit", {"amount": 3}))
    assert account.balance == 3


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("pythn", "expected python, search:CORPUS.jsonl, package.module:function, "),
        ("python:3", "expected python, "),
        ("search", "expected python, search:CORPUS.jsonl, "),
        ("search:nowhere.jsonl", "expected a JSONL file of documents: [Errno 2] No such file or directory"),
        ("ftp://x/y", "expected python, "),
        ("my/tools.py:double", "expected package.module:name, as in my_losses:clipped; a module is written with dots"),
        ("mcp+ftp://x/y", "expected python, "),
        ("OWN:nothing", "OWN has no 'nothing'; has "),
        ("OWN:no_hint", "tool no_hint (OWN.py:13): parameter 'n' has no type hint"),
        ("OWN:Game", "Game has a method reset(): it is an environment, which task.environment takes"),
        ("OWN:Needs", "Needs() cannot be made without arguments: TypeError: "),
        ("OWN:Nothing", "Nothing is no tool and has no public methods"),
        ("OWN:Half", "has no description"),
        ("OWN:number", "expected a function, a tool or a class of tools, got 5"),
    ],
)
def test_what_is_no_tool_is_one_line(own, spec, problem):
    spec = spec.replace("OWN", own)
    with pytest.raises(ValueError, match="task") as caught:
        make_tools([spec], timeout=7.0)
    line = str(caught.value)
    assert line.startswith(f"task.tools = {spec!r}: ")
    assert problem.replace("OWN", own) in line
    assert "\n" not in line


def test_what_is_no_tool_in_python():
    with pytest.raises(ValueError, match=r"^task\.tools: expected a function, a tool or a class of tools, got 5$"):
        make_tools([5], 7.0)
    with pytest.raises(
        ValueError, match=r"^task\.tools: tool \S+<lambda> \(test_tools_make.py:\d+\): a lambda has no name"
    ):
        make_tools([lambda a: a], 7.0)


def test_tools_before_a_bad_one_are_closed(own):
    with pytest.raises(ValueError, match="nonsense"):
        make_tools([f"{own}:Account", "nonsense"], timeout=7.0)
    assert __import__(own).Account.closed == 1
