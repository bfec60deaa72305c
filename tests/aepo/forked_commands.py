"""`aepo` in processes that are forked from one that has imported everything: a start takes milliseconds, not seconds.

Each is as a fresh process is where its command begins: guarded output, then the imports. What it runs with is real:
descriptors, signals, its session, and the end of its interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping

CLOSED = -1  # a stream that the process begins without
SERVER = """
import fcntl, json, os, signal, socket, sys, termios
from aepo.output import guard_output
guard_output()
import aepo.cli, aepo.evaluation_display, aepo.play, aepo.report.files, aepo.trainer
from aepo import __main__, cli_shared
from trainer_toys import ToyLanguageModel, toy_agent
cli_shared.load = lambda config: (toy_agent(), ToyLanguageModel())
wire = socket.socket(fileno=int(sys.argv[1]))
while True:
    data, descriptors, _, _ = socket.recv_fds(wire, 65536, 3)
    if not data:
        sys.exit()
    child = os.fork()
    if child == 0:
        break
    for descriptor in descriptors:
        os.close(descriptor)
    wire.send(b"%d" % child)
    wire.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
wire.close()
asked = json.loads(data)
for number, descriptor in enumerate(descriptors):
    os.dup2(descriptor, number)
    os.close(descriptor)
if asked["session"]:
    os.setsid()
if asked["controlling"]:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if asked["nohup"]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.stdout.reconfigure(line_buffering=os.isatty(1))
for number in asked["closed"]:
    os.close(number)
sys.argv[1:] = asked["words"]
__main__.main()
"""


class Forks:
    """One process at a time: `start`, then `wait`."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self.pid = 0

    def start(
        self,
        *words: object,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        session: bool = False,
        controlling: bool = False,
        nohup: bool = False,
    ) -> None:
        """None: /dev/null. The process leads a `session`, whose terminal is `stdin` if that is `controlling`."""
        streams = (stdin, stdout, stderr)
        asked = {
            "words": [str(word) for word in words],
            "closed": [number for number, stream in enumerate(streams) if stream == CLOSED],
            "session": session,
            "controlling": controlling,
            "nohup": nohup,
        }
        null = os.open(os.devnull, os.O_RDWR)
        given = [null if stream in (None, CLOSED) else stream for stream in streams]
        self._wire.settimeout(120)  # the imports come before the first
        socket.send_fds(self._wire, [json.dumps(asked).encode()], given)
        os.close(null)
        self.pid = int(self._wire.recv(100))

    def wait(self, seconds: float = 300) -> int:
        """The exit code, negative for a signal."""
        self._wire.settimeout(seconds)
        code = int(self._wire.recv(100))
        self.pid = 0
        return code


@contextlib.contextmanager
def fork_server(environment: Mapping[str, str]) -> Iterator[Forks]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(theirs.fileno())],
        env=environment,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    theirs.close()
    forks = Forks(ours)
    try:
        yield forks
    finally:
        ours.close()
        if forks.pid:  # a test has failed, and its process may wait for ever
            os.kill(forks.pid, 9)
        server.wait(60)
