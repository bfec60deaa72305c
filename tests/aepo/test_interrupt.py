"""Signals: at once where nothing is kept, later everywhere else, and never lost."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from aepo import interrupt as module
from aepo.interrupt import SIGNALS, WAKE, Interrupt, heard_by_main_thread
from aepo.rollout.engines.vllm.loop_thread import LoopThread
from aepo.rollout.sampler import Sampler


@pytest.mark.parametrize("number", SIGNALS)
def test_held_unless_allowed(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        signal.raise_signal(number)
        assert interrupt.came
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt), interrupt.allowed():
            pytest.fail("one that came before is raised at the door")
    assert signal.getsignal(number) is before
    with Interrupt() as interrupt:
        after = False
        with pytest.raises(KeyboardInterrupt), interrupt.allowed():  # noqa: PT012
            signal.raise_signal(number)
            after = True
        assert not after
        signal.raise_signal(number)  # left: held again


def test_sighup_is_one_of_them() -> None:
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} == set(SIGNALS)


def test_a_second_one_does_not_break_the_putting_away_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    put_away = []
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.allowed():  # noqa: PT012
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                clock[0] = 0.99
                signal.raise_signal(signal.SIGINT)
                put_away.append("all")
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert put_away == ["all"]


def test_where_the_putting_away_hangs_another_one_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.allowed():  # noqa: PT012
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        clock[0] = 1.0
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("raised again")


def test_one_that_was_swallowed_is_raised_where_allowed_ends_and_at_the_next_check() -> None:
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.allowed(), contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


def assert_collecting_one_is_interrupted(kind: Callable[[], object]) -> None:
    """Whose destructor drops the signal that it raises: the wait behind it ends all the same."""
    begin = time.monotonic()
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.allowed():  # noqa: PT012
        made = kind()
        del made
        time.sleep(LONG)
    assert time.monotonic() - begin < PROMPT


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", SIGNALS)
def test_one_that_came_during_a_destructor_comes_again(number: signal.Signals) -> None:
    """Python drops what is raised there, and a rollout would go on for minutes."""

    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(number)
            gone.append(True)

    gone: list[bool] = []
    assert_collecting_one_is_interrupted(Dropped)
    assert not gone, "it was raised there"


def test_one_that_c_code_drops_comes_again() -> None:
    """Without a word of Python's: an `io` object's `close` when it is collected, a key's `__eq__`."""

    class Closes(io.RawIOBase):
        def close(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            super().close()

    assert_collecting_one_is_interrupted(Closes)


def test_one_that_is_being_handled_does_not_come_again() -> None:
    """However long that takes: engines are closed there, and files written."""
    done = []
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.allowed():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            time.sleep(4 * module.AGAIN)
            done.append("all")
    assert done == ["all"]


def test_one_that_is_being_handled_elsewhere_does_not_come_again() -> None:
    """In other tasks of an event loop, in contexts around it, after another error of the handler's own."""
    done = []

    def put_away(where: str) -> None:
        time.sleep(4 * module.AGAIN)
        done.append(where)

    @contextlib.contextmanager
    def engine() -> Iterator[None]:
        try:
            yield
        finally:
            put_away("of a context")

    async def rollout() -> None:
        async def tool() -> None:
            try:
                await asyncio.sleep(LONG)
            finally:
                put_away("of another task")

        running = asyncio.create_task(tool())
        await asyncio.sleep(0)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            put_away("of the task")
            del running

    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.allowed(), engine():  # noqa: PT012
        try:
            asyncio.run(rollout())
        except KeyboardInterrupt:
            with contextlib.suppress(ValueError):
                raise ValueError from None
            put_away("of a handler")
            raise
    assert done == ["of the task", "of another task", "of a handler", "of a context"]


def test_an_error_that_a_signal_was_made_into_ends_as_the_signal() -> None:
    """As in an import, which says then that a module is broken."""
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt) as caught, interrupt.allowed():  # noqa: PT012
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise ImportError("broken")
        assert isinstance(caught.value.__cause__, ImportError)
    with Interrupt() as interrupt, pytest.raises(ImportError), interrupt.allowed():
        raise ImportError("broken")


def test_a_signal_to_a_forked_child_is_not_ours() -> None:
    with Interrupt() as interrupt, interrupt.allowed():
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(3 * module.AGAIN)
        assert not interrupt.came


