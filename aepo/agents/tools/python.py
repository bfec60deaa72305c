"""The Python tool: runs code that a model wrote, in a sandbox, like a cell of a notebook.

The code can compute with the standard library and print; it cannot open files, use the network, start or signal
processes, or see anything of the run or of another call. How: `zygote.py` (a fork per call) and `seccomp.py` (the
system calls it may use). Needs Linux on x86-64 or aarch64, and no privilege, no namespace, no container.

A call takes 2.7 ms; a fresh interpreter would take 49 ms (2-core AVX-512 Xeon (Sapphire Rapids class) VM,
`pytest tests/aepo/test_tools_python.py -k speed -s`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aepo.agents.protocol import ToolError
from aepo.agents.tools.seccomp import filter_program
from aepo.agents.tools.zygote import ENDED, REQUEST, UNCONFINED

START_SECONDS = 60.0  # to load the standard library, on a machine that is busy with other things
KILL_SECONDS = 2.0  # from the order to kill a call until the word that it has ended

# Tried once in each new sandbox: the guarantees are checked, not assumed. Prints what it should not be able to do.
PROBE = """
import os, socket
for name, attempt in {
    "open files": lambda: os.listdir("/"),
    "use the network": lambda: socket.socket(),
    "signal processes": lambda: os.kill(os.getppid(), 0),
}.items():
    try:
        attempt()
        print(name)
    except PermissionError:
        pass
"""


class SandboxError(RuntimeError):
    """The sandbox cannot be had on this machine; the message says why."""


class _ZygoteDied(SandboxError):
    """The zygote of this call is gone, and its calls with it."""

    def __init__(self) -> None:
        super().__init__("the sandbox was killed from outside, twice in a row")


class PythonTool:
    """Runs `code` as a Python program and returns what it printed.

    If the last statement is an expression, its value is printed too. A program that fails raises `ToolError`: what was
    printed, and the end of the traceback or the message of sys.exit. Too much time raises `TimeoutError`. Calls may
    come from several threads at once, and share nothing: each is a process of its own, started from the same state,
    with the same random seed and string hashes, so that equal code gives equal text.

    cpu_seconds, wall_seconds: limits of one call. The first does not depend on how busy the machine is.
    memory_mib: memory of one call, the interpreter's own 30 MiB included (of its address space).
    max_output_chars: more output than this ends the call, and so much of it comes back with a mark.

    Raises `SandboxError` where a guarantee is missing (`sandbox_problem` tells without raising): there is no weaker
    mode. `close` ends every process of the tool; the end of this process, however it comes, does too.
    """

    name = "python"
    description = (
        "Run a Python program with the standard library, like a cell of a notebook: returns what it prints, and the "
        "value of the last expression. Every call starts afresh. No files, no network."
    )
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The program."}},
        "required": ["code"],
    }

    def __init__(
        self,
        *,
        cpu_seconds: int = 2,
        wall_seconds: float = 6.0,
        memory_mib: int = 256,
        max_output_chars: int = 10_000,
    ) -> None:
        for name, value, least in (
            ("cpu_seconds", cpu_seconds, 1),
            ("memory_mib", memory_mib, 64),
            ("max_output_chars", max_output_chars, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not 0 < wall_seconds < math.inf:
            raise ValueError(f"wall_seconds must be positive and finite, got {wall_seconds!r}")
        self.cpu_seconds = cpu_seconds
        self.wall_seconds = wall_seconds
        self.timeout = wall_seconds + 2 * KILL_SECONDS  # the ToolBox steps in only if the sandbox itself hangs
        self._limits = {
            "cpu_seconds": cpu_seconds,
            "memory_bytes": memory_mib * 2**20,
            "max_output_chars": max_output_chars,
            "filter": _filter_or_raise().hex(),
        }
        self._max_output_chars = max_output_chars
        self._lock = threading.Lock()
        self._closed = False
        self._zygote = _Zygote(self._limits)
        try:
            possible = self(code=PROBE)
        except (ToolError, TimeoutError) as error:
            possible = f"not run a first program: {error}"
        if possible:
            self.close()
            raise SandboxError(f"a program in the sandbox can {', '.join(possible.splitlines())}")

    def __call__(self, *, code: str) -> str:
        """The output of the program; empty if it printed nothing."""
        zygote = self._living_zygote()
        try:
            end = self._run(zygote, code)
        except _ZygoteDied:
            # Killed from outside. A call has no effects, so it is safe to run it again.
            end = self._run(self._living_zygote(dead=zygote), code)
        return self._text_or_raise(end)

    def close(self) -> None:
        """Kill the zygote and every call that still runs. May be called twice."""
        with self._lock:
            self._closed = True
            self._zygote.close()

    def _living_zygote(self, dead: _Zygote | None = None) -> _Zygote:
        with self._lock:
            if self._closed:
                raise RuntimeError("the Python tool is closed")
            if self._zygote is dead or self._zygote.process.poll() is not None:
                self._zygote.close()
                self._zygote = _Zygote(self._limits)
            return self._zygote

    def _run(self, zygote: _Zygote, code: str) -> _End:
        """Run one call. Whatever happens, its process is dead or dying when this returns."""
        deadline = time.monotonic() + self.wall_seconds
        with zygote.start_call() as call:
            output, complete = self._exchange(call.connection, code, deadline)
            ended = zygote.how_it_ended(call, deadline) if complete else None
            in_time = ended is not None or len(output) > self._max_bytes
            if ended is None:
                zygote.kill_call(call)
                ended = zygote.how_it_ended(call, time.monotonic() + KILL_SECONDS)
            if ended is None:
                zygote.process.kill()  # it hangs; a new one will start
                ended = (-signal.SIGKILL, 0.0, False)
        return _End(output, in_time, *ended)

    @property
    def _max_bytes(self) -> int:
        """As many are enough for `max_output_chars` in UTF-8 after the first byte, which is the sandbox's own."""
        return 4 * self._max_output_chars + 1

    def _exchange(self, connection: socket.socket, code: str, deadline: float) -> tuple[bytes, bool]:
        """Send the code; what came back, and whether all of it did: not if it is too long or late."""
        output = bytearray()
        try:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died early, perhaps with a message
                connection.sendall(code.encode("utf-8", "replace"))
                connection.shutdown(socket.SHUT_WR)
            while len(output) <= self._max_bytes:
                connection.settimeout(max(deadline - time.monotonic(), 1e-3))
                chunk = connection.recv(65536)
                if not chunk:
                    return bytes(output), True
                output += chunk
        except TimeoutError:
            pass
        except ConnectionResetError:  # it ended before it read all of the code
            return bytes(output), True
        return bytes(output), False

    def _text_or_raise(self, end: _End) -> str:
        text = end.output[1:].decode("utf-8", "replace")
        if end.output[:1] == UNCONFINED:
            raise SandboxError(f"the sandbox could not start a call: {text}")
        if len(text) > self._max_output_chars:
            return f"{text[: self._max_output_chars]}\n[output cut after {self._max_output_chars} characters]"
        if not end.in_time:
            raise TimeoutError(f"stopped after {self.wall_seconds:g} s")
        if end.status == 0:
            return text
        if end.status > 0:
            raise ToolError(text or f"exit status {end.status}")
        if end.too_many_tables:
            raise ToolError(f"{text}MemoryError")
        # The kernel's RLIMIT_CPU, which counts by ticks: on a busy virtual machine it came below 0.9 of the limit.
        if end.status in (-signal.SIGKILL, -signal.SIGXCPU) and end.seconds > 0.5 * self.cpu_seconds:
            raise TimeoutError(f"stopped after {self.cpu_seconds} s of computing")
        raise ToolError(f"{text}the interpreter crashed")


