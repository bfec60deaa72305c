"""Ctrl-C, SIGTERM and SIGHUP, which never leave a step, a record or a checkpoint half done."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE = 1.0  # seconds after a KeyboardInterrupt for what it ends to be put away, before another signal raises again
# Sent to the main thread to end what it waits for; ignored by default, so harmless where it comes too late.
WAKE = getattr(signal, "SIGURG", None)
AGAIN = 0.25  # seconds until a signal that came to nothing is raised again

_pipe: int | None = None  # to the thread that wakes the main thread


@contextlib.contextmanager
def heard_by_main_thread() -> Iterator[None]:
    """While entered, a signal ends what the main thread waits for, whichever thread received it.

    Python handles signals in the main thread, which sleeps on if the kernel gives one to another thread: to one that
    unblocks signals just then, as each start of a thread or process does. Ctrl-C while two vLLM engines started on a
    busy machine was not heard for 40 to 70 s, until they had started, 7 times in 24 (2-core Zen 4). In another thread,
    where nothing can be installed, and inside of another of these nothing is done. A wakeup descriptor of somebody else
    stays; his loop is woken then.
    """
    global _pipe
    if WAKE is None or _pipe is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    received, arrives = os.pipe()
    os.set_blocking(arrives, False)
    thread = threading.Thread(target=_wake_main_thread, args=(received, WAKE), name="aepo-signals", daemon=True)
    before, handler = -1, signal.getsignal(WAKE)
    try:
        thread.start()
        # Also where nothing is to be done: a signal without a handler in Python interrupts nothing.
        signal.signal(WAKE, functools.partial(_on_wake, handler))
        before = signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
        _pipe = arrives
        yield
    finally:
        _pipe = None
        if before == -1:
            signal.set_wakeup_fd(-1)
        if handler is not None:  # one that was not installed from Python
            signal.signal(WAKE, handler)
        os.close(arrives)  # ends the thread
        thread.join()


def _wake_main_thread(received: int, wake: int) -> None:
    """Until the other end of the pipe is closed: once for each signal, and again and again while one that came is still
    to be raised."""
    main = threading.main_thread().ident or 0
    with open(received, "rb", buffering=0) as pipe:
        while byte := pipe.read(1):
            if byte[0] != wake:
                signal.pthread_kill(main, wake)
            while Interrupt.is_due() and not select.select([pipe], [], [], AGAIN)[0]:
                signal.pthread_kill(main, wake)


def _on_wake(handler: Any, number: int, frame: FrameType | None) -> None:
    if callable(handler):
        handler(number, frame)
    Interrupt.raise_again()


class Interrupt:
    """While entered, a signal is noted, and raised as KeyboardInterrupt where that can do no harm.

    That is at once inside `allowed` (waiting for engines, tools and rewards, which may take for ever), and at `check`.
    Everywhere else, while weights, counters and files change together, it waits for the next of these. One that was
    swallowed is raised again: Python drops what is raised inside `__del__` and the like, 1 of 10 signals to a run that
    was starting. What came inside of another `Interrupt` came there, too. A signal that the process ignores (nohup)
    stays ignored. Outside the main thread, where Python handles no signals, nothing is installed.
    """

    _innermost: Interrupt | None = None  # of those that are entered

    def __init__(self, signals: Collection[signal.Signals] = SIGNALS) -> None:
        self._signals = signals
        self._came = self._allowed = False
        self._raised = -math.inf

    def __enter__(self) -> Interrupt:
        with contextlib.ExitStack() as entered:
            if threading.current_thread() is threading.main_thread():
                self._outer = Interrupt._innermost
                self._came = self._outer is not None and self._outer.came
                entered.callback(self._leave)
                Interrupt._innermost = self
                for number in self._signals:
                    if signal.getsignal(number) not in (signal.SIG_IGN, None):
                        entered.callback(signal.signal, number, signal.signal(number, self._on_signal))
            entered.enter_context(heard_by_main_thread())
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def _leave(self) -> None:
        Interrupt._innermost = self._outer
        if self._outer is not None:
            self._outer._came |= self._came

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """For a block in which nothing changes that is kept. KeyboardInterrupt: a signal came, or had come, whatever
        error the block made of it."""
        self._allowed = True
        try:
            self.check()
            yield
            if self._allowed:
                self.check()
        except Exception as error:
            if self._allowed and self._came:
                raise KeyboardInterrupt from error
            raise
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

    @classmethod
    def is_due(cls) -> bool:
        """Whether a signal came and may be raised. In any thread."""
        inner = cls._innermost
        return inner is not None and inner._came and inner._allowed

    @classmethod
    def raise_again(cls) -> None:
        """A signal that came and that was swallowed. Not one that is being handled: `finally` and `except` are left in
        peace, however long they take."""
        error = sys.exc_info()[1]
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__context__
        inner, now = cls._innermost, time.monotonic()
        if error is None and inner is not None and cls.is_due() and now - inner._raised >= AGAIN:
            inner._raised = now
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        if _pipe is not None:
            with contextlib.suppress(OSError):  # full of signals
                os.write(_pipe, bytes([number]))
        now = time.monotonic()
        if self._allowed and now - self._raised >= PATIENCE:
            self._raised = now
            raise KeyboardInterrupt