def test_an_interrupt_that_cannot_be_entered_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    def fails() -> None:
        raise OSError("Too many open files")

    monkeypatch.setattr(module.os, "pipe", fails)
    with pytest.raises(OSError, match="Too many"), Interrupt():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert Interrupt._innermost is None


def test_somebody_elses_handler_of_what_wakes_hears_it_too() -> None:
    heard: list[int] = []
    before = signal.signal(WAKE, lambda number, frame: heard.append(number))
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(WAKE)
            assert heard == [WAKE]
            assert not interrupt.came
    finally:
        signal.signal(WAKE, before)


def test_one_inside_of_another_has_what_came_to_it_and_hands_out_what_comes() -> None:
    with Interrupt() as outer:
        signal.raise_signal(signal.SIGTERM)
        with Interrupt() as inner:
            assert inner.came
            with pytest.raises(KeyboardInterrupt):
                inner.check()
    with Interrupt() as outer:
        with Interrupt() as inner:
            assert not inner.came, "that of another time"
            signal.raise_signal(signal.SIGTERM)
        assert outer.came
        with pytest.raises(KeyboardInterrupt), outer.allowed():
            pytest.fail("raised at the door")
    with Interrupt() as after:
        assert not after.came


def test_hold_inside_of_allowed() -> None:
    with Interrupt() as interrupt, interrupt.allowed():
        interrupt.hold()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.came


def test_what_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt, interrupt.allowed():
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.came
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_installs_nothing() -> None:
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def work() -> None:
        with Interrupt() as interrupt, interrupt.allowed():
            seen.append([signal.getsignal(number) for number in SIGNALS])
        seen.append(interrupt.came)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, False]


LONG = 20.0  # seconds that the main thread waits if it hears nothing
PROMPT = 5.0  # seconds in which it must hear it, on a busy machine


@contextlib.contextmanager
def received_by_another_thread(number: int) -> Iterator[None]:
    """As happens where that one unblocks signals when this one is about to be woken. KeyboardInterrupt, promptly."""
    sent: list[float] = []

    def work() -> None:
        time.sleep(0.3)  # until the main thread waits
        sent.append(time.monotonic())
        signal.pthread_kill(threading.get_ident(), number)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
        assert time.monotonic() - sent[0] < PROMPT
    finally:
        thread.join()


def a_process() -> None:
    with subprocess.Popen(["sleep", str(LONG)]) as process:
        try:
            process.wait()
        finally:
            process.kill()


WAITS: dict[str, Callable[[], object]] = {
    "lock": lambda: threading.Event().wait(LONG),
    "event loop": lambda: asyncio.run(asyncio.sleep(LONG)),
    "process": a_process,
    "sleep": lambda: time.sleep(LONG),
}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_one_that_another_thread_received_is_heard(wait: Callable[[], object], number: signal.Signals) -> None:
    with Interrupt() as interrupt, received_by_another_thread(number), interrupt.allowed():
        wait()


def test_one_that_another_thread_received_is_heard_by_an_engine_and_a_rollout_of_ones_own() -> None:
    """Without `Interrupt`, as where somebody calls them from a script."""
    loop = LoopThread()
    with received_by_another_thread(signal.SIGINT):
        loop.run(asyncio.sleep(LONG))
    loop.close()

    class Endless(Sampler):
        async def rollout_async(self, *asked: object, **more: object) -> list:  # type: ignore[override,type-arg]
            await asyncio.sleep(LONG)
            return []

    with received_by_another_thread(signal.SIGINT):
        Endless(None, None, None).rollout([], 0)  # type: ignore[arg-type]


def test_what_hears_them_is_put_away() -> None:
    before, threads = signal.getsignal(WAKE), threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with Interrupt(), heard_by_main_thread(), Interrupt([signal.SIGINT]):
            assert threading.active_count() == threads + 1, "one for all of them"
        assert signal.set_wakeup_fd(-1) == -1
        assert signal.getsignal(WAKE) is before
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) == files


def test_somebody_elses_wakeup_descriptor_stays() -> None:
    received, arrives = os.pipe()
    os.set_blocking(arrives, False)
    signal.set_wakeup_fd(arrives)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.came
            assert os.read(received, 1) == bytes([signal.SIGTERM])
            with pytest.raises(KeyboardInterrupt), interrupt.allowed():
                pytest.fail("raised at the door")
        with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.allowed():  # noqa: PT012
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            time.sleep(LONG)  # also without a descriptor of ours it comes again
    finally:
        assert signal.set_wakeup_fd(-1) == arrives
        os.close(received)
        os.close(arrives)
