"""One fault: what happens, and where. Its text names it, and repeats it.

one/SIGINT@trainer.py:120#2             a signal at a place (places.py), when it is reached for the second time
one/SIGINT,SIGTERM+3@trainer.py:120#2   another one three places later; SIGTERM*10: ten of them, a place apart
one/SIGKILL@write:metrics.jsonl#1       the process is gone before it writes (writes.py)
one/ENOSPC@fsync:checkpoints#1          an operation on a file fails; ENOSPC..: and all later ones
one/MemoryError@step#2                  a call fails (CALLS) when it has done half of its work; nan: it makes NaNs
one/tmpfs=200@disk#1                    a file system of 200 KiB; limit=200: no file longer than that
one/full@stdout#1, one/closed@stdout#1  /dev/full, or a pipe that nobody reads
one/--resume@trainer.py:120#2           a second process on the directory, while the first one waits at the place
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import places
import torch
import writes

import aepo.trainer
from aepo.evaluation import Evaluator
from aepo.rollout.sampler import Sampler
from aepo.scoring import Scorer

CALLS = ("rollout", "reward", "backward", "clip", "step", "refresh", "evaluation")
ERRORS = ("MemoryError", "RuntimeError", "OutOfMemoryError")


@dataclass(frozen=True)
class Fault:
    scenario: str
    what: str
    where: str

    @classmethod
    def read(cls, text: str) -> Fault:
        scenario, _, rest = text.partition("/")
        what, _, where = rest.partition("@")
        return cls(scenario, what, where)

    def __str__(self) -> str:
        return f"{self.scenario}/{self.what}@{self.where}"

    @property
    def kind(self) -> str:
        """For the table, and for what is to be expected."""
        if self.what == "SIGKILL":
            return "kill -9"
        if self.what.startswith("SIG"):
            return "one signal" if self.what.isalnum() else "several signals"
        if self.what.startswith("--"):
            return "two processes"
        if self.where.startswith("disk"):
            return "full disk"
        if self.where.startswith("stdout"):
            return "output"
        if self.what.startswith("E"):
            return "failing writes, from then on" if self.persistent else "failing write"
        return "error in a call"

    @property
    def persistent(self) -> bool:
        return self.what.endswith("..")

    @property
    def signals(self) -> list[int]:
        names, _, _ = self.what.partition("+")
        name, _, times = names.partition("*")
        return [getattr(signal, one) for one in name.split(",")] * int(times or 1)

    @property
    def gap(self) -> int:
        return int(self.what.partition("+")[2] or 1)


class Injector:
    """Sets a fault up in the process that it is meant for. `tell` is called once, when it happens."""

    def __init__(
        self, fault: Fault, directory: Path, tell: Callable[[], None], on_any_place: Callable[[], None]
    ) -> None:
        self.fault, self.directory, self.tell, self.on_any_place = fault, directory, tell, on_any_place
        self.counts: Counter[str] = Counter()
        self.pending: list[int] = []  # signals that are still to come
        self.until_next = 0
        self.broken = self.ours = False

    def __call__(self) -> None:
        fault = self.fault
        places.on_place = self.place
        writes.watch(self.directory, self.write)
        if fault.kind in ("full disk", "output"):
            self.tell()
        if fault.what.startswith("limit="):
            size = int(fault.what.partition("=")[2]) << 10
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif fault.what == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        elif fault.what == "closed":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
        elif fault.kind == "error in a call":
            wrap_call(fault.where.partition("#")[0], self.call)

    def reached(self, where: str) -> bool:
        self.counts[where] += 1
        return f"{where}#{self.counts[where]}" == self.fault.where

    def place(self, place: str) -> None:
        self.ours = True
        self.on_any_place()
        self.ours = False
        if self.pending:
            self.until_next -= 1
            if self.until_next <= 0:
                self.until_next = self.fault.gap
                signal.raise_signal(self.pending.pop(0))
        if self.reached(place):
            self.happen(place)

    def write(self, operation: str, path: Path) -> None:
        if self.ours:
            return
        where = f"{operation}:{name_of(path, self.directory)}"
        if self.broken and operation not in ("os.remove", "os.rmdir"):  # a full disk lets go
            raise self.error(path)
        if self.reached(where):
            self.happen(path)

    def happen(self, where: str | Path) -> None:
        self.tell()
        if self.fault.what.startswith("SIG"):
            first, *self.pending = self.fault.signals
            self.until_next = self.fault.gap
            (os.kill(os.getpid(), first) if first == signal.SIGKILL else signal.raise_signal(first))
        elif self.fault.what.startswith("E"):
            self.broken = self.fault.persistent
            raise self.error(Path(where))

    def error(self, path: Path) -> OSError:
        number = getattr(errno, self.fault.what.removesuffix(".."))
        return OSError(number, os.strerror(number), str(path))

    def call(self, name: str, half: Callable[[], Any], whole: Callable[[], Any]) -> Any:
        if not self.reached(name):
            return whole()
        self.tell()
        if self.fault.what == "nan":
            return _with_nan(name, whole)
        half()
        kind = torch.OutOfMemoryError if self.fault.what == "OutOfMemoryError" else getattr(builtins, self.fault.what)
        raise kind(f"{name} failed on purpose")


def name_of(path: Path, directory: Path) -> str:
    """The same in every run."""
    relative = path.relative_to(directory.resolve()) if path != directory.resolve() else Path("RUN")
    return "tensorboard/events" if relative.parts[:1] == ("tensorboard",) and len(relative.parts) > 1 else str(relative)


def wrap_call(name: str, call: Callable[[str, Callable[[], Any], Callable[[], Any]], Any]) -> None:
    """Let `call(name, half, whole)` stand for every call of that name."""

    def wrap(owner: Any, attribute: str, half: Callable[..., Any] | None = None) -> None:
        inner = getattr(owner, attribute)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            def part() -> None:
                (half or inner)(*arguments, **options)

            return call(name, part, lambda: inner(*arguments, **options))

        setattr(owner, attribute, wrapped)

    def half_step(optimizer: torch.optim.Optimizer) -> None:
        groups = [list(group["params"]) for group in optimizer.param_groups]
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters[: len(parameters) // 2]
        step(optimizer)
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters

    step = torch.optim.AdamW.step
    if name == "refresh":
        make_engine = aepo.trainer.make_engine

        def made(*arguments: Any, **options: Any) -> Any:
            engine = make_engine(*arguments, **options)
            wrap(engine, "refresh")
            return engine

        aepo.trainer.make_engine = made
        return
    owner, attribute, half = {
        "rollout": (Sampler, "rollout", None),
        "reward": (Scorer, "score", None),
        "backward": (torch.Tensor, "backward", None),
        "clip": (torch.nn.utils, "clip_grad_norm_", None),
        "step": (torch.optim.AdamW, "step", half_step),
        "evaluation": (Evaluator, "answers", None),
    }[name]
    wrap(owner, attribute, half)


def _with_nan(name: str, whole: Callable[[], Any]) -> Any:
    """After AdamW's step, or in a gradient before it is clipped."""
    import gc

    result = whole()
    for optimizer in [one for one in gc.get_objects() if isinstance(one, torch.optim.AdamW)]:
        parameter = optimizer.param_groups[0]["params"][-1]
        tensor = parameter if name == "step" else parameter.grad
        with torch.no_grad():
            tensor.view(-1)[0] = torch.nan
    return result


def mount_small_disk(directory: Path, kib: int) -> None:
    """For this process and its children. OSError where the machine does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(0x10000000 | 0x00020000))  # CLONE_NEWUSER, CLONE_NEWNS
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    check(libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, f"size={kib}k".encode()))


def grow_disk(directory: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(directory), b"tmpfs", 32, b"size=64m"):  # MS_REMOUNT
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
