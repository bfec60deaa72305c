"""Ctrl-C, SIGTERM and SIGHUP, which never leave a step, a record or a checkpoint half done."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from types import FrameType, TracebackType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 1.0  # seconds after a KeyboardInterrupt for what it ends to be put away, before another signal raises again
# Sent to the main thread to end what it waits for; ignored by default, so harmless where it comes too late.
WAKE = getattr(signal, "SIGURG", None)
AGAIN = 0.05  # seconds until a signal that Python dropped comes again
_DROPPED = 128  # is added to the number of such a signal

_pipe: int | None = None  # to the thread that wakes the main thread


@contextlib.contextmanager
def heard_by_main_thread() -> Iterator[None]:
    """While entered, a signal ends what the main thread waits for, whichever thread received it.

    Python handles signals in the main thread, which sleeps on if the kernel gives one to another thread: to one that
    unblocks signals just then, as each start of a thread or process does. Ctrl-C while two vLLM engines started on a
    busy machine was not heard for 40 to 70 s, until they had started, 7 times in 24 (2-core Zen 4). In another thread,
    where nothing can be installed, and where a wakeup descriptor is set already, also by this, nothing is done.
    """
    global _pipe
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
    _pipe = arrives
    try:
        yield
    finally:
        _pipe = None
        signal.set_wakeup_fd(-1)
        os.close(arrives)
        thread.join()
        if handler is not None:  # one that was not installed from Python
            signal.signal(WAKE, handler)


def _wake_main_thread(received: int, wake: int) -> None:
    """Until the other end of the pipe is closed."""
    main = threading.main_thread().ident or 0
    with open(received, "rb", buffering=0) as pipe:
        while byte := pipe.read(1):
            if byte[0] > _DROPPED:
                time.sleep(AGAIN)
                signal.pthread_kill(main, byte[0] - _DROPPED)
            elif byte[0] != wake:
                signal.pthread_kill(main, wake)


class Interrupt:
    """While entered, a signal is noted, and raised as KeyboardInterrupt where that can do no harm.

    That is at once inside `allowed` (waiting for engines, tools and rewards, which may take for ever), and at `check`.
    Everywhere else, while weights, counters and files change together, it waits for the next of these. One that was
    swallowed is raised again, at the latest where `allowed` ends; what came inside of another `Interrupt` came there,
    too. A signal that the process ignores (nohup) stays ignored. Outside the main thread, where Python handles no
    signals, nothing is installed.
    """

    _innermost: Interrupt | None = None  # of those that are entered

    def __init__(self, signals: Collection[signal.Signals] = SIGNALS) -> None:
        self._signals = signals
        self._came = self._allowed = False
        self._raised, self._number = -math.inf, 0

    def __enter__(self) -> Interrupt:
        self._entered = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            self._outer, self._hook = Interrupt._innermost, sys.unraisablehook
            self._came = self._outer is not None and self._outer.came
            self._entered.callback(self._leave)
            Interrupt._innermost, sys.unraisablehook = self, self._on_unraisable
            for number in self._signals:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._entered.callback(signal.signal, number, signal.signal(number, self._on_signal))
        self._entered.enter_context(heard_by_main_thread())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def _leave(self) -> None:
        Interrupt._innermost, sys.unraisablehook = self._outer, self._hook
        if self._outer is not None:
            self._outer._came |= self._came

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """For a block in which nothing changes that is kept. KeyboardInterrupt: a signal came, or had come."""
        self._allowed = True
        try:
            self.check()
            yield
            if self._allowed:
                self.check()
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
            self._raised, self._number = now, number
            raise KeyboardInterrupt

    def _on_unraisable(self, dropped: sys.UnraisableHookArgs) -> None:
        """Python drops what is raised inside `__del__` and the like, 1 of 10 signals to a run that was starting: it
        comes again when that is over."""
        if dropped.exc_type is KeyboardInterrupt and self._number and _pipe is not None:
            self._raised = -math.inf
            os.write(_pipe, bytes([_DROPPED + self._number]))
        else:
            self._hook(dropped)
