"""Programs that attack the sandbox of the Python tool, and how the sandbox starts, restarts and ends.

The attacks are real: those in Python are also run by a bare interpreter, where they must succeed.
"""

import os
import platform
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aepo.agents.protocol import ToolError
from aepo.agents.tools import python as python_module
from aepo.agents.tools.python import PythonTool, SandboxError, sandbox_problem
from aepo.agents.tools.seccomp import ALLOWED, MACHINES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in MACHINES,
    reason="the Python tool is for Linux on x86-64 and aarch64",
)


@pytest.fixture(scope="module")
def tool():
    tool = PythonTool(cpu_seconds=1, wall_seconds=60)
    yield tool
    tool.close()


def zygote_pid(tool):
    return tool._zygote.process.pid


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children_of(pid):
    """Process ids of the living children of `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What there is to steal or to break: a file, a process with a secret in its environment, a listening socket."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "secret").write_text("the secret")
    victim = subprocess.Popen(["sleep", "600"], env={"SECRET": "the secret"})
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    yield {"folder": str(folder), "victim": victim.pid, "port": listener.getsockname()[1], "listener": listener}
    assert victim.poll() is None, "an attack killed the process"
    with pytest.raises(BlockingIOError):
        listener.accept()
    victim.kill()
    victim.wait()
    listener.close()


# Each prints "pwned" if it succeeds. {folder}, {victim} and {port} are filled in.
ATTACKS = {
    "read a file of the run": "assert 'the secret' in open('{folder}/secret').read(); print('pwned')",
    "list the run": "import os; assert os.listdir('{folder}'); print('pwned')",
    "stat a file": "import os; os.stat('{folder}/secret'); print('pwned')",
    "write a file": "open('{folder}/new', 'w').write('x' * 10**6); print('pwned')",
    "append to a file": "open('{folder}/secret', 'a'); print('pwned')",
    "delete a file": "import os; open('{folder}/b', 'w').close(); os.unlink('{folder}/b'); print('pwned')",
    "make a folder": "import os; os.mkdir('{folder}/dir'); os.rmdir('{folder}/dir'); print('pwned')",
    "file in memory": "import os; os.write(os.memfd_create('x'), b'x' * 10**6); print('pwned')",
    "environment of a process": ("assert b'the secret' in open('/proc/{victim}/environ', 'rb').read(); print('pwned')"),
    "its own /proc": "open('/proc/self/maps').read(); print('pwned')",
    "signal a process": "import os; os.kill({victim}, 0); print('pwned')",
    "signal its parent": "import os; os.kill(os.getppid(), 0); print('pwned')",
    "signal everybody": "import os; os.kill(-1, 0); print('pwned')",
    "connect": "import socket; socket.socket(); print('pwned')",
    "pair of sockets": "import socket; socket.socketpair(); print('pwned')",
    "fork": "import os; os.fork() or os._exit(0); os.wait(); print('pwned')",
    "daemon": "import os; os.setsid() if os.fork() == 0 else os.wait(); print('pwned')",
    "thread": "import _thread; _thread.start_new_thread(print, ()); print('pwned')",
    "other program": "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'exit'], {{}}); print('pwned')",
    "become another program": "import os; os.execv('/bin/echo', ['echo', 'pwned'])",
    "pipe": "import os; os.pipe(); print('pwned')",
    "name of the machine": "import os; os.uname(); print('pwned')",
}
# Raw system calls, past the checks of Python: name: code that gives the result, negative if refused.
RAW = {
    "open": "libc.open(b'/', 0)",
    "prctl": "libc.prctl(15, b'name', 0, 0, 0)",
    "ptrace": "libc.ptrace(0x4206, {victim}, 0, 0)",
    "limits": "libc.setrlimit(9, bytes(16))",
    "priority": "libc.setpriority(0, 0, 5)",
    "shared memory": "libc.shmget(0, 4096, 0o1600)",
    "io_uring": "libc.syscall(425, 4, ctypes.create_string_buffer(120))",
    "namespaces": "libc.unshare(0x10000000)",
    "x32 numbering": "libc.syscall(0x40000000 | 39)",
}


def bare_interpreter(code):
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=20).stdout


IS_OPEN = """
import os
def is_open(number):
    try:
        return os.write(number, b"") == 0
    except OSError:
        return False
