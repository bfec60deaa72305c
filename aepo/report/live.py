"""The page while a run goes on: a server on this machine that makes it anew when a file of a run has changed.

The page asks every two seconds (templates/live.js); as long as nothing has changed, the answer is 304 and costs a look
at the files' times. Nothing but the page can be asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from aepo.report.page import encoded, named_runs, render
from aepo.report.reader import NothingYet, read_run
from aepo.run.lock import is_held

HERE = ("127.0.0.1", "localhost")
FILES = ("run.json", "config.yaml", "metrics.jsonl", "evals.jsonl", "trees/step_*.json", "answers/step_*.jsonl")
WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<meta name="color-scheme" content="light dark"><title>waiting</title><p>Nothing to report yet: no step and no evaluation
has finished. This page looks again every two seconds.</p></html>"""


def serve_report(runs: Sequence[Path], port: int = 8765) -> None:
    """Serve the page at http://127.0.0.1:PORT, which follows the run directories, until a KeyboardInterrupt.

    port 0: any free one. ValueError: as `write_report`, but a run may have nothing to show yet; or the port is taken.
    """
    with make_server(runs, port) as server:
        print(f"live report: http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


class LiveReport:
    """The newest page about some runs."""

    def __init__(self, runs: Sequence[Path]) -> None:
        """ValueError: one of them is not a run directory."""
        self._runs = named_runs(runs)
        self._lock = threading.Lock()  # two readers, one page
        self._tag, self._page = "", b""
        self.page()

    def tag(self) -> str:
        """Changes when a file of a run does; as an ETag, in quotes."""
        files = [file for run in self._runs.values() for pattern in FILES for file in sorted(run.glob(pattern))]
        held = [is_held(run) for run in self._runs.values()]  # which changes no file when a run is killed
        state = repr([held, [(str(file), *_state(file)) for file in files]])
        return f'"{hashlib.sha256(state.encode()).hexdigest()[:16]}"'

    def page(self) -> tuple[str, bytes]:
        """The page, and the tag of the files that it was made of."""
        with self._lock:
            tag = self.tag()
            if tag != self._tag:
                try:
                    page = render([read_run(path, name) for name, path in self._runs.items()], live=tag)
                except NothingYet:
                    page = WAITING
                self._tag, self._page = tag, encoded(page)
            return self._tag, self._page


def make_server(runs: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Listens at once, answers while `serve_forever` runs. ValueError: not a run, or the port cannot be had."""
    report = LiveReport(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in HERE:  # another site that was made to point here
                self._answer(403, f"expected to be asked as one of {', '.join(HERE)}".encode(), "text/plain")
            elif self.path != "/":
                self._answer(404, b"only / is here", "text/plain")
            elif self.headers.get("If-None-Match") == report.tag():
                self._answer(304)
            else:
                self._newest()

        def _newest(self) -> None:
            try:
                tag, page = report.page()
            except Exception as error:  # whatever happens to the files, the page says it and asks again
                self._answer(503, encoded(f"{type(error).__name__}: {error}"), "text/plain")
            else:
                self._answer(200, page, "text/html", tag)

        def _answer(self, status: int, body: bytes = b"", kind: str = "", tag: str = "") -> None:
            self.send_response(status)
            if status != 304:
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
            if tag:
                self.send_header("ETag", tag)
            self.send_header("Cache-Control", "no-store")
            with contextlib.suppress(ConnectionError):  # a page that was closed
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """One line every two seconds would be no help."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"port = {port}: expected a free port (0: any): {error}") from None


def _state(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except FileNotFoundError:  # replaced or deleted between two looks
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)
