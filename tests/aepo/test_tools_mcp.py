"""MCP: a server that others wrote, and one of ours that dies, hangs and floods, over pipes and over HTTP."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("mcp")

from aepo.agents.tools import mcp as module
from aepo.agents.tools.functions import FunctionTool
from aepo.agents.tools.make import make_tools
from aepo.agents.tools.mcp import mcp_tools
from aepo.agents.tools.toolbox import ToolBox
from aepo.types import ToolCall

SERVERS = Path(__file__).parent / "mcp_servers"


def hostile(mode=""):
    return f"mcp:python {SERVERS / 'hostile.py'} {mode}".strip()


@contextlib.contextmanager
def box(spec, timeout=10.0, max_chars=2000):
    toolbox = ToolBox(mcp_tools(spec, timeout), max_chars=max_chars)
    try:
        yield toolbox
    finally:
        toolbox.close()


def run(toolbox, *calls):
    """Calls are names, or (name, arguments)."""
    calls = [ToolCall(call, {}) if isinstance(call, str) else ToolCall(*call) for call in calls]
    return asyncio.run(toolbox.run(calls))


def gone(pid, seconds=5.0):
    """Whether the process ends in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_real_server():
    pytest.importorskip("mcp_server_time")
    with contextlib.closing(ToolBox(make_tools(["mcp:python -m mcp_server_time"], timeout=20.0))) as toolbox:
        assert sorted(toolbox.tools) == ["convert_time", "get_current_time"]
        schema = toolbox.schemas[0]["function"]
        assert schema["description"]
        assert schema["parameters"]["properties"]["timezone"]["type"] == "string"
        convert = {"source_timezone": "Asia/Tokyo", "time": "12:30", "target_timezone": "Asia/Kolkata"}
        now, converted, wrong, unknown = run(
            toolbox,
            ("get_current_time", {"timezone": "UTC"}),
            ("convert_time", convert),
            ("get_current_time", {"timezone": "Mars/North"}),
            ("get_current_time", {"zone": "UTC"}),
        )
    stamp = datetime.fromisoformat(now.text.partition('"datetime": "')[2].partition('"')[0] or now.text)
    assert abs(stamp.timestamp() - time.time()) < 60
    assert "09:00" in converted.text
    assert (wrong.error, unknown.error) == ("raised", "bad_arguments")
    assert "Mars/North" in wrong.text


class TestResults:
    def test_kinds_of_content(self):
        with box(hostile()) as toolbox:
            results = run(toolbox, ("echo", {"text": "hé"}), "fails", "image", "structured", "nothing")
        assert [(result.text, result.error) for result in results] == [
            ("hé", None),
            ("no such city", "raised"),
            ("see\n[image of type image/png, which cannot be shown]", None),
            ('{"a": [1, "é"]}', None),
            ("error: the tool returned nothing", "empty"),
        ]

    def test_pages_and_names_with_dashes(self):
        with box(hostile("pages")) as toolbox:
            assert list(toolbox.tools)[:3] == ["echo", "pid", "slow"]
            assert "huge-line" in toolbox.tools
            assert toolbox.schemas[0]["function"]["description"] == "It is echo."

    def test_calls_of_a_wave_each_get_their_own_answer(self):
        with box(hostile()) as toolbox:
            results = run(toolbox, *(("echo", {"text": str(i)}) for i in range(50)))
        assert [result.text for result in results] == [str(i) for i in range(50)]


