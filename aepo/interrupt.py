"""Ctrl-C, SIGTERM and SIGHUP, which never leave a step, a record or a checkpoint half done."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Collection, Iterator
from types import FrameType, TracebackType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 1.0  # seconds after a KeyboardInterrupt for what it ends to be put away, before another signal raises again


class Interrupt:
    """While entered, a signal is noted, and raised as KeyboardInterrupt where that can do no harm.

    That is at once inside `allowed` (waiting for engines, tools and rewards, which may take for ever), and at `check`.
    Everywhere else, while weights, counters and files change together, it waits for the next of these. A signal that
    the process ignores (nohup) stays ignored. Outside the main thread, where Python handles no signals, nothing is
    installed.
    """

    def __init__(self, signals: Collection[signal.Signals] = SIGNALS) -> None:
        self._signals = signals
        self._came = self._allowed = False
        self._raised = -math.inf

    def __enter__(self) -> Interrupt:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """For a block in which nothing changes that is kept. KeyboardInterrupt: a signal came, or had come."""
        self._allowed = True
        try:
            self.check()
            yield
        finally:
            self._allowed = False

    def hold(self) -> None:
        """Also in what remains of an `allowed`: it is being left, and what comes now cannot be interrupted."""
        self._allowed = False

    def check(self) -> None:
        """Raise the KeyboardInterrupt of a signal that came."""
        if self._came:
            raise KeyboardInterrupt

    @property
    def came(self) -> bool:
        return self._came

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        now = time.monotonic()
        if self._allowed and now - self._raised >= PATIENCE:
            self._raised = now
            raise KeyboardInterrupt
