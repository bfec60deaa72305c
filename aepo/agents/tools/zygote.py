"""Inside the Python sandbox: a process that waits with the standard library loaded and forks once per call.

`aepo.agents.tools.python` runs this file as a script of a bare interpreter; it imports nothing of this project. For
each request it gets two connections and forks. The fork gives up every right for good, and only then reads the code,
so the zygote never sees code, and no call sees anything of another one.

    parent -> zygote   b"r" + id, with two descriptors: fork a call, whose descriptors 0, 1 and 2 are the first one;
                       b"k" + id: kill that fork
    parent -> fork     the code, then end of stream
    fork -> parent     CONFINED before it reads the code, then all that the program writes; or UNCONFINED and why
    zygote -> parent   over the second descriptor, when the fork has ended: how (`ENDED`)

What a program writes is its output, and its end is the kernel's word: there is nothing that it could forge.
"""

import _sitebuiltins
import ast
import atexit
import builtins
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types

# The forks cannot open files, so what they may import is loaded before.
PRELOADED = (
    "__future__ abc array base64 binascii bisect calendar cmath collections.abc colorsys contextlib copy csv "
    "dataclasses _strptime datetime decimal difflib enum fractions functools graphlib hashlib heapq html inspect io "
    "itertools keyword locale logging math numbers operator pathlib pprint queue re secrets statistics string "
    "stringprep textwrap threading time timeit tokenize typing unicodedata urllib.parse uuid warnings weakref zlib "
    "encodings.ascii encodings.latin_1 encodings.cp1252 encodings.utf_8_sig encodings.utf_16 encodings.utf_16_le "
    "encodings.utf_32 encodings.unicode_escape encodings.raw_unicode_escape encodings.hex_codec encodings.rot_13 "
    "encodings.idna"
)
REQUEST = struct.Struct("=cQ")
ENDED = struct.Struct("=id?")  # exit status, minus the signal if it was one; seconds of computing; too many page tables
CONFINED, UNCONFINED = b"c", b"u"
WATCH_SECONDS = 0.02
TABLE_SHARE = 32  # page tables may be this part of the limit of memory
DESCRIPTORS = 4096  # that the zygote may have: two for each call that runs

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE = 1, 4, 22, 38, 41
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
libc = ctypes.CDLL(None, use_errno=True)
end_process = os._exit  # a program may replace the name in `os`


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
    prctl(PR_SET_THP_DISABLE, 1)  # a huge page stays whole in memory when all but 4 KiB of it are unmapped
    lower_limit(resource.RLIMIT_AS, limits["memory_bytes"])
    lower_limit(resource.RLIMIT_CPU, limits["cpu_seconds"])
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    filter_program = bytes.fromhex(limits["filter"])
    instructions = ctypes.create_string_buffer(filter_program, len(filter_program))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions) // 8, ctypes.addressof(instructions)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def read_code() -> str:
    data = bytearray()
    while chunk := os.read(0, 65536):
        data += chunk
    return data.decode("utf-8", "replace")


def parse_cell(code: str) -> ast.Module:
    """The program, also where all of it is indented, or its first line by the space after a tag.

    The text is not dedented line by line: some lines are parts of string literals.
    """
    program = code.lstrip()
    lines_before = "\n" * code.count("\n", 0, len(code) - len(program))  # tracebacks count them
    try:
        return ast.parse(lines_before + program, "<python>")
    except IndentationError:
        block = ast.parse("if True:\n" + code, "<python>")  # any indentation is right, if it is the same
        condition, *others = block.body
        if others or not isinstance(condition, ast.If) or condition.orelse:
            raise
        return ast.increment_lineno(ast.Module(condition.body, []), -1)


