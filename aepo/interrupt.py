"""Ctrl-C, SIGTERM and SIGHUP, which never leave a step, a record or a checkpoint half done."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from types import FrameType, TracebackType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 1.0  # seconds after a KeyboardInterrupt for what it ends to be put away, before another signal raises again
# Sent to the main thread to end what it waits for; ignored by default, so harmless where it comes too late.
WAKE = getattr(signal, "SIGURG", None)


@contextlib.contextmanager
def heard_by_main_thread() -> Iterator[None]:
    """While entered, a signal ends what the main thread waits for, whichever thread received it.

    Python handles signals in the main thread, which sleeps on if the kernel gives one to another thread: to one that
    unblocks signals just then, as each start of a thread or process does. Ctrl-C while two vLLM engines started on a
    busy machine was not heard for 40 to 70 s, until they had started, 7 times in 24 (2-core Zen 4). In another thread,
    where nothing can be installed, and where a wakeup descriptor is set already, also by this, nothing is done.
    """
    if WAKE is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    received, arrives = os.pipe()
    os.set_blocking(arrives, False)
    before = signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        os.close(arrives)
        os.close(received)
        yield
        return
    handler = signal.signal(WAKE, lambda *_: None)  # a signal without a handler in Python interrupts nothing
    thread = threading.Thread(target=_wake_main_thread, args=(received, WAKE), name="aepo-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(arrives)
        thread.join()
        if handler is not None:  # one that was not installed from Python
            signal.signal(WAKE, handler)


def _wake_main_thread(received: int, wake: int) -> None:
    """Until the other end of the pipe is closed."""
    with open(received, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] != wake:
                signal.pthread_kill(threading.main_thread().ident or 0, wake)


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
        self._entered = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._entered.callback(signal.signal, number, signal.signal(number, self._on_signal))
        self._entered.enter_context(heard_by_main_thread())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

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