"""


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(tool, run, name):
    code = ATTACKS[name].format(**run).replace("; ", "\n")
    assert "pwned" in bare_interpreter(code)
    with pytest.raises((ToolError, PermissionError)) as caught:
        tool(code=code)
    assert "pwned" not in str(caught.value)
    assert wait_until(lambda: not children_of(zygote_pid(tool)))


@pytest.mark.parametrize("name", RAW)
def test_raw_system_call(tool, run, name):
    code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n{RAW[name]}, ctypes.get_errno()"
    assert tool(code=code.format(**run)) == "(-1, 1)\n"  # EPERM


def test_nothing_of_the_run_is_there_from_the_start(tool):
    assert tool(code="import os\ndict(os.environ), os.sys.argv, os.sys.path") == "({}, [], [])\n"
    environment = Path(f"/proc/{zygote_pid(tool)}/environ").read_bytes().split(b"\0")
    assert {entry.split(b"=")[0] for entry in environment} <= {b"", b"PYTHONHASHSEED", b"TZ", b"LD_LIBRARY_PATH"}
    with ThreadPoolExecutor(1) as threads:  # the zygote has descriptors for another call
        other = threads.submit(tool, code="import time\ntime.sleep(0.5)")
        assert wait_until(lambda: children_of(zygote_pid(tool)))
        assert tool(code=IS_OPEN + "list(filter(is_open, range(5000)))") == "[0, 1, 2]\n"  # one connection, three times
        assert not other.done()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")
def test_32_bit_system_calls_kill(tool):
    code = """
        import ctypes
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        page = libc.mmap(None, 4096, 7, 0x22, -1, 0)
        machine_code = bytes.fromhex("b814000000" "cd80" "c3")  # mov eax, getpid; int 0x80; ret
        ctypes.memmove(page, machine_code, len(machine_code))
        print("still alive", ctypes.CFUNCTYPE(ctypes.c_int)(page)())
    """
    assert "still alive" in bare_interpreter(textwrap.dedent(code))
    with pytest.raises(ToolError, match="crashed"):
        tool(code=code)


def test_fork_bomb(tool):
    code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    with pytest.raises(TimeoutError):
        tool(code=code)
    assert wait_until(lambda: not children_of(zygote_pid(tool)))


def test_output_by_descriptor_is_output(tool):
    assert tool(code="import os\nfor i in range(100):\n    try: os.write(i, b'uforged')\n    except OSError: pass") == (
        "uforged" * 3
    )


@pytest.mark.parametrize(
    ("ending", "error"), [("", None), ("while True: pass", TimeoutError), ("os._exit(1)", ToolError)]
)
def test_program_that_closes_its_connection_ends_as_any_other(tool, ending, error):
    code = f"import os\nprint('said')\nos.closerange(0, 100)\n{ending}"
    if error is None:
        assert tool(code=code) == "said\n"
    else:
        with pytest.raises(error):
            tool(code=code)
    assert wait_until(lambda: not children_of(zygote_pid(tool)))
    assert tool(code="1 + 1") == "2\n"


MAPPING = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
MIB = 2**20
def mapped(size, flags=0x22, at=None):
    address = libc.mmap(at, size, 3, flags, -1, 0)
    if address == 2**64 - 1:
        raise MemoryError
    return address
"""
# Each takes far more memory than its address space, where it may.
HIDDEN_MEMORY = {
    "shared mapping, held by one page": """
for _ in range(10):
    address = mapped(50 * MIB, 0x21)
    ctypes.memset(address, 1, 50 * MIB)
    libc.munmap(address, 50 * MIB - 4096)""",
    "a page table for each page": """
for i in range(60_000):
    ctypes.memset(mapped(4096, at=(1 << 40) + (i << 30)), 1, 1)""",
    "pages left over of large mappings": """
for _ in range(60_000):
    address = mapped(50 * MIB)
    ctypes.memset(address, 1, 1)
    libc.munmap(address + 4096, 50 * MIB - 4096)""",
    "a page left over of each huge page": """
for _ in range(250):
    address = mapped(4 * MIB)
    huge = (address + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
    libc.madvise(huge, 2 * MIB, 14)
    ctypes.memset(huge, 1, 2 * MIB)
    libc.munmap(huge + 4096, address + 4 * MIB - huge - 4096)
import time
time.sleep(0.2)""",
}


@pytest.mark.parametrize("name", HIDDEN_MEMORY)
def test_memory_that_is_not_address_space_is_limited(name):
    tool = PythonTool(memory_mib=128, wall_seconds=20)
    free, least = free_mib(), [free_mib()]
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(tool, code=MAPPING + HIDDEN_MEMORY[name])
        while not call.done():
            least.append(free_mib())
            time.sleep(0.002)
    tool.close()
    if "huge" not in name:
        with pytest.raises(ToolError, match="MemoryError"):
            call.result()
    assert free - min(least) < 300  # without the measures 400 to 700, some of it of other processes


def free_mib():
    return int(Path("/proc/meminfo").read_text().split("MemFree:")[1].split()[0]) / 1024


