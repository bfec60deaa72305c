"""Processes of a trainer that was killed end; those of one that ended by itself are its own affair."""

import os
import subprocess
import sys
import time

import pytest

PARENT = """
import subprocess, sys, time
from aepo.rollout.engines import orphans
orphans.SCRIPT = orphans.SCRIPT.replace("sleep 10", "sleep 0.2")
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
guard = orphans.OrphanGuard([child.pid])
print(child.pid, flush=True)
if sys.argv[2] == "release":
    guard.release()
else:
    time.sleep(60)
"""
ENDS = "import time; print(flush=True); time.sleep(60)"
IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
@pytest.mark.parametrize(("child", "end"), [(ENDS, "kill"), (IGNORES, "kill"), (ENDS, "release")])
def test_children_of_a_killed_process_end(child, end):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, child, end], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    try:
        if end == "kill":
            parent.kill()
        parent.wait(10)
        deadline = time.monotonic() + (5 if end == "kill" else 0.5)
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(pid) == (end == "release")
    finally:
        if alive(pid):
            os.kill(pid, 9)
