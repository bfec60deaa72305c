"""ToolBox: finds calls, keeps order, and no fault of a tool is more than one short error text."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aepo.agents.protocol import ToolError
from aepo.agents.tools.toolbox import CUT_MARK, ToolBox
from aepo.types import ToolCall, ToolResult


class FunctionTool:
    def __init__(self, function, name="tool", timeout=5.0):
        self.function = function
        self.name = name
        self.timeout = timeout
        self.times_closed = 0

    def __call__(self, argument):
        return self.function(argument)

    def close(self):
        self.times_closed += 1


def raise_(error):
    raise error


def run(toolbox, *arguments, tool="tool"):
    return asyncio.run(toolbox.run([ToolCall(tool, argument) for argument in arguments]))


class TestParse:
    toolbox = ToolBox([FunctionTool(str, "search"), FunctionTool(str, "python")])

    def test_stop_strings(self):
        assert self.toolbox.stop_strings == ("</search>", "</python>")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("I look it up. <search>capital of Peru</search>", ToolCall("search", "capital of Peru")),
            ("<python>\nx = 1\nprint(x < 2)\n</python>\n", ToolCall("python", "\nx = 1\nprint(x < 2)\n")),
            ("<search></search>", ToolCall("search", "")),
            ("<search>a</search> <python>b</python>", ToolCall("python", "b")),  # the last one
            ("<search>a</search> <python>b", ToolCall("search", "a")),  # the last complete one
            ("<search>a<search>b</search>", ToolCall("search", "b")),  # the tag was opened again
            ("<python>'<search>x</search>", ToolCall("search", "x")),  # generation stopped inside the code
            ("<search>a</search> b</search>", ToolCall("search", "a")),
            ("<search>a</python>", None),
            ("a</search>", None),
            ("<answer>42</answer>", None),
            ("<Search>a</Search>", None),
            ("", None),
        ],
    )
    def test_last_complete_call(self, text, expected):
        assert self.toolbox.parse(text) == expected

    def test_without_tools_nothing_is_a_call(self):
        assert ToolBox([]).parse("<search>a</search>") is None
        assert ToolBox([]).stop_strings == ()

    @given(st.lists(st.sampled_from(["<search>", "</search>", "<python>", "</python>", "x"]), max_size=12))
    def test_agrees_with_a_plain_scan(self, pieces):
        expected = None
        start = 0
        while start < len(pieces):  # a call: an opening tag, no tag of that name, its closing tag
            length = 1
            name = pieces[start][1:-1]
            if name in ("search", "python"):
                rest = pieces[start + 1 :]
                stop = next((i for i, piece in enumerate(rest) if name in piece), None)
                if stop is not None and rest[stop] == f"</{name}>":
                    expected = ToolCall(name, "".join(rest[:stop]))
                    length = stop + 2
            start += length
        assert self.toolbox.parse("".join(pieces)) == expected


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
            (lambda _: 42, "raised", "error: the tool returned int, not text"),
            (lambda _: b"bytes", "raised", "error: the tool returned bytes, not text"),
        ],
    )
    def test_each_kind_has_a_short_text(self, function, kind, text):
        (result,) = run(ToolBox([FunctionTool(function)]), "x")
        assert (result.error, result.text) == (kind, text)

    def test_exception_whose_text_fails(self):
        class Bad(Exception):
            def __str__(self):
                raise ValueError

        (result,) = run(ToolBox([FunctionTool(lambda _: raise_(Bad()))]), "x")
        assert result.error == "raised"
        assert "Bad" in result.text

    def test_unknown_tool(self):
        (result,) = run(ToolBox([FunctionTool(str, "search")]), "x", tool="browser")
        assert result == ToolResult("error: there is no tool 'browser'; tools: search", "unknown_tool", 0.0)

    def test_text_is_stripped_and_safe_for_tokenizers(self):
        (result,) = run(ToolBox([FunctionTool(lambda _: "a\ud800b\n")]), "x")
        assert result.text == "a?b"

    def test_long_output_is_cut_with_a_mark(self):
        toolbox = ToolBox([FunctionTool(lambda n: "é" * int(n))], max_chars=100)
        exact, longer = run(toolbox, "100", "101")
        assert exact.text == "é" * 100
        assert longer.text == "é" * (100 - len(CUT_MARK)) + CUT_MARK
        assert longer.error is None

    def test_long_error_is_cut_too(self):
        (result,) = run(ToolBox([FunctionTool(lambda _: raise_(ValueError("x" * 999)))], max_chars=50), "x")
        assert len(result.text) == 50


class TestHungTool:
    def test_the_others_do_not_wait_for_it(self):
        release = threading.Event()
        hangs = FunctionTool(lambda _: release.wait(), "hangs", timeout=0.2)
        toolbox = ToolBox([hangs, FunctionTool(str.upper)])
        start = time.perf_counter()
        results = asyncio.run(toolbox.run([ToolCall("hangs", ""), ToolCall("tool", "a")]))
        release.set()
        assert [result.error for result in results] == ["timeout", None]
        assert results[0].text == "error: no answer after 0.2 s"
        assert 0.2 <= results[0].seconds < 2
        assert time.perf_counter() - start < 2

    def test_threads_are_bounded_and_the_tool_comes_back(self):
        release = threading.Event()
        started = []
        hangs = FunctionTool(lambda x: started.append(x) or (release.wait() and "late"), timeout=0.1)
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
        slow = FunctionTool(lambda x: time.sleep(0.15) or x, timeout=0.5)
        results = run(ToolBox([slow], max_concurrent=1), *"abcdef")  # the last one waits 0.75 s
        assert [result.text for result in results] == list("abcdef")

    def test_cancelled_run_leaves_a_usable_toolbox(self):
        release = threading.Event()
        toolbox = ToolBox([FunctionTool(lambda x: x if x else release.wait())], max_hung=1)

        async def cancel_then_run():
            task = asyncio.ensure_future(toolbox.run([ToolCall("tool", "")]))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait({task})
            refused = await toolbox.run([ToolCall("tool", "a")])
            release.set()
            await asyncio.sleep(0.05)
            return task.cancelled(), refused, await toolbox.run([ToolCall("tool", "a")])

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
            "    name, timeout = 'hang', 0.1\n"
            "    def __call__(self, argument): threading.Event().wait()\n"
            "print(asyncio.run(ToolBox([Hang()]).run([ToolCall('hang', '')]))[0].error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout.strip()) == (0, "timeout"), done.stderr


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
    tools = [FunctionTool(f, name, 0.1 if name == "hangs" else 5.0) for name, f in BEHAVIOURS.items()]
    results = asyncio.run(ToolBox(tools, max_concurrent=8).run([ToolCall(name, "") for name in names]))
    assert [result.error for result in results] == [expected.get(name, "unknown_tool") for name in names]
    assert all(result.text and result.seconds >= 0 for result in results)


def test_calls_of_a_wave_run_at_once():
    barrier = threading.Barrier(16, timeout=10)  # nobody passes before all are there
    tool = FunctionTool(lambda x: str(barrier.wait() >= 0) + x, timeout=15)
    results = run(ToolBox([tool]), *"abcdefghijklmnop")
    assert [result.text for result in results] == ["True" + x for x in "abcdefghijklmnop"]


def test_close_closes_the_tools_once():
    tool = FunctionTool(str)
    toolbox = ToolBox([tool])
    toolbox.close()
    toolbox.close()
    assert tool.times_closed == 1
    with pytest.raises(RuntimeError, match="closed"):
        run(toolbox, "x")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ToolBox([FunctionTool(str, "Bad Name")]), ValueError, "lower-case identifier, got 'Bad Name'"),
        (lambda: ToolBox([FunctionTool(str, "answer")]), ValueError, "got 'answer'"),
        (lambda: ToolBox([FunctionTool(str), FunctionTool(str)]), ValueError, "unique"),
        (lambda: ToolBox([FunctionTool(str, timeout=0)]), ValueError, "timeout of 'tool' must be positive"),
        (lambda: ToolBox([FunctionTool(str, timeout=float("nan"))]), ValueError, "got nan"),
        (lambda: ToolBox(["search"]), TypeError, "got 'search'"),
        (lambda: ToolBox([], max_chars=5), ValueError, "max_chars must be an integer >= 10, got 5"),
        (lambda: ToolBox([], max_concurrent=0), ValueError, "max_concurrent"),
        (lambda: ToolBox([], max_hung=0), ValueError, "max_hung"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
