"""ToolBox: checks arguments, keeps order, and no fault of a tool is more than one short error text."""

import asyncio
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aepo.agents.protocol import ToolError
from aepo.agents.tools.functions import FunctionTool
from aepo.agents.tools.text import CUT_MARK
from aepo.agents.tools.toolbox import ToolBox
from aepo.types import Question, ToolCall, ToolResult


class TextTool:
    """Calls a function of one text."""

    description = "A tool."
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}  # noqa: RUF012

    def __init__(self, function, name="tool", timeout=5.0):
        self.function = function
        self.name = name
        self.timeout = timeout
        self.times_closed = 0

    def __call__(self, text):
        return self.function(text)

    def close(self):
        self.times_closed += 1


def raise_(error):
    raise error


def call(text="", tool="tool"):
    return ToolCall(tool, {"text": text})


def run(toolbox, *arguments, tool="tool"):
    return asyncio.run(toolbox.run([call(argument, tool) for argument in arguments]))


class TestFailures:
    @pytest.mark.parametrize(
        ("function", "kind", "text"),
        [
            (lambda _: raise_(KeyError("x")), "raised", "error: KeyError: 'x'"),
            (lambda _: raise_(SystemExit(3)), "raised", "error: SystemExit: 3"),
            (lambda _: raise_(ToolError("1\nNameError: a")), "raised", "1\nNameError: a"),
            (lambda _: raise_(TimeoutError("stopped after 2 s")), "timeout", "error: stopped after 2 s"),
            (lambda _: None, "empty", "error: the tool returned nothing"),
            (lambda _: " \n\t", "empty", "error: the tool returned nothing"),
            (lambda _: raise_(ToolError("")), "raised", "error"),
            (lambda _: raise_(TimeoutError), "timeout", "error: no answer in time"),
            (lambda _: raise_(ValueError()), "raised", "error: ValueError"),
            (lambda _: b"bytes", "raised", "error: the tool returned bytes, not text"),
            (lambda _: {1, 2}, "raised", "error: the tool returned set, which has no JSON form"),
            (lambda _: {"a": object()}, "raised", "error: the tool returned dict, which has no JSON form"),
            (lambda _: iter("ab"), "raised", "error: the tool returned str_ascii_iterator, which has no JSON form"),
        ],
    )
    def test_each_kind_has_a_short_text(self, function, kind, text):
        (result,) = run(ToolBox([TextTool(function)]), "x")
        assert (result.error, result.text) == (kind, text)

    def test_exception_whose_text_fails(self):
        class Bad(Exception):
            def __str__(self):
                raise ValueError

        (result,) = run(ToolBox([TextTool(lambda _: raise_(Bad()))]), "x")
        assert result.error == "raised"
        assert "Bad" in result.text

    def test_unknown_tool(self):
        (result,) = run(ToolBox([TextTool(str, "search")]), "x", tool="browser")
        assert result == ToolResult("error: there is no tool 'browser'; tools: search", "unknown_tool", 0.0)

    def test_text_is_stripped_and_safe_for_tokenizers(self):
        (result,) = run(ToolBox([TextTool(lambda _: "a\ud800b\n")]), "x")
        assert result.text == "a?b"

    def test_long_output_is_cut_with_a_mark(self):
        toolbox = ToolBox([TextTool(lambda n: "é" * int(n))], max_chars=100)
        exact, longer = run(toolbox, "100", "101")
        assert exact.text == "é" * 100
        assert longer.text == "é" * (100 - len(CUT_MARK)) + CUT_MARK
        assert longer.error is None

    def test_long_error_is_cut_too(self):
        (result,) = run(ToolBox([TextTool(lambda _: raise_(ValueError("x" * 999)))], max_chars=50), "x")
        assert len(result.text) == 50


