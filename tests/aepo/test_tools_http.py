"""A retriever in the network, played by a real HTTP server: what it is asked, what it may answer, how it fails."""

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from aepo.agents.tools.http import NO_RESULTS, RetrieveTool
from aepo.agents.tools.make import make_tools
from aepo.agents.tools.toolbox import ToolBox
from aepo.types import ToolCall


@contextlib.contextmanager
def server(answer):
    """Answers `answer(body)`: bytes, or what has a JSON form, or a status."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            reply = answer(body)
            status, reply = (reply, b"") if isinstance(reply, int) else (200, reply)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/retrieve", asked
    finally:
        http.shutdown()
        http.server_close()


def ask(url, *queries, timeout=5.0):
    toolbox = ToolBox([RetrieveTool(url, timeout, top_k=2)])
    return asyncio.run(toolbox.run([ToolCall("search", {"query": query}) for query in queries]))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([[{"document": {"contents": '"Lima"\nIn Peru.'}, "score": 1.5}]], '"Lima"\nIn Peru.'),
        (
            {"result": [[{"document": {"id": "1", "contents": "a"}, "score": 2}, {"document": {"contents": "b"}}]]},
            "a\nb",
        ),
        ([[{"contents": "a"}, {"contents": "b"}, {"contents": "c"}]], "a\nb"),  # never more than were asked for
        ([["a\nb", "c"]], "a\nb\n\nc"),
        ([[{"title": "T", "text": "x"}]], "T\nx"),
        ([[]], NO_RESULTS),
    ],
)
def test_forms_of_answers(answer, text):
    with server(lambda body: answer) as (url, asked):
        (result,) = ask(url, "capital of Perú")
    assert (result.text, result.error) == (text, None)
    assert asked == [("/retrieve", {"queries": ["capital of Perú"], "topk": 2, "return_scores": True})]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (500, "error: the retriever answered 500 Internal Server Error"),
        (404, "error: the retriever answered 404 Not Found"),
        (b"<html>", "error: the retriever answered '<html>', which is no JSON"),
        ({"detail": "no"}, 'error: the retriever answered \'{"detail": "no"}\'; expected one list of documents'),
        ([["a"], ["b"]], 'error: the retriever answered \'[["a"], ["b"]]\'; expected one list of documents'),
        ([[{"score": 1}]], "error: the retriever answered a document without contents: '{\"score\": 1}'"),
        ([["x" * 2**24]], "error: the retriever answered more than 16,777,216 bytes"),
    ],
)
def test_other_answers_are_short_errors(answer, text):
    with server(lambda body: answer) as (url, _):
        (result,) = ask(url, "q")
    assert (result.text, result.error) == (text, "raised")


def test_a_server_that_hangs_is_a_timeout():
    release = threading.Event()
    with server(lambda body: release.wait(60) and [["late"]]) as (url, _):
        start = time.perf_counter()
        (result,) = ask(url, "q", timeout=0.2)
        with pytest.raises(TimeoutError, match=r"no answer after 0\.2 s"):  # the tool's own, should nobody watch it
            RetrieveTool(url, 0.2)("q")
        release.set()
    assert (result.text, result.error) == ("error: no answer after 0.2 s", "timeout")
    assert time.perf_counter() - start < 30


def test_calls_run_at_once():
    barrier = threading.Barrier(8, timeout=5)  # nobody is answered before all have asked
    with server(lambda body: [[body["queries"][0] + str(barrier.wait() >= 0)]]) as (url, _):
        results = ask(url, *"abcdefgh")
    assert [result.text for result in results] == [f"{query}True" for query in "abcdefgh"]


def test_one_that_is_not_there_is_an_error_before_the_first_step():
    with server(lambda body: [["a"]]) as (url, _):
        (tool,) = make_tools([url], timeout=5.0)
        assert tool.name == "search"
    with pytest.raises(ValueError, match=r"first query failed: the retriever cannot be reached: .*refused") as caught:
        make_tools([url], timeout=5.0)
    assert str(caught.value).startswith(f"task.tools = {url!r}: ")
    assert ask(url, "q")[0].error == "raised"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_and_is_not_followed(status):
    with server(lambda body: [["elsewhere"]]) as (elsewhere, asked_elsewhere):
        got = []

        class Redirecting(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.send_header("Location", elsewhere)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self):
                got.append(self.path)

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Redirecting)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            (result,) = ask(f"http://127.0.0.1:{http.server_port}/retrieve", "x")
        finally:
            http.shutdown()
            http.server_close()
    assert result.error == "raised"
    assert result.text.startswith(f"error: the retriever answered {status} ")
    assert (asked_elsewhere, got) == ([], [])
