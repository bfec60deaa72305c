"""Engines that end with their trainer even if it is killed. vLLM's engine process (0.32) does not notice that: it stays
with all its memory."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

GRACE = 10  # seconds for an engine to end by itself
# Reads a line, or the end of its input: which the kernel writes when the trainer is gone, however it went.
SCRIPT = f'read -r line || {{ kill "$@"; sleep {GRACE}; kill -9 "$@"; }}'


class OrphanGuard:
    """A small process that waits for this one to die and then ends the processes `pids`. `release` calls it off."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", SCRIPT, "sh", *map(str, pids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is not for it
        )

    def release(self) -> None:
        """The processes have ended, or will be ended by somebody else."""
        self._process.communicate(b"released\n")
