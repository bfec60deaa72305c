"""Inside the Python sandbox: a process that waits with the standard library loaded and forks once per call.

`aepo.agents.tools.python` runs this file as a script of a bare interpreter; it imports nothing of this project. For each
request it gets one end of a connection and forks. The fork gives up every right for good, and only then reads the
code from the connection, so the zygote never sees code, and no call sees anything of another one.

    parent -> zygote   b"r" + id, with a descriptor: fork and serve this connection;   b"k" + id: kill that fork
    parent -> fork     the code, then end of stream
    fork -> parent     one status byte, then the text, then end of stream
"""

import ast
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import random
import resource
import signal
import socket
import struct
import sys
import textwrap
import traceback
import types

# The forks cannot open files, so what they may import is loaded before.
PRELOADED = (
    "abc array base64 binascii bisect calendar cmath collections.abc colorsys contextlib copy csv dataclasses "
    "_strptime datetime decimal difflib enum fractions functools graphlib hashlib heapq html itertools keyword "
    "locale math numbers operator pprint queue re statistics string stringprep time timeit typing unicodedata "
    "urllib.parse uuid zlib"
)
REQUEST = struct.Struct("=cQ")
OK, RAISED, UNCONFINED = b"o", b"r", b"u"

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
libc = ctypes.CDLL(None, use_errno=True)


class Output(io.TextIOBase):
    """Collects what the program prints; the call ends when it is too much."""

    def __init__(self, connection: int, limit: int) -> None:
        self.connection = connection
        self.limit = limit
        self.parts: list[str] = []
        self.chars = 0

    def write(self, text: str) -> int:
        self.parts.append(text)
        self.chars += len(text)
        if self.chars > self.limit:
            self.finish(OK)
        return len(text)

    def finish(self, status: bytes) -> None:
        text = "".join(self.parts)
        if len(text) > self.limit:
            text = f"{text[: self.limit]}\n[output cut after {self.limit} characters]"
        data = status + text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(self.connection, data) :]
        os._exit(0)


def check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def prctl(option: int, *args: int) -> None:
    # the kernel rejects some options unless the unused arguments are zero
    check(libc.prctl(option, *(ctypes.c_ulong(value) for value in (*args, 0, 0, 0, 0)[:4])))


def drop_capabilities() -> None:
    # In a run started by root, even an allowed call like madvise could hurt the machine (MADV_HWPOISON).
    check(libc.capset(struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24)))


def lower_limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def lock_down(limits: dict, zygote: int) -> None:
    """Give up every right for good: after this, the process can compute and answer, and nothing else."""
    drop_capabilities()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:
        os._exit(1)  # the zygote died before the line above
    prctl(PR_SET_DUMPABLE, 0)  # a crash leaves no core file
    lower_limit(resource.RLIMIT_AS, limits["memory_bytes"])
    lower_limit(resource.RLIMIT_CPU, limits["cpu_seconds"])
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    filter_program = bytes.fromhex(limits["filter"])
    instructions = ctypes.create_string_buffer(filter_program, len(filter_program))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions) // 8, ctypes.addressof(instructions)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def read_all(connection: int) -> str:
    data = bytearray()
    while chunk := os.read(connection, 65536):
        data += chunk
    return data.decode("utf-8", "replace")


def run_cell(code: str) -> None:
    """Run like a notebook cell: if the last statement is an expression, its value is printed."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    tree = ast.parse(textwrap.dedent(code).strip(), "<python>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<python>", "exec", dont_inherit=True), main.__dict__)
    if last is not None:
        exec(compile(ast.Interactive([last]), "<python>", "single", dont_inherit=True), main.__dict__)


def serve_call(connection: int, limits: dict, zygote: int) -> None:
    output = Output(connection, limits["max_output_chars"])
    try:
        lock_down(limits, zygote)
    except OSError as error:
        output.write(str(error))
        output.finish(UNCONFINED)
    code = read_all(connection)
    sys.stdout = sys.stderr = output
    random.seed(0)  # the same code gives the same text: the library would seed each fork from the system
    gc.enable()
    try:
        run_cell(code)
    except SystemExit:
        pass
    except BaseException as error:
        if isinstance(error, MemoryError):
            error.__traceback__ = None
            sys.modules["__main__"].__dict__.clear()  # the message below needs room
        output.write(traceback.format_exception_only(type(error), error)[-1])
        output.finish(RAISED)
    output.finish(OK)


def reap(children: dict[int, int]) -> None:
    """Forget the forks that ended. Nobody else waits for them, so a process id in `children` is never reused."""
    while children:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        del children[pid]


def serve(control: socket.socket, limits: dict) -> None:
    """One fork per request, until the parent closes its end or dies."""
    zygote = os.getpid()
    children: dict[int, int] = {}  # process id: request id
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, REQUEST.size, 1)
        if not message:
            return
        kind, request = REQUEST.unpack(message)
        reap(children)
        if kind == b"k":
            for pid, running in children.items():
                if running == request:
                    os.kill(pid, signal.SIGKILL)
            continue
        connection = descriptors[0]
        try:
            pid = os.fork()
        except OSError as error:
            os.write(connection, UNCONFINED + str(error).encode())
            pid = -1
        if pid == 0:
            try:
                control.close()
                serve_call(connection, limits, zygote)
            finally:
                os._exit(1)
        os.close(connection)
        if pid > 0:
            children[pid] = request


def load_library() -> None:
    sys.path.pop(0)  # the directory of this file
    for module in PRELOADED.split():
        importlib.import_module(module)
    # From here on an unknown import says "No module named", as it would anywhere, instead of "not permitted".
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.argv.clear()
    os.environ.clear()
    gc.disable()
    gc.freeze()  # a collection in a fork would copy every page of the library


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    limits = json.loads(sys.argv[2])
    try:
        load_library()
    except Exception as error:
        control.send(repr(error).encode()[:1000])
        return
    # If the machine runs out of memory, these processes go first, not the training run. Without /proc they do not.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    control.send(b"ready")
    serve(control, limits)


if __name__ == "__main__":
    main()
