"""A trainer in a process of its own: it proves itself on a small shape, then updates on demand.

Its peak of memory is then its own, and trainers can take turns. All such processes are forks of one that has imported
TRL, which takes 10 s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from types import TracebackType

import torch

from aepo.bench.clock import forget_peak, resident
from aepo.bench.load import LoadMeter
from aepo.bench.trainer_rows import Cell, Competitor, gradient_error, make_paths, true_gradients

SMALL = Cell(questions=2, vocab=1000, hidden=64, layers=2, prompt=8, written=4, read=6, turns=3)
"""Two micro-batches by which gradients are checked."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """The trainer has made its gradient of SMALL."""

    gradient_error: float
    """Relative to float64 truth, of the worst parameter."""


@dataclasses.dataclass(frozen=True)
class Update:
    """One is done."""

    seconds: float
    cpu_seconds: float
    """Of all its threads; other programs on the machine change it less than the time."""
    peak_bytes: int | None
    """Of the resident set, above that of the process before there was a model; None where the system does not tell."""
    others_cores: float | None
    """Kept busy by other programs meanwhile."""


@dataclasses.dataclass(frozen=True)
class Failed:
    reason: str


Message = Ready | Update | Failed


class TrainerProcess:
    """`ready()` once, then `update()` as often as wanted. RuntimeError: the trainer failed, or its process is gone."""

    def __init__(self, competitor: Competitor, cell: Cell, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["aepo.bench.trainer_steps"])
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, competitor, cell, threads), daemon=True)
        self._process.start()
        there.close()

    def ready(self) -> Ready:
        message = self._receive()
        assert isinstance(message, Ready)
        return message

    def update(self) -> Update:
        with contextlib.suppress(BrokenPipeError):  # said below
            self._here.send(True)
        message = self._receive()
        assert isinstance(message, Update)
        return message

    def _receive(self) -> Message:
        try:
            message: Message = self._here.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(message, Failed):
            raise RuntimeError(message.reason)
        return message

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()


class _Meter:
    """Updates when the other end asks for one, and sends what it took."""

    def __init__(self, connection: Connection, before: int | None) -> None:
        self._connection, self._before = connection, before

    def wanted(self) -> bool:
        return bool(self._connection.recv())

    def begin(self) -> None:
        forget_peak()
        self._load, self._cpu, self._start = LoadMeter(), time.process_time(), time.perf_counter()

    def end(self) -> None:
        seconds, cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu
        peak = None if self._before is None else resident("VmHWM") - self._before
        self._connection.send(Update(seconds, cpu_seconds, peak, self._load.others_cores()))


def _serve(connection: Connection, competitor: Competitor, cell: Cell, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end, which ends this one
    torch.set_num_threads(1)  # SMALL is too small for more; on a loaded machine two took a minute for it
    warnings.simplefilter("ignore")  # of TRL's, about versions of what is not used here
    try:
        from aepo.bench.trainer_steps import TRAINERS

        connection.send(Ready(checked(competitor)))
        torch.set_num_threads(threads)
        before = forget_peak()  # with all that an update loads
        TRAINERS[competitor](cell, cell.model(), _Meter(connection, before))
    except EOFError:  # nobody asks any more
        return
    except Exception as failure:
        traceback.print_exc()
        message = (str(failure).strip().splitlines() or [""])[0][:200]
        connection.send(Failed(f"{type(failure).__name__}: {message}"))


def checked(competitor: Competitor) -> float:
    """Error of the gradient of SMALL."""
    from aepo.bench.trainer_steps import TRAINERS, OneUpdate

    model = SMALL.model()
    truth = true_gradients(model, make_paths(SMALL), competitor.objective)
    meter = OneUpdate(model)
    TRAINERS[competitor](SMALL, model, meter)
    return gradient_error(meter.gradients, truth)