class TestHungTool:
    def test_the_others_do_not_wait_for_it(self):
        release = threading.Event()
        hangs = TextTool(lambda _: release.wait(), "hangs", timeout=0.2)
        toolbox = ToolBox([hangs, TextTool(str.upper)])
        results = asyncio.run(toolbox.run([call("", "hangs"), call("a")]))
        release.set()
        assert [result.error for result in results] == ["timeout", None]
        assert results[0].text == "error: no answer after 0.2 s"
        assert 0.2 <= results[0].seconds < 10

    def test_threads_are_bounded_and_the_tool_comes_back(self):
        release = threading.Event()
        started = []
        hangs = TextTool(lambda x: started.append(x) or (release.wait() and "late"), timeout=0.1)
        toolbox = ToolBox([hangs], max_concurrent=1, max_hung=4)
        results = run(toolbox, *"abcdefgh")
        assert [result.error for result in results] == ["timeout"] * 8
        assert started == list("abcd")  # the other four were refused
        assert results[7].text == "error: the tool does not respond"
        release.set()
        deadline = time.monotonic() + 5
        while run(toolbox, "again")[0].text != "late":  # the hung threads end, and free their places
            assert time.monotonic() < deadline
        assert [result.text for result in run(toolbox, *"ijklmn")] == ["late"] * 6

    def test_waiting_for_a_place_does_not_count(self):
        slow = TextTool(lambda x: time.sleep(0.15) or x, timeout=0.5)
        results = run(ToolBox([slow], max_concurrent=1), *"abcdef")  # the last one waits 0.75 s
        assert [result.text for result in results] == list("abcdef")

    def test_cancelled_run_leaves_a_usable_toolbox(self):
        release = threading.Event()
        toolbox = ToolBox([TextTool(lambda x: x if x else release.wait())], max_hung=1)

        async def cancel_then_run():
            task = asyncio.ensure_future(toolbox.run([call()]))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait({task})
            refused = await toolbox.run([call("a")])
            release.set()
            await asyncio.sleep(0.05)
            return task.cancelled(), refused, await toolbox.run([call("a")])

        cancelled, refused, after = asyncio.run(cancel_then_run())
        assert cancelled
        assert refused[0].error == "timeout"
        assert after[0].text == "a"

    def test_the_process_can_end(self):
        code = (
            "import asyncio, threading\n"
            "from aepo.agents.tools.toolbox import ToolBox\n"
            "from aepo.types import ToolCall\n"
            "class Hang:\n"
            "    name, timeout, description, parameters = 'hang', 0.1, '', {'type': 'object'}\n"
            "    def __call__(self): threading.Event().wait()\n"
            "print(asyncio.run(ToolBox([Hang()]).run([ToolCall('hang', {})]))[0].error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout.strip()) == (0, "timeout"), done.stderr


def with_schema(parameters, function=dict):
    tool = TextTool(None)
    tool.parameters = parameters
    return Anything(tool, function)


class Anything:
    """A tool of any arguments, with the schema of another."""

    def __init__(self, tool, function):
        self.name, self.timeout, self.description, self.parameters = tool.name, 5.0, "", tool.parameters
        self.function = function

    def __call__(self, **arguments):
        return self.function(arguments)


BEHAVIOURS = {
    "fine": lambda _: "fine",
    "raises": lambda _: raise_(OSError("no")),
    "none": lambda _: None,
    "slow": lambda _: time.sleep(0.02) or "slow",
    "hangs": lambda _: time.sleep(2) or "never seen",
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*BEHAVIOURS, "unknown"]), max_size=20))
def test_always_one_result_per_call_in_order(names):
    expected = {"fine": None, "raises": "raised", "none": "empty", "slow": None, "hangs": "timeout"}
    tools = [TextTool(f, name, 0.1 if name == "hangs" else 5.0) for name, f in BEHAVIOURS.items()]
    results = asyncio.run(ToolBox(tools, max_concurrent=8).run([call("", name) for name in names]))
    assert [result.error for result in results] == [expected.get(name, "unknown_tool") for name in names]
    assert all(result.text and result.seconds >= 0 for result in results)


def test_calls_of_a_wave_run_at_once():
    barrier = threading.Barrier(16, timeout=10)  # nobody passes before all are there
    tool = TextTool(lambda x: str(barrier.wait() >= 0) + x, timeout=15)
    results = run(ToolBox([tool]), *"abcdefghijklmnop")
    assert [result.text for result in results] == ["True" + x for x in "abcdefghijklmnop"]


