"""The run that faults are put into: the whole `aepo train` command, in a process forked for one try, with the toys of
tests/aepo in the place of a model whose loading would take longer than the run.

A scenario is what lies in the directory before, and the command. `truth` is what its undisturbed run does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from test_trainer import outcome
from trainer_toys import ToyLanguageModel, toy_agent

from aepo import __main__, cli, cli_shared
from aepo.learning.learner import Learner
from aepo.run.checkpoint import list_checkpoints

STEPS = 3
BASE = (
    f"train.steps={STEPS}",
    "train.questions=2",
    "rollout.paths=4",
    "rollout.max_tokens=8",
    "eval.every=2",
    "eval.questions=2",
    "optimizer.learning_rate=1e-2",
    "checkpoint.every=1",
    "checkpoint.keep=2",
    "log.tensorboard=false",
    "log.trees_every=2",
    "log.trees=1",
    "run.threads=1",
    "run.device=cpu",
)
SEVERAL = ("train.minibatches=2", "train.epochs=2", "policy.kl_coef=0.1", "policy.old_logprobs=recompute")
TRY_SECONDS = 300.0  # a fork takes less than one, a program 10, on an idle machine; after this it hangs
ROOT = str(Path(__file__).parents[2])

State = dict[str, str]  # checksum by the name of a weight or moment


@dataclass(frozen=True)
class Scenario:
    """`arguments`: of the command that faults are put into, RUN for the directory. `before`: of the run that is there
    already; it has been interrupted in its last step if `halfway`. `whole`: as a program with the tiny model, whose
    weights are random, not as a fork with toys."""

    name: str
    arguments: tuple[str, ...]
    before: tuple[str, ...] | None = None
    halfway: bool = False
    whole: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """Of a new run."""
        return self.before if self.before is not None and "--resume" in self.arguments else self.arguments


def new(*settings: str) -> tuple[str, ...]:
    return (*BASE, *settings, "run.dir=RUN")


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("one", new()),
        Scenario("several", new(*SEVERAL, "checkpoint.every=2", "log.tensorboard=true")),
        Scenario("resume", ("--resume", "RUN"), new(*SEVERAL), halfway=True),
        Scenario("rewind", ("--resume", "RUN", "--from-step", "1"), new("checkpoint.keep=9")),
        Scenario("overwrite", (*new(), "--overwrite"), new("run.seed=5")),
        Scenario("program", new("warm_start.steps=0", "rollout.max_tokens=24"), whole=True),
    )
}


@dataclass
class Ended:
    """A process of a run. code: as subprocess has it; None: it did not end in time."""

    code: int | None
    out: str
    err: str
    left: bool  # processes of its group lived on
    seconds: float


@dataclass
class Truth:
    """Of an undisturbed run: what each step's state is, what was measured, and which files are left."""

    states: dict[int, State]
    outcome: tuple[list[dict], list[dict]]
    files: set[str]


def command(directory: Path, arguments: Sequence[str]) -> list[str]:
    return ["train", *(argument.replace("RUN", str(directory)) for argument in arguments)]


def start(arguments: Sequence[str], logs: Path, prepare: Callable[[], None] | None = None, whole: bool = False) -> int:
    """Fork a process that calls the command line, after `prepare`; `whole`: that becomes the program. Its process id,
    which is that of a group."""
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        if whole:
            os.environ["PYTHONPATH"] = ROOT
            os.execv(sys.executable, [sys.executable, "-m", "aepo", *arguments])
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.argv = ["aepo", *arguments]
        code = _exit_code(prepare)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def _exit_code(prepare: Callable[[], None] | None) -> int:
    """As the interpreter would make it at the top of a program."""
    try:
        if prepare is not None:
            prepare()
        __main__.main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exc()
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def wait(process: int, logs: Path) -> Ended:
    began = time.monotonic()
    code = None
    while time.monotonic() - began < TRY_SECONDS:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.002)
    left = True
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        left = False
    if code is None:
        os.waitpid(process, 0)
    out, err = ((logs / name).read_text(errors="replace") if (logs / name).exists() else "" for name in ("out", "err"))
    return Ended(code, out, err, left, time.monotonic() - began)


