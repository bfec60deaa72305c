"""`aepo` commands as a user runs them, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(*arguments: str | Path, stderr: int = subprocess.STDOUT) -> subprocess.Popen[str]:
    """In a session of its own, as a shell would, without what this process sets for engines inside it."""
    inside = (
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_LOGGING_LEVEL",
        "VLLM_LOGGING_STREAM",
        "TRITON_INTERPRET",
    )
    environment = {name: value for name, value in os.environ.items() if name not in inside}
    command = [sys.executable, "-m", "aepo.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
        start_new_session=True,
    )  # fmt: skip


def members(session: int) -> list[str]:
    """Command lines of the processes of a session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state != "Z":
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended meanwhile
            continue
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