def test_close_closes_the_tools_once():
    tool = TextTool(str)
    toolbox = ToolBox([tool])
    toolbox.close()
    toolbox.close()
    assert tool.times_closed == 1
    with pytest.raises(RuntimeError, match="closed"):
        run(toolbox, "x")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ToolBox([TextTool(str, "Bad Name")]), ValueError, "A-Z a-z 0-9 _ . -, got 'Bad Name'"),
        (lambda: ToolBox([TextTool(str), TextTool(str)]), ValueError, "two tools are called 'tool': .* and "),
        (lambda: ToolBox([TextTool(str, timeout=0)]), ValueError, "timeout of tool 'tool' must be positive"),
        (lambda: ToolBox([TextTool(str, timeout=float("nan"))]), ValueError, "got nan"),
        (lambda: ToolBox(["search"]), ValueError, "'search' has no name"),
        (lambda: ToolBox([with_schema([])]), ValueError, "parameters of tool 'tool' must be .* got \\[\\]"),
        (
            lambda: ToolBox([with_schema({"type": "object", "properties": [1]})]),
            ValueError,
            "properties of tool 'tool'",
        ),
        (lambda: ToolBox([], max_chars=5), ValueError, "max_chars must be an integer >= 10, got 5"),
        (lambda: ToolBox([], max_concurrent=0), ValueError, "max_concurrent"),
        (lambda: ToolBox([], max_hung=0), ValueError, "max_hung"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "n": {"type": "integer"},
        "share": {"type": "number"},
        "sure": {"type": "boolean"},
        "unit": {"type": "string", "enum": ["km", "mile"]},
        "ids": {"type": "array", "items": {"type": "integer"}},
        "place": {"$ref": "#/$defs/Place"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "both": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "maybe": {"type": "string", "nullable": True},
    },
    "required": ["query"],
    "$defs": {
        "Place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/Place"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


def given_to(arguments, schema=SCHEMA):
    """What a tool with this schema gets, and the result."""
    seen = []
    toolbox = ToolBox([with_schema(schema, lambda given: seen.append(given) or "ok")])
    (result,) = asyncio.run(toolbox.run([ToolCall("tool", arguments)]))
    return (seen[0] if seen else None), result


class TestArguments:
    @pytest.mark.parametrize(
        ("written", "given"),
        [
            ({"n": 3}, {"n": 3}),
            ({"n": "3"}, {"n": 3}),
            ({"n": 3.0}, {"n": 3}),
            ({"n": "3.0"}, {"n": 3}),
            ({"share": 3}, {"share": 3}),
            ({"share": "0.5"}, {"share": 0.5}),
            ({"sure": "True"}, {"sure": True}),
            ({"query": 42}, {"query": "42"}),
            ({"query": "42"}, {"query": "42"}),
            ({"ids": ["1", 2]}, {"ids": [1, 2]}),
            ({"ids": "[1, 2]"}, {"ids": [1, 2]}),
            ({"place": '{"x": "1"}'}, {"place": {"x": 1}}),
            ({"place": {"x": 1, "next": {"x": 2.5}}}, {"place": {"x": 1, "next": {"x": 2.5}}}),
            ({"either": None}, {"either": None}),
            ({"either": "7"}, {"either": 7}),
            ({"both": "7"}, {"both": "7"}),
            ({"maybe": None}, {"maybe": None}),
            ({"n": None}, {}),  # optional: as if it were not written
        ],
    )
    def test_what_fits_or_is_only_written_differently_is_given(self, written, given):
        seen, result = given_to({"query": "q", **written})
        assert (seen, result.text) == ({"query": "q", **given}, "ok")
        assert [type(value) for value in seen.values()] == [type(v) for v in {"query": "q", **given}.values()]

    @pytest.mark.parametrize(
        ("written", "problem"),
        [
            ({}, "query is missing"),
            ({"query": None}, "query must be a text, got null"),
            ({"query": ["a"]}, 'query must be a text, got ["a"]'),
            ({"query": "q", "top": 1}, "there is no 'top'"),
            ({"query": "q", "n": "three"}, 'n must be an integer, got "three"'),
            ({"query": "q", "n": 3.5}, "n must be an integer, got 3.5"),
            ({"query": "q", "n": True}, "n must be an integer, got true"),
            ({"query": "q", "sure": 1}, "sure must be true or false, got 1"),
            ({"query": "q", "unit": "m"}, 'unit must be one of "km", "mile", got "m"'),
            ({"query": "q", "ids": [1, "x"]}, 'ids[1] must be an integer, got "x"'),
            ({"query": "q", "ids": 1}, "ids must be a list, got 1"),
            ({"query": "q", "place": {"x": 1, "y": 2}}, 'place must be an object of x, next, got {"x": 1, "y": 2}'),
            ({"query": "q", "place": {"x": 1, "next": {}}}, "place.next must be an object with 'x', got {}"),
            ({"query": "q", "either": "x"}, 'either must be an integer, got "x"'),
            ({"query": "q", "both": []}, "both must be an integer or a text, got []"),
            ({"n": "x" * 10**6}, f'query is missing; n must be an integer, got "{"x" * 59}..'),
        ],
    )
    def test_what_does_not_fit_is_named_with_what_does(self, written, problem):
        seen, result = given_to(written)
        assert seen is None
        assert result.error == "bad_arguments"
        assert result.text.startswith(f"error: tool: {problem}; the arguments are: query (a text), n (an integer, opt")

    def test_no_object(self):
        assert given_to(["q"])[1].text == 'error: tool: the arguments must be an object, got ["q"]'

    def test_schemas_that_say_little_or_nonsense_allow_everything(self):
        for schema in (
            {"type": "object"},
            {"type": "object", "properties": {"a": 5}},
            SCHEMA | {"properties": {"a": {}}},
        ):
            arguments = {"a": [{"b": None}], **({"query": "q"} if "required" in schema else {})}
            assert given_to(arguments, schema)[0] == arguments
        circle = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/A"}}}
        assert given_to({"a": 1}, circle)[0] == {"a": 1}

    def test_additional_properties(self):
        schema = {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}}
        assert given_to({"a": "1"}, schema)[0] == {"a": 1}
        assert given_to({"a": "x"}, schema)[1].error == "bad_arguments"

    def test_a_call_that_was_not_read_says_why(self):
        (result,) = asyncio.run(ToolBox([TextTool(str)]).run([ToolCall("tool", {}, "no closing brace")]))
        assert result == ToolResult("error: no closing brace", "unparsed", 0.0)


class TestResults:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ({"a": [1, None, "é"]}, '{"a": [1, null, "é"]}'),
            (42, "42"),
            (True, "true"),
            ([], "[]"),
            (0, "0"),
            ((1, 2), "[1, 2]"),
            (np.float32(0.5), "0.5"),
            (np.bool_(True), "true"),
            ({"a": np.arange(3)}, '{"a": [0, 1, 2]}'),
        ],
    )
    def test_values_are_json(self, value, text):
        (result,) = run(ToolBox([TextTool(lambda _: value)]), "x")
        assert (result.text, result.error) == (text, None)

    def test_a_huge_result_is_cut_before_it_is_copied(self):
        text = " \n" + "x" * 200_000_000
        values = [{str(i): i for i in range(100)}] * 200_000  # 200 MB of JSON
        toolbox = ToolBox([TextTool(lambda which: text if which else values)])
        tracemalloc.start()
        of_text, of_values = run(toolbox, "x", "")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert of_text.text == "x" * (2000 - len(CUT_MARK)) + CUT_MARK
        assert of_values.text.startswith('[{"0": 0, "1": 1')
        assert of_values.text.endswith(CUT_MARK)
        assert peak < 2e6

    def test_white_space_after_a_text_does_not_cut_it(self):
        (result,) = run(ToolBox([TextTool(lambda _: "\n ab \n" + " " * 99)], max_chars=20), "x")
        assert result.text == "ab"

    def test_notes_follow_the_message(self):
        error = ValueError("no")
        error.__notes__ = ["because"]
        assert run(ToolBox([TextTool(lambda _: raise_(error))]), "x")[0].text == "error: ValueError: no\nbecause"

    @pytest.mark.parametrize(
        ("kind", "name"), [(ToolError, "raised"), (TimeoutError, "timeout"), (Exception, "raised")]
    )
    def test_errors_whose_text_fails(self, kind, name):
        class Bad(kind):
            def __str__(self):
                raise ZeroDivisionError

        (result,) = run(ToolBox([TextTool(lambda _: raise_(Bad()))]), "x")
        assert result.error == name
        assert result.text.endswith("its message cannot be shown (ZeroDivisionError)")


