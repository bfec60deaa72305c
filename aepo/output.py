"""Standard output and standard error that may go away: the reader of a pipe, a terminal, the room on a disk.

Printing is no reason for an error in the midst of something else. So the first write that fails is the last one: from
then on the descriptor is /dev/null, also for libraries, child processes and what Python flushes at its end. Whoever
reads standard output wants no more of it: the process gets the SIGTERM that it handles (aepo/interrupt.py), and a
command that ends well all the same has an exit code that is not 0.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it


class _Descriptor(io.FileIO):
    """Under the buffers of `sys.stdout` or `sys.stderr`. lost: the error that ended it."""

    lost: OSError | None = None

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: Any) -> int:
        """All of it; what is lost counts as written."""
        done = 0
        while done < len(data) and self.lost is None:
            try:
                written = super().write(memoryview(data)[done:])
            except OSError as error:
                self._lose(error)
            else:
                if written is None:  # somebody has made it non-blocking, and the reader is slow
                    select.select((), (self,), ())
                done += written or 0
        return len(data)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
        if self.fileno() != 1 or _expected(error):
            return
        if error.errno != errno.EPIPE:
            with contextlib.suppress(OSError):  # not by print: a live display would write it to standard output
                os.write(2, f"error: standard output: {error.strerror}\n".encode())
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.raise_signal(signal.SIGTERM)


def guard_output() -> None:
    """For the rest of the process. Other streams than its own (a notebook's, a test's) are left alone."""
    _fill_descriptors()
    sys.stdout, sys.stderr = _guarded(sys.stdout, 1), _guarded(sys.stderr, 2)


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """For a block of a program that is not ours."""
    before = sys.stdout, sys.stderr
    guard_output()
    try:
        yield
    finally:
        for stream in {sys.stdout, sys.stderr}.difference(before):
            stream.flush()
        sys.stdout, sys.stderr = before


def status_of_output() -> int:
    """An exit code: 0 if all that was printed has been written, or nobody was expected to read it."""
    sys.stdout.flush()
    lost = getattr(_raw(sys.stdout), "lost", None)
    if lost is None or _expected(lost):
        return 0
    return BROKEN_PIPE if lost.errno == errno.EPIPE else 1


def _expected(error: OSError) -> bool:
    """The terminal is gone, and nohup has said that it will be."""
    return error.errno == errno.EIO and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def _guarded(stream: Any, number: int) -> Any:
    if stream is None:  # closed when Python started
        return io.TextIOWrapper(io.BufferedWriter(_Descriptor(number)), "utf-8", "backslashreplace")
    raw = _raw(stream)
    if not isinstance(raw, io.FileIO) or isinstance(raw, _Descriptor) or raw.fileno() != number:
        return stream
    stream.flush()
    return io.TextIOWrapper(
        # python -u has no buffer
        cast(BinaryIO, _Descriptor(number) if stream.write_through else io.BufferedWriter(_Descriptor(number))),
        stream.encoding,
        "backslashreplace",  # a character that an encoding lacks is no error either
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _fill_descriptors() -> None:
    """0, 1 and 2, if they are closed: the next file would get the number, and all that a library prints."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