class TestFailures:
    def test_one_that_dies_is_started_again_by_the_next_call(self):
        with box(hostile()) as toolbox:
            (before,) = run(toolbox, "pid")
            (died,) = run(toolbox, "die")
            assert died.error == "raised"
            assert died.text == (
                "error: the MCP server ended during the call: it ended with exit code 3; it said: I am dying"
            )
            (after,) = run(toolbox, "pid")
            assert after.error is None
            assert after.text != before.text
            assert gone(int(before.text))

    def test_calls_that_were_lost_with_it_are_errors_and_are_not_repeated(self, tmp_path):
        with box(hostile()) as toolbox:
            results = run(toolbox, "die", "die", ("echo", {"text": "a"}))
            assert all(result.error == "raised" for result in results[:2])
            assert run(toolbox, ("echo", {"text": "b"}))[0].text == "b"

    def test_one_killed_between_two_calls_is_started_again(self):
        with box(hostile()) as toolbox:
            pid = int(run(toolbox, "pid")[0].text)
            os.kill(pid, signal.SIGKILL)
            assert gone(pid)
            time.sleep(0.05)
            assert run(toolbox, ("echo", {"text": "a"}))[0].text == "a"

    def test_one_that_hangs_is_a_timeout_and_is_replaced(self):
        with box(hostile(), timeout=0.5) as toolbox:
            (pid,) = run(toolbox, "pid")
            start = time.perf_counter()
            (result,) = run(toolbox, "hang")
            assert (result.text, result.error) == ("error: no answer after 0.5 s", "timeout")
            assert time.perf_counter() - start < 30  # it hangs for good
            (after,) = run(toolbox, "pid")
            assert after.error is None
            assert after.text != pid.text
            assert gone(int(pid.text))

    def test_one_that_cannot_be_started_again_is_a_short_error(self, tmp_path):
        script = tmp_path / "server.py"
        script.write_text((SERVERS / "hostile.py").read_text())
        with box(f"mcp:python {script}") as toolbox:
            script.write_text("raise SystemExit('gone for good')")
            run(toolbox, "die")
            (result,) = run(toolbox, "pid")
        expected = "error: the MCP server cannot be used: it ended with exit code 1; it said: gone for good"
        assert (result.text, result.error) == (expected, "raised")


class TestFloods:
    def test_huge_results_are_cut_or_refused_in_bounded_memory(self):
        with box(hostile(), timeout=30.0, max_chars=100) as toolbox:
            (cut,) = run(toolbox, ("huge", {"n": 5_000_000}))
            assert cut.text == "x" * 91 + "... [cut]"
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            (refused,) = run(toolbox, ("huge", {"n": 100_000_000}))
            assert refused.text == "error: the answer has more than 16,777,216 bytes"
            (lost,) = run(toolbox, ("huge-line", {"n": 100_000_000}))
            assert "it sent a message of more than 16,777,216 bytes" in lost.text
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80_000  # KiB
            assert run(toolbox, ("echo", {"text": "a"}))[0].text == "a"

    def test_endless_notifications_and_errors_do_not_hinder_calls(self):
        with box(hostile()) as toolbox:
            assert run(toolbox, "logs")[0].text == "flooding"
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            time.sleep(0.5)
            assert run(toolbox, ("echo", {"text": "a"}))[0].text == "a"
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB

    def test_endless_requests_whose_answers_it_never_reads(self):
        with box(hostile(), timeout=2.0) as toolbox:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert run(toolbox, "requests")[0].error == "timeout"
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB
            assert run(toolbox, ("echo", {"text": "a"}))[0].text == "a"  # a new one


class TestStart:
    @pytest.mark.parametrize(
        ("spec", "problem"),
        [
            (hostile("exits"), "it ended with exit code 1; it said: ModuleNotFoundError: No module named 'nothing'"),
            (hostile("chatty"), "no answer after 0.5 s; it said: hello, I am no MCP server"),
            (hostile("mute"), "no answer after 0.5 s"),
            (hostile("strange"), "2 validation errors for InitializeResult"),
            (hostile("endless"), "the MCP server's list of tools has more than 100 pages"),
            (hostile("twice"), "the MCP server has two tools called 'echo'"),
            (hostile("none"), "the MCP server has no tool"),
            ("mcp:no-such-command x", "there is no command 'no-such-command'"),
            ("mcp:echo hello", "it ended with exit code 0; it said: hello"),
            ("mcp:cat", "Method not found"),
            ("mcp:", "expected mcp:COMMAND ARGUMENTS, got no command"),
            ("mcp:'x", "expected mcp:COMMAND ARGUMENTS: No closing quotation"),
            ("mcp+http://127.0.0.1:9/mcp", "All connection attempts failed"),
        ],
    )
    def test_what_cannot_be_used_is_one_line_that_names_it(self, spec, problem):
        with pytest.raises(ValueError, match=r"^task\.tools = ") as caught:
            mcp_tools(spec, 5.0, start_seconds=0.5 if "no answer" in problem else 10.0)
        line = str(caught.value)
        assert line.startswith(f"task.tools = {spec!r}: ")
        assert problem in line
        assert "\n" not in line

    def test_two_servers_with_a_tool_of_one_name(self):
        tools = mcp_tools(hostile(), 5.0) + mcp_tools(hostile("pages"), 5.0)
        with pytest.raises(
            ValueError, match=r"two tools are called 'echo': echo of mcp:python .*hostile.py and echo of"
        ):
            ToolBox(tools)
        for tool in tools:
            tool.close()

    def test_tools_before_a_bad_one_are_closed(self, monkeypatch):
        made = []
        monkeypatch.setattr(module, "McpServer", lambda *a, _make=module.McpServer: made.append(_make(*a)) or made[-1])
        with pytest.raises(ValueError, match="expected python, search:"):
            make_tools([hostile(), "nonsense"], timeout=5.0)
        assert [server._closed for server in made] == [True]

    def test_the_package_is_named_where_it_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mcp", None)
        with pytest.raises(ModuleNotFoundError, match=r'needs the package mcp: pip install "aepo-kernels\[mcp\]"'):
            mcp_tools(hostile(), 5.0)