class TestAsync:
    def test_coroutines_share_one_loop_from_call_to_call(self):
        loops = set()
        here = []

        async def tool(text):
            loops.add(asyncio.get_running_loop())
            if not here:
                here.append(asyncio.Queue())  # lives on the loop of the first call
            await here[0].put(text)
            return await here[0].get()

        toolbox = ToolBox([TextTool(tool), TextTool(lambda text: tool(text), "hidden")])
        assert [run(toolbox, text)[0].text for text in "abc"] == list("abc")
        assert run(toolbox, "d", tool="hidden")[0].text == "d"
        assert len(loops) == 1
        (loop,) = loops
        toolbox.close()
        assert loop.is_closed()

    def test_they_run_at_once(self):
        arrived = []

        async def tool(text):
            arrived.append(text)
            while len(arrived) < 16:  # one after the other, none would end
                await asyncio.sleep(0.001)
            return text

        toolbox = ToolBox([TextTool(tool, timeout=60)])
        assert [r.text for r in run(toolbox, *"abcdefghijklmnop")] == list("abcdefghijklmnop")

    def test_one_that_hangs_is_cancelled_and_its_thread_ends(self):
        cancelled = threading.Event()

        async def tool(text):
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        toolbox = ToolBox([TextTool(tool, timeout=0.1)], max_hung=1)
        assert run(toolbox, "x")[0].text == "error: no answer after 0.1 s"
        assert cancelled.wait(5)
        deadline = time.monotonic() + 5
        while run(toolbox, "x")[0].text == "error: the tool does not respond":  # until its thread has ended
            assert time.monotonic() < deadline

    def test_one_that_blocks_the_loop_is_bounded_like_a_hung_thread(self):
        release = threading.Event()

        async def tool(text):
            release.wait()

        toolbox = ToolBox([TextTool(tool, timeout=0.1)], max_concurrent=1, max_hung=2)
        assert [r.text for r in run(toolbox, *"abc")][2] == "error: the tool does not respond"
        release.set()
        toolbox.close()

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), KeyError("x")])
    def test_what_one_raises_does_not_end_the_others(self, error):
        async def bad(text):
            raise error

        async def good(text):
            await asyncio.sleep(0.05)
            return text

        results = asyncio.run(
            ToolBox([TextTool(bad, "bad"), TextTool(good)]).run([call("a"), call("b", "bad"), call("c")])
        )
        assert [result.error for result in results] == [None, "raised", None]
        assert results[1].text.startswith(f"error: {type(error).__name__}")

    def test_close_waits_for_a_close_that_is_a_coroutine(self):
        closed = []

        class Client(TextTool):
            async def close(self):
                await asyncio.sleep(0.01)
                closed.append(self.name)

        toolbox = ToolBox([Client(str, "a"), Client(str, "b")])
        toolbox.close()
        assert sorted(closed) == ["a", "b"]