@dataclass(frozen=True)
class _End:
    """How a call ended."""

    output: bytes
    in_time: bool
    status: int  # as in `zygote.ENDED`
    seconds: float
    too_many_tables: bool


@dataclass(frozen=True)
class _Call:
    """Our ends of the two connections of a call."""

    request: int
    connection: socket.socket
    ended: socket.socket

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.ended.close()


class _Zygote:
    """The process that forks the calls, and the socket that orders it to."""

    def __init__(self, limits: dict[str, object]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).with_name("zygote.py")
        # Nothing of our environment, but where a shared libpython lies. String hashes decide the order of sets.
        environment = {"PYTHONHASHSEED": "0", "TZ": "UTC"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-s", "-S", "-X", "utf8", str(script), json.dumps(limits)],
                env=environment,
                cwd="/",
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),  # an interpreter that cannot start says why
                stderr=theirs.fileno(),
                start_new_session=True,  # Ctrl-C in the terminal is for the training run, not for the calls
            )
        self._control = ours
        self._requests = itertools.count()
        # If this process is killed, the end of stream on the control socket ends the zygote.
        self.close = weakref.finalize(self, _end, self.process, ours)
        ours.settimeout(START_SECONDS)
        try:
            reply = ours.recv(1000)
        except OSError as error:
            reply = str(error).encode()
        if reply != b"ready":
            self.close()
            reason = reply.decode() or f"exit code {self.process.returncode}"
            raise SandboxError(f"the interpreter {sys.executable} did not start in the sandbox: {reason}")
        ours.settimeout(KILL_SECONDS)

    def start_call(self) -> _Call:
        call = next(self._requests)
        connection, of_program = socket.socketpair()
        ended, of_zygote = socket.socketpair()
        with of_program, of_zygote:
            try:
                descriptors = [of_program.fileno(), of_zygote.fileno()]
                socket.send_fds(self._control, [REQUEST.pack(b"r", call)], descriptors)
            except OSError as error:
                connection.close()
                ended.close()
                self.process.kill()  # it is dead, or takes no orders
                raise _ZygoteDied from error
        return _Call(call, connection, ended)

    def kill_call(self, call: _Call) -> None:
        with contextlib.suppress(OSError):  # if the zygote is dead, its calls are
            self._control.send(REQUEST.pack(b"k", call.request))

    def how_it_ended(self, call: _Call, deadline: float) -> tuple[int, float, bool] | None:
        """The fields of `zygote.ENDED`; None where there is no word until the deadline."""
        call.ended.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            word = call.ended.recv(ENDED.size)
        except TimeoutError:
            return None
        if len(word) != ENDED.size:
            raise _ZygoteDied
        status, seconds, too_many_tables = ENDED.unpack(word)
        return status, seconds, too_many_tables


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    process.kill()  # the kernel kills the forks of a zygote that died
    process.wait()
    control.close()


def _filter_or_raise() -> bytes:
    if sys.platform != "linux":
        raise SandboxError(f"the Python sandbox needs Linux, this is {sys.platform}")
    try:
        return filter_program(platform.machine())
    except ValueError as error:
        raise SandboxError(f"the Python sandbox does not know this processor: {error}") from error


def sandbox_problem() -> str | None:
    """Why the Python tool cannot give its guarantees on this machine; None if it can. Takes about 0.2 s."""
    try:
        PythonTool().close()
    except SandboxError as error:
        return str(error)
    return None
