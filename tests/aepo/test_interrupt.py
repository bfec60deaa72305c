"""Signals: at once where nothing is kept, later everywhere else, and never lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from aepo import interrupt as module
from aepo.interrupt import SIGNALS, WAKE, Interrupt, heard_by_main_thread
from aepo.rollout.engines.vllm import LoopThread
from aepo.rollout.sampler import Sampler


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """All of them, also where whoever runs the tests ignores one (nohup)."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


@pytest.mark.parametrize("number", SIGNALS)
def test_one_that_came_during_a_destructor_comes_again(number: signal.Signals) -> None:
    """Python drops what is raised there, and a rollout would go on for minutes."""

    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(number)
            gone.append(True)

    gone: list[bool] = []
    begin = time.monotonic()
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt), interrupt.allowed():  # noqa: PT012
        made = Dropped()
        del made
        time.sleep(LONG)
    assert time.monotonic() - begin < PROMPT
    assert not gone, "it was raised there"


def test_another_error_of_a_destructor_is_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_value))
    hook = sys.unraisablehook

    class Broken:
        def __del__(self) -> None:
            raise ValueError("no")

    with Interrupt(), Interrupt():
        made = Broken()
        del made
    assert [str(one) for one in told] == ["no"]
    assert sys.unraisablehook is hook


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
    finally:
        assert signal.set_wakeup_fd(-1) == arrives
        os.close(received)
        os.close(arrives)