def test_one_close_that_raises_does_not_keep_the_others_open():
    class Bad(TextTool):
        def close(self):
            raise OSError("no")

    tools = [TextTool(str, "a"), Bad(str, "b"), TextTool(str, "c")]
    with pytest.raises(OSError, match="no"):
        ToolBox(tools).close()
    assert [tool.times_closed for tool in tools] == [1, 0, 1]


def test_a_tool_that_is_not_registered_has_the_same_limits():
    toolbox = ToolBox([], max_chars=20)

    async def calls():
        tool = TextTool(lambda text: text * 99, "bound")
        return [await toolbox.call(tool, {"text": "x"}), await toolbox.call(tool, {})]

    good, bad = asyncio.run(calls())
    assert (good.text, good.error) == ("x" * 11 + CUT_MARK, None)
    assert bad.error == "bad_arguments"


def test_schemas_and_names_as_mcp_has_them():
    toolbox = ToolBox([TextTool(str, "get-time.v2"), TextTool(str, "Answer")])
    assert toolbox.schemas[0] == {
        "type": "function",
        "function": {"name": "get-time.v2", "description": "A tool.", "parameters": TextTool.parameters},
    }
    assert run(toolbox, "x", tool="get-time.v2")[0].text == "x"


def test_the_session_of_stateless_tools_is_shared():
    async def play():
        toolbox = ToolBox([TextTool(str.upper)])
        session = await toolbox.open(Question("q", "?"))
        branch = await session.branch(1)
        session.forget(1)
        await session.close()
        return toolbox, session, branch, await branch.run([call("a")]), await session.reward()

    toolbox, session, branch, (result,), reward = asyncio.run(play())
    assert session is branch is toolbox.session
    assert not toolbox.stateful
    assert (session.observation, result.text, reward) == (None, "A", None)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": "a", "prefixItems": 5},
        {"type": "array", "maxItems": None, "items": True},
        {"type": "array", "minItems": True, "maxItems": "b", "items": 5},
        {"type": {}},
        {"type": [{}, None]},
        {"enum": "abc"},
        {"anyOf": 5},
        {"oneOf": [5, None]},
        {"allOf": 5},
        {"type": "object", "properties": 5, "required": 5},
        {"type": "object", "required": [{}]},
        {"$ref": 5},
        5,
        None,
    ],
)
@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, "x", 3, None])
def test_a_schema_that_says_nonsense_ends_no_run(schema, value):
    tool = with_schema({"type": "object", "properties": {"x": schema}, "required": "x"}, lambda given: "called")
    (result,) = asyncio.run(ToolBox([tool]).run([ToolCall("tool", {"x": value})]))
    assert result.error in (None, "bad_arguments")
    assert result.text == "called" or result.text.startswith("error: tool: x must be ")