def run(arguments: Sequence[str], logs: Path, prepare: Callable[[], None] | None = None, whole: bool = False) -> Ended:
    return wait(start(arguments, logs, prepare, whole), logs)


def state_of(checkpoint: Path) -> State:
    """Checksums of all weights and moments."""
    return {
        f"{name} of {file}": hashlib.sha256(
            f"{tensor.dtype} {tuple(tensor.shape)}".encode()
            + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for file in ("model.safetensors", "optimizer.safetensors")
        for name, tensor in safetensors.torch.load_file(checkpoint / file).items()
    }


def files_of(directory: Path) -> set[str]:
    """All but what differs from run to run: TensorBoard's have the time in their names, a resumed run sets aside what
    is later than where it begins."""
    files = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return {name for name in files if not re.match(r"tensorboard/|checkpoints/|abandoned/\d+/", name)}


def warm_up(place: Path) -> None:
    """One run in this process, so that those forked from it find everything imported: it halves their time."""
    model = ToyLanguageModel()  # each forked process has its own
    cli_shared.load = lambda config: (toy_agent(), copy.deepcopy(model))
    sys.argv = ["aepo", *command(place / "warm_up", new(*SEVERAL, "log.tensorboard=true"))]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main()
    shutil.rmtree(place / "warm_up")
    end = time.monotonic() + 10  # one that was joined is there a little longer for the kernel
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) == 1, "a process that has threads cannot be forked safely"
    gc.collect()
    gc.freeze()  # else the collector of each forked process would touch, and so copy, all of this one's memory


@dataclass
class Prepared:
    """A scenario with its directory as it is before the command, copied for each try."""

    scenario: Scenario
    directory: Path
    truths: dict[int, Truth] = field(default_factory=dict)  # by run.seed

    def copy_to(self, directory: Path) -> None:
        if self.directory.exists():
            shutil.copytree(self.directory, directory, symlinks=True, dirs_exist_ok=True)
        else:
            directory.mkdir(parents=True, exist_ok=True)


@functools.cache
def truth(settings: Sequence[str], whole: bool, place: Path) -> Truth:
    """settings: of a new run, which is done with all its checkpoints."""
    directory = place / f"truth_{hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}"
    ended = run(
        command(directory, [*settings, "checkpoint.every=1", "checkpoint.keep=99"]), place / "logs", whole=whole
    )
    assert ended.code == 0, ended
    states = {one.step: state_of(one.path) for one in list_checkpoints(directory / "checkpoints")}
    return Truth(states, outcome(directory), files_of(directory))


def interrupt_in_last_step() -> None:
    pack, count = Learner.pack, 0

    def counted(self: Learner, *arguments: object) -> object:
        nonlocal count
        count += 1
        if count == STEPS:
            signal.raise_signal(signal.SIGINT)
        return pack(self, *arguments)  # type: ignore[arg-type]

    Learner.pack = counted  # type: ignore[assignment,method-assign]


def prepare(scenario: Scenario, place: Path) -> Prepared:
    prepared = Prepared(scenario, place / scenario.name)
    if scenario.before is not None:
        fault = interrupt_in_last_step if scenario.halfway else None
        ended = run(command(prepared.directory, scenario.before), place / "logs", fault)
        assert ended.code == (130 if scenario.halfway else 0), ended
    for settings in {scenario.settings, scenario.before or scenario.settings}:
        seed = 5 if "run.seed=5" in settings else 0
        prepared.truths[seed] = truth(_without_saving(settings), scenario.whole, place)
    return prepared


def _without_saving(settings: Sequence[str]) -> tuple[str, ...]:
    """The settings that a truth depends on: how often it is saved, and where shown, changes nothing."""
    return tuple(s for s in settings if not s.startswith(("checkpoint.", "log.tensorboard", "--")))


def records(directory: Path) -> int:
    """How many steps metrics.jsonl has; for the injector, which must not fail where the file is half written."""
    try:
        return (directory / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def status(directory: Path) -> dict | None:
    try:
        return json.loads((directory / "run.json").read_text())
    except FileNotFoundError:
        return None
