"""How far a run is: on a terminal one line that changes, elsewhere a line on stderr now and then."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

EVERY_S = 15.0
"""Between two lines where there is no terminal."""


class Progress:
    """Call it with what is being done, and the seconds that are to come in this problem, if known."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=1.0)
        self._start = self._begun = time.monotonic()
        self._subject = self._doing = ""
        self._end_s: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def begin(self, subject: str) -> None:
        self._subject, self._begun = subject, time.monotonic()
        self("making inputs", None)

    def __call__(self, doing: str, to_come_s: float | None) -> None:
        now = time.monotonic()
        self._doing, self._end_s = doing, None if to_come_s is None else now + to_come_s
        done = now - self._begun
        share = 0.0 if to_come_s is None or done + to_come_s == 0 else done / (done + to_come_s)
        self._bar.update(self._task, description=f"{self._subject}: {doing}", completed=share)

    def line(self) -> str:
        now = time.monotonic()
        known = "" if self._end_s is None else f", about {max(0.0, self._end_s - now):.0f} s more for this table"
        return f"aepo bench, {now - self._start:.0f} s: {self._subject}: {self._doing}{known}"

    def _talk(self) -> None:
        while not self._stop.wait(EVERY_S):
            print(self.line(), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        if self._bar.disable:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.stop()
