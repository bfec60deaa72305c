"""Ctrl-C, or SIGTERM, that never leaves a step half applied."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, Ctrl-C raises KeyboardInterrupt at once, or, between `hold` and `release`, at `release`. So does
    SIGTERM, which schedulers send a while before they kill.

    Outside the main thread, where Python handles no signals, nothing is installed.
    """

    def __init__(self) -> None:
        self._held = self._pending = False

    def __enter__(self) -> Interrupt:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def hold(self) -> None:
        """From here to `release`, let Ctrl-C wait: weights, counters and logs are being changed together."""
        self._held = True

    def release(self) -> None:
        """Raises the KeyboardInterrupt that came meanwhile."""
        self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    @property
    def pending(self) -> bool:
        """Ctrl-C came after `hold`."""
        return self._pending

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = True
        else:
            raise KeyboardInterrupt
