"""Makes the mistakes of the table one by one, in copies of the tree, and runs the tests that must see them."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.mutations.mutation import ROOT, Mutation

AT_ONCE = 2
SECONDS = 300.0  # for the tests of one mutation; alone most take 5 to 10, on a very busy machine one took 114
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "node_modules", "*.safetensors"
)


class BrokenTree(RuntimeError):
    """The tests cannot say anything: they fail without a mutation, or look at another tree."""


@dataclass(frozen=True)
class Outcome:
    """What the tests said about a mutation. `by`: the test that failed."""

    mutation: Mutation
    verdict: Literal["killed", "survived", "timed out", "broken"]
    seconds: float
    by: str = ""
    output: str = ""


class Copy:
    """A copy of the tree. Its code is what Python finds first there, also with an editable install of the original."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT, root, ignore=LEFT_OUT, symlinks=True)
        self._processes: set[subprocess.Popen[str]] = set()
        # No bytecode: Python takes a file of the same size and second for unchanged.
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        for package in ("aepo", "aepo_kernels"):
            code, found = self._run(["-c", f"import {package}; print({package}.__file__)"], SECONDS)
            if code != 0 or root not in Path(found.strip().splitlines()[-1]).parents:
                raise BrokenTree(f"import {package} in the copy {root} gave: {found.strip()}")

    def test(self, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Exit code of pytest, None after `seconds`, and what it printed. It stops at the first failure."""
        return self._run(["-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=short", *tests], seconds)

    def try_mutation(self, mutation: Mutation, seconds: float) -> Outcome:
        path = self.root / mutation.file
        before, start = path.read_text(encoding="utf-8"), time.perf_counter()
        path.write_text(mutation.mutated(self.root), encoding="utf-8")
        try:
            code, output = self.test(mutation.tests, seconds)
        finally:
            path.write_text(before, encoding="utf-8")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
        verdicts: dict[int | None, Literal["killed", "survived", "timed out"]] = {
            0: "survived", 1: "killed", None: "timed out"
        }  # fmt: skip
        return Outcome(
            mutation, verdicts.get(code, "broken"), time.perf_counter() - start, failed[1] if failed else "", output
        )

    def stop(self) -> None:
        for process in list(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _run(self, arguments: Sequence[str], seconds: float) -> tuple[int | None, str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what tests have started ends with them
        )
        self._processes.add(process)
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        finally:
            self._processes.discard(process)


def try_all(mutations: Sequence[Mutation], done: Callable[[str], None], seconds: float = SECONDS) -> Iterator[Outcome]:
    """As they come. First the tests run on the tree as it is: BrokenTree if one fails there.

    done: called with the name of a file of tests, or of a mutation, when it has been tried.
    """
    by_file: dict[str, set[str]] = {}
    for test in {test for mutation in mutations for test in mutation.tests}:
        by_file.setdefault(test.partition("::")[0], set()).add(test)
    with tempfile.TemporaryDirectory(prefix="aepo-mutations-") as directory:
        copies = [Copy(Path(directory) / str(index)) for index in range(AT_ONCE)]
        free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for copy in copies:
            free.put(copy)

        def as_it_is(file: str) -> None:
            with _taken(free) as copy:
                code, output = copy.test([file] if file in by_file[file] else sorted(by_file[file]), 4 * seconds)
            if code != 0:
                raise BrokenTree(f"{file} fails without any mutation:\n{output}")
            done(file)

        def mutated(mutation: Mutation) -> Outcome:
            with _taken(free) as copy:
                outcome = copy.try_mutation(mutation, seconds)
            done(mutation.name)
            return outcome

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for one in as_completed([pool.submit(as_it_is, file) for file in sorted(by_file)]):
                one.result()
            for future in as_completed([pool.submit(mutated, mutation) for mutation in mutations]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for copy in copies:
                copy.stop()
            pool.shutdown()


@contextlib.contextmanager
def _taken(free: queue.SimpleQueue[Copy]) -> Iterator[Copy]:
    copy = free.get()
    try:
        yield copy
    finally:
        free.put(copy)