class TestEnd:
    @pytest.mark.parametrize("mode", ["", "stubborn"])
    def test_close_ends_the_process(self, mode):
        with box(hostile(mode)) as toolbox:
            pid = int(run(toolbox, "pid")[0].text)
        assert gone(pid, 0.5)

    @pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)"])
    @pytest.mark.parametrize("mode", ["", "stubborn"])
    def test_the_end_of_our_process_ends_it(self, end, mode):
        """Neither closes its tools. A server that heeds nothing is only ended with us where the kernel is asked to."""
        code = (
            "import asyncio, os, signal, sys\n"
            "from aepo.agents.tools.mcp import mcp_tools\n"
            f"tools = mcp_tools({hostile(mode)!r}, 5.0)\n"
            "print([tool for tool in tools if tool.name == 'pid'][0](), flush=True)\n"
            f"{end}\n"
        )
        # Without a PATH there is no setpriv; what ends in order must not need it.
        env = os.environ if "SIGKILL" in end else {**os.environ, "PATH": "/nowhere"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=env)
        pid = int(done.stdout)
        if mode and "SIGKILL" in end and not _has_setpriv():
            os.kill(pid, signal.SIGKILL)
            pytest.skip("needs setpriv --pdeathsig")
        assert gone(pid)


def _has_setpriv():
    from aepo.agents.tools.mcp_stdio import _dies_with_us

    return bool(_dies_with_us())


@contextlib.contextmanager
def over_http(port):
    process = subprocess.Popen(
        [sys.executable, SERVERS / "over_http.py", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def test_files_of_a_command(tmp_path, monkeypatch):
    """A run remembers them: the server's code."""
    with box(hostile()) as toolbox:
        assert {tuple(tool.files) for tool in toolbox.tools.values()} == {(SERVERS / "hostile.py",)}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mcp").write_text("")
    for spec in ("mcp:python -m server", "mcp+http://localhost:8000/mcp", f"mcp:npx server {tmp_path}"):
        server = module.McpServer(spec, 1.0)
        assert server.files == []
        server.close()


def test_over_http():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        with over_http(port) as process:
            toolbox = stack.enter_context(box(f"mcp+http://127.0.0.1:{port}/mcp", timeout=5.0, max_chars=100))
            good, bad = run(toolbox, ("add", {"a": 1, "b": "2"}), ("add", {"a": 1}))
            assert (good.text, bad.error) == ("3", "bad_arguments")
            assert run(toolbox, "pid")[0].text == str(process.pid)
            (huge,) = run(toolbox, ("huge", {"n": 20_000_000}))
            assert huge.error == "raised"
            assert "the answer has more than 16,777,216 bytes" in huge.text
            toolbox.tools["hang"]._server.timeout = 0.3
            assert run(toolbox, "hang")[0].text == "error: no answer after 0.3 s"
            toolbox.tools["hang"]._server.timeout = 5.0
            assert run(toolbox, ("add", {"a": 1, "b": 3}))[0].text == "4"
        (down,) = run(toolbox, "pid")
        assert down.error == "raised"
        with over_http(port) as process:
            assert run(toolbox, "pid")[0].text == str(process.pid)


def test_beside_other_tools():
    def upper(text: str) -> str:
        """In capital letters."""
        return text.upper()

    tools = [FunctionTool(upper, 5.0), *mcp_tools(hostile(), 5.0)]
    with contextlib.closing(ToolBox(tools)) as toolbox:
        results = run(toolbox, ("echo", {"text": "a"}), ("upper", {"text": "b"}))
    assert [result.text for result in results] == ["a", "B"]


def test_half_of_a_surrogate_pair_in_a_result_is_replaced():
    with box(hostile(), timeout=5.0) as toolbox:
        (result,) = run(toolbox, "surrogate")
    assert (result.text, result.error) == ("half ? of a pair, 😀", None)