class TestLife:
    def test_killed_zygote_is_replaced(self, tool):
        for _ in range(3):
            os.kill(zygote_pid(tool), signal.SIGKILL)
            assert tool(code="1 + 1") == "2\n"

    def test_call_whose_zygote_is_killed_is_run_again(self, tool):
        before = zygote_pid(tool)
        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(tool, code=f"import time\ntime.sleep(0.4)\n{i}") for i in range(4)]
            assert wait_until(lambda: len(children_of(before)) == 4)
            os.kill(before, signal.SIGKILL)
            assert [call.result() for call in calls] == [f"{i}\n" for i in range(4)]
        assert not is_alive(before)

    def test_call_that_takes_too_long_is_killed_alone(self):
        tool = PythonTool(wall_seconds=0.3)
        zygote = zygote_pid(tool)
        with pytest.raises(TimeoutError, match=r"stopped after 0.3 s"):
            tool(code="import time\ntime.sleep(100)")
        assert wait_until(lambda: not children_of(zygote))
        assert tool(code="1 + 1") == "2\n"
        assert zygote_pid(tool) == zygote
        tool.close()

    def test_zygote_that_hangs_is_replaced(self, monkeypatch):
        monkeypatch.setattr(python_module, "KILL_SECONDS", 0.3)
        tool = PythonTool(wall_seconds=0.3)
        stopped = zygote_pid(tool)
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            tool(code="1 + 1")
        assert tool(code="1 + 1") == "2\n"
        assert not is_alive(stopped)
        tool.close()

    def test_close_ends_everything_and_may_be_called_twice(self):
        tool = PythonTool()
        pid = zygote_pid(tool)
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(tool, code="while True: pass")
            assert wait_until(lambda: children_of(pid))
            running = children_of(pid)
            tool.close()
            tool.close()
            with pytest.raises(RuntimeError):
                call.result()
        assert not is_alive(pid)
        assert wait_until(lambda: not any(map(is_alive, running)))
        with pytest.raises(RuntimeError, match="closed"):
            tool(code="1")

    @pytest.mark.parametrize("how", ["kill", "exit", "forgotten"])
    def test_nothing_survives_the_run(self, how):
        code = (
            "import os, threading, time\n"
            "from aepo.agents.tools.python import PythonTool\n"
            "tool = PythonTool(cpu_seconds=60, wall_seconds=60)\n"
            "threading.Thread(target=lambda: tool(code='while True: pass'), daemon=True).start()\n"
            "pid = tool._zygote.process.pid\n"
            "time.sleep(0.2)\n"
            "print(pid, flush=True)\n"
        )
        endings = {"kill": "time.sleep(60)\n", "exit": "", "forgotten": "os._exit(0)\n"}
        run = subprocess.Popen([sys.executable, "-c", code + endings[how]], stdout=subprocess.PIPE, text=True)
        zygote = int(run.stdout.readline())
        processes = [zygote, *children_of(zygote)]
        if how == "kill":
            assert len(processes) == 2
            run.kill()
        run.wait(timeout=10)
        run.stdout.close()
        assert wait_until(lambda: not any(map(is_alive, processes)))

    def test_ctrl_c_in_the_terminal_does_not_reach_it(self, tool):
        assert os.getpgid(zygote_pid(tool)) != os.getpgid(0)

    def test_unknown_machine_is_a_clear_error(self, monkeypatch):
        assert sandbox_problem() is None
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        with pytest.raises(SandboxError, match="x86_64, aarch64, got 'riscv64'"):
            PythonTool()
        assert "riscv64" in sandbox_problem()

    def test_filter_that_lets_everything_through_is_noticed(self, monkeypatch):
        monkeypatch.setattr(python_module, "filter_program", lambda machine: bytes.fromhex("060000000000ff7f"))
        assert sandbox_problem() == "a program in the sandbox can open files, use the network, signal processes"

    def test_filter_that_the_kernel_refuses_is_noticed(self, monkeypatch):
        monkeypatch.setattr(python_module, "filter_program", lambda machine: bytes(8))
        assert "could not start a call: [Errno 22]" in sandbox_problem()


def test_numbers_of_the_system_calls_are_those_of_the_kernel():
    headers = {
        0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        1: Path("/usr/include/asm-generic/unistd.h"),
    }
    compared = 0
    for column, header in headers.items():
        if not header.exists():
            continue
        defined = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR"))
        for name, numbers in ALLOWED.items():
            number = defined.get(f"__NR_{name}")
            number = defined.get(number, number)  # some are defined by way of __NR3264_...
            assert number == (None if numbers[column] is None else str(numbers[column])), (header, name)
            compared += 1
    if not compared:
        pytest.skip("the kernel headers are not installed")