def test_numbers_that_are_not_finite_are_bad_arguments():
    schema = {"type": "object", "properties": {"x": {"type": "number"}}}
    for value in ("NaN", "1e999", "-Infinity", float("nan"), float("inf")):
        (result,) = asyncio.run(ToolBox([with_schema(schema)]).run([ToolCall("tool", {"x": value})]))
        assert (result.error, result.text[:33]) == ("bad_arguments", "error: tool: x must be a number, ")
    assert given_to({"x": "1e3"}, schema)[0] == {"x": 1000.0}


def test_a_tuple_has_as_many_values_as_it_says():
    def pair(both: tuple[int, str]) -> str:
        """Pair.

        Args:
            both: A number and a text.
        """
        return repr(both)

    toolbox = ToolBox([FunctionTool(pair, 5.0)])
    calls = [ToolCall("pair", {"both": both}) for both in ([1, "a"], [1], [1, "a", 2])]
    first, *others = asyncio.run(toolbox.run(calls))
    assert (first.text, first.error) == ("(1, 'a')", None)
    assert [result.error for result in others] == ["bad_arguments"] * 2
    assert [" ".join(result.text.split()[2:11]) for result in others] == [
        "both must be a list of at least 2,",
        "both must be a list of at most 2,",
    ]


def test_true_is_no_choice_of_one_nor_one_of_true():
    for choice, value in ((1, True), (True, 1), (0, False), (False, 0)):
        schema = {"type": "object", "properties": {"x": {"enum": [choice]}}}
        (result,) = asyncio.run(ToolBox([with_schema(schema)]).run([ToolCall("tool", {"x": value})]))
        assert result.error == "bad_arguments"


async def leaves_async():
    sys.exit(0)


@pytest.mark.parametrize("function", [sys.exit, leaves_async])
def test_exit_in_a_tool_is_a_result_and_other_calls_go_on(function):
    toolbox = ToolBox([with_schema({"type": "object"}, lambda _: function())])
    for _ in range(2):
        (result,) = asyncio.run(toolbox.run([ToolCall("tool", {})]))
        assert (result.error, result.text[:17]) == ("raised", "error: SystemExit")