def run_cell(code: str) -> None:
    """Run like a notebook cell: if the last statement is an expression, its value is printed."""
    main = sys.modules["__main__"]
    tree = parse_cell(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<python>", "exec", dont_inherit=True), main.__dict__)
    if last is not None:
        exec(compile(ast.Interactive([last]), "<python>", "single", dont_inherit=True), main.__dict__)


def describe(error: BaseException) -> str:
    """The end of the traceback: type and message, notes, and the same of the members of a group."""
    lines = traceback.format_exception_only(type(error), error)
    while len(lines) > 1 and lines[0].startswith(" "):  # the place of a syntax error
        del lines[0]
    if isinstance(error, getattr(builtins, "BaseExceptionGroup", ())):  # since Python 3.11
        for member in error.exceptions:  # type: ignore[attr-defined]
            lines += (f"  {line}\n" for line in describe(member).splitlines())
    return "".join(lines)


def show(text: str) -> None:
    """Write to the descriptor: the program may have closed or replaced `sys.stderr`."""
    data = text.encode("utf-8", "backslashreplace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def exit_status(end: BaseException) -> int:
    """Show what Python shows when a program ends in this way."""
    if isinstance(end, SystemExit) and (end.code is None or isinstance(end.code, int)):
        return (end.code or 0) & 0xFF
    if isinstance(end, MemoryError):
        end.__traceback__ = None
        sys.modules["__main__"].__dict__.clear()  # the message needs room
    try:
        show(f"{end.code}\n" if isinstance(end, SystemExit) else describe(end))
    except BaseException:  # out of the program's own classes
        show(f"{type(end).__name__}\n")
    return 1


def serve_call(limits: dict, zygote: int) -> None:
    """All of a fork's life; its descriptors are 0, 1 and 2, and `sys.stdin`, `stdout` and `stderr` with them."""
    try:
        lock_down(limits, zygote)
    except OSError as error:
        os.write(1, UNCONFINED + str(error).encode())
        end_process(1)
    os.write(1, CONFINED)
    random.seed(0)  # the same code gives the same text: the library would seed each fork from the system
    gc.enable()
    status = 0
    try:
        run_cell(read_code())
    except BaseException as error:
        status = exit_status(error)
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):  # perhaps the program's own
        with contextlib.suppress(BaseException):
            stream.flush()
    end_process(status)


class Call:
    """A fork that runs."""

    def __init__(self, pid: int, request: int, ended: int) -> None:
        self.pid = pid
        self.request = request
        self.ended = ended  # descriptor for how it ended
        self.too_many_tables = False

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def report(self, status: int, seconds: float) -> None:
        with contextlib.suppress(OSError):  # the parent waits no more
            os.write(self.ended, ENDED.pack(os.waitstatus_to_exitcode(status), seconds, self.too_many_tables))
        os.close(self.ended)

    def watch(self, table_bytes: int) -> None:
        """Kill it if it has too many page tables: RLIMIT_AS does not count them.

        A page that is mapped alone takes a second one for its table. Ordinary programs need 1 / 512 of their memory.
        """
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{self.pid}/status", "rb") as file:
            if int(file.read().split(b"VmPTE:")[1].split()[0]) * 1024 > table_bytes:
                self.too_many_tables = True
                self.kill()


def start_call(request: int, connection: int, ended: int, limits: dict) -> Call | None:
    zygote = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        os.write(connection, UNCONFINED + str(error).encode())
        os.close(ended)
        return None
    if pid == 0:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in range(3):
                os.dup2(connection, number)
            os.closerange(3, DESCRIPTORS)  # also those that tell how other calls ended
            serve_call(limits, zygote)
        finally:
            end_process(1)
    return Call(pid, request, ended)


def reap(calls: dict[int, Call]) -> None:
    """Report the calls that have ended. Nobody else waits for them, so a process id in `calls` is never reused."""
    while calls:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            return
        calls.pop(pid).report(status, usage.ru_utime + usage.ru_stime)


def obey(control: socket.socket, calls: dict[int, Call], limits: dict) -> bool:
    """One order; False where the parent has closed its end or died."""
    message, descriptors, _, _ = socket.recv_fds(control, REQUEST.size, 2)
    if not message:
        return False
    kind, request = REQUEST.unpack(message)
    if kind == b"k":
        for call in calls.values():
            if call.request == request:
                call.kill()
        return True
    connection, ended = descriptors
    started = start_call(request, connection, ended, limits)
    os.close(connection)
    if started is not None:
        calls[started.pid] = started
    return True


def serve(control: socket.socket, limits: dict) -> None:
    """One fork per request, until the parent closes its end or dies."""
    calls: dict[int, Call] = {}
    child_ended, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    events = select.poll()
    events.register(control, select.POLLIN)
    events.register(child_ended, select.POLLIN)
    watched = 0.0
    while True:
        ready = [descriptor for descriptor, _ in events.poll(WATCH_SECONDS * 1000 if calls else None)]
        if child_ended in ready:
            os.read(child_ended, 4096)
        reap(calls)
        if control.fileno() in ready and not obey(control, calls, limits):
            return
        if time.monotonic() - watched > WATCH_SECONDS:
            watched = time.monotonic()
            for call in calls.values():
                call.watch(limits["memory_bytes"] // TABLE_SHARE)


def load_library() -> None:
    sys.path.pop(0)  # the directory of this file
    for module in PRELOADED.split():
        importlib.import_module(module)
    sys.modules["__main__"] = types.ModuleType("__main__")  # the program's
    # From here on an unknown import says "No module named", as it would anywhere, instead of "not permitted".
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.argv.clear()
    os.environ.clear()
    builtins.exit = _sitebuiltins.Quitter("exit", "")
    builtins.quit = _sitebuiltins.Quitter("quit", "")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # lone surrogates
    gc.disable()
    gc.freeze()  # a collection in a fork would copy every page of the library


def main() -> None:
    control = socket.socket(fileno=0)
    limits = json.loads(sys.argv[1])
    lower_limit(resource.RLIMIT_NOFILE, DESCRIPTORS)
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
