"""Signals: at once where nothing is kept, later everywhere else, and never lost."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from aepo import interrupt as module
from aepo.interrupt import SIGNALS, Interrupt


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


def test_one_that_was_swallowed_is_raised_at_the_next_check() -> None:
    with Interrupt() as interrupt:
        with interrupt.allowed(), contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


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
