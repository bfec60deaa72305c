"""Tests that need several processes: cases run by every rank of a gloo group, all cases in one set of processes.

A module of cases has functions `case_*(ranks)`; an assertion that fails on any rank fails the case. Starting a process
takes 3 s (the import of torch), a case some 10 ms, so they share the processes of one world size.

    python tests/kernels/ranks.py RANK WORLD DIRECTORY MODULE..      one rank; what failed goes to DIRECTORY/RANK.json
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# Cases are about CPU tensors; Triton's interpreter has to be asked for before Triton is imported.
os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

import pytest
import torch
import torch.distributed as dist
from torch.profiler import profile

from aepo_kernels import backend as backends
from aepo_kernels.testing import poisoned_memory

COLLECTIVE_TIMEOUT = timedelta(seconds=30)  # a rank that left the others alone is a failure, not a hang
PROCESS_TIMEOUT_SECONDS = 240
BACKENDS = [name for name in ("reference", "cpu") if backends.missing(name) is None]


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    group: dist.ProcessGroup

    def cuts(self, vocab: int) -> list[int]:
        """Bounds of parts that are as uneven as can be: one entry for rank 1 of three, the most for the last."""
        return {1: [0, vocab], 2: [0, vocab // 3, vocab], 3: [0, vocab // 3, vocab // 3 + 1, vocab]}[self.world]

    def part(self, vocab: int) -> slice:
        cuts = self.cuts(vocab)
        return slice(cuts[self.rank], cuts[self.rank + 1])

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of the same shape on every rank, from all of them."""
        everyones = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(everyones, x.contiguous(), group=self.group)
        return everyones


def collectives(run: Callable[[], object]) -> list[str]:
    """The collectives that a call makes."""
    with profile() as trace:
        run()
    return [event.name for event in trace.events() if event.name.startswith("c10d::")]


def cases(modules: Sequence[str]) -> dict[str, Callable[[Ranks], None]]:
    found = [item for module in modules for item in vars(importlib.import_module(module)).items()]
    return {name.removeprefix("case_"): function for name, function in found if name.startswith("case_")}


def run_in_processes(modules: Sequence[str], world: int, directory: Path) -> dict[str, str]:
    """Run all cases of some modules in `world` processes. Returns what failed: case -> tracebacks of its ranks."""
    settings = [str(world), str(directory), *modules]
    processes = []
    for rank in range(world):
        with (directory / f"{rank}.stderr").open("w") as errors:  # a pipe that nobody reads would stop its writer
            processes.append(subprocess.Popen([sys.executable, __file__, str(rank), *settings], stderr=errors))
    failed: dict[str, str] = {}
    end = time.monotonic() + PROCESS_TIMEOUT_SECONDS
    try:
        for rank, process in enumerate(processes):
            process.wait(timeout=max(1, end - time.monotonic()))
            report, errors = directory / f"{rank}.json", directory / f"{rank}.stderr"
            assert report.exists(), f"rank {rank} of {world} died, code {process.returncode}:\n{errors.read_text()}"
            for case, error in json.loads(report.read_text()).items():
                failed[case] = f"{failed.get(case, '')}\nrank {rank} of {world}: {error}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return failed


def main(rank: int, world: int, directory: Path, modules: Sequence[str]) -> None:
    store = dist.FileStore(str(directory / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)
    assert dist.group.WORLD is not None
    ranks = Ranks(rank, world, dist.group.WORLD)
    failed: dict[str, str] = {}
    for name, case in cases(modules).items():
        if failed:
            failed[name] = "not run: after a failure the ranks may be out of step"
            continue
        try:
            with poisoned_memory():
                case(ranks)
            dist.barrier()
        except (Exception, pytest.fail.Exception):  # the latter is no Exception
            failed[name] = traceback.format_exc()
    (directory / f"{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
