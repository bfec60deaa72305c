"""What has to hold after a fault, whatever it was. Each function returns what does not."""

from __future__ import annotations

import re
from pathlib import Path

from fault import Fault
from runs import STEPS, Ended, Prepared, Truth, command, files_of, run, state_of, status
from test_trainer import outcome

from aepo.config import load_config
from aepo.run.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint

SIGNALLED = 130
STATUSES = ("running", "finished", "interrupted", "failed")  # and another one while a run is being replaced
NOT_BEGUN = ("interrupted", "it had not begun")  # what run.json says, and why, until a run begins


class Foreign:
    """Files of the user's in a run directory: beside ours, behind a link, and, as soon as there are such directories,
    among checkpoints and trees. outside: a directory beside the run's."""

    EARLY = ("notes.txt", "mine/data.bin")
    LATE = ("checkpoints/notes.txt", "checkpoints/step_000001_backup/model.txt", "trees/mine.json")

    def __init__(self, directory: Path, outside: Path) -> None:
        self._directory, self._outside, self._late = directory, outside, outside / "late"

    def plant_early(self) -> None:
        for path in (self._outside / "precious.txt", *(self._directory / name for name in self.EARLY)):
            _write(path)
        (self._directory / "linked").symlink_to(self._outside)

    def plant_late(self) -> None:
        """In the process of the run, which is the one that knows when."""
        there = all((self._directory / name).is_dir() for name in ("checkpoints", "trees"))
        if there and not self._late.exists():
            for path in (*(self._directory / name for name in self.LATE), self._late):
                _write(path)

    def problems(self) -> list[str]:
        names = [*self.EARLY, "linked/precious.txt", *(self.LATE if self._late.exists() else ())]
        changed = [name for name in names if not _is_whole(self._directory / name)]
        if not _is_whole(self._outside / "precious.txt"):
            changed.append("the file behind the link")
        return [f"not the run's, and changed: {', '.join(changed)}"] if changed else []

    @property
    def names(self) -> set[str]:
        return {*self.EARLY, *self.LATE, "linked/precious.txt"}


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"mine: {path.name}\n")


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.read_text() == f"mine: {path.name}\n"


def truth_of(directory: Path, prepared: Prepared) -> Truth:
    """Of the run that is in the directory: which seed it has."""
    config = directory / "config.yaml"
    seed = load_config(config).run.seed if config.exists() and config.stat().st_size else next(iter(prepared.truths))
    return prepared.truths[seed]


def checkpoint_problems(directory: Path, prepared: Prepared) -> list[str]:
    """Each listed one is whole and is the state after its step of an undisturbed run, the same one for all. Not while
    run.json says that the run is being replaced, and none can be resumed."""
    now = status(directory)
    if now is not None and now["status"] not in STATUSES:
        return []
    found, possible = [], list(prepared.truths.values())
    listed = list_checkpoints(directory / "checkpoints")
    for one in listed:
        try:
            verify_checkpoint(one.path)
        except CheckpointError as error:
            found.append(f"listed, but {error}")
            continue
        state = state_of(one.path)
        possible = [truth for truth in possible if truth.states.get(one.step) == state]
    if not possible:
        found.append(f"not the states of an undisturbed run: {', '.join(one.path.name for one in listed)}")
    return found


def ending_problems(fault: Fault, ended: Ended, directory: Path, before: dict | None, steps_then: int) -> list[str]:
    """Exit code, status and what is printed. before: run.json before the command; steps_then: in metrics.jsonl when it
    happened."""
    now = status(directory)
    begun = now is not None and now != before and now["status"] in STATUSES
    name, reason = (now["status"], now.get("reason")) if begun else (None, None)
    problems = []
    if ended.left:
        problems.append("a process is left")
    traces = [word for word in ("Traceback", "Exception ignored") if word in ended.err]
    if traces and fault.kind != "error in a call" and fault.kind != "kill -9":
        problems.append(f"{traces[0]} on stderr")
    code = ended.code
    if code == 0:
        if name != "finished":
            problems.append(f"exit code 0, status {name}")
        if "signal" in fault.kind and steps_then < STEPS - 1:
            problems.append(f"signal lost: it came after step {steps_then}, and the run went on to its end")
        if fault.kind == "error in a call":
            problems.append("error lost: exit code 0")
    elif fault.kind == "kill -9":
        if code != -9:
            problems.append(f"exit code {code}")
        if name not in (None, "running", "finished") and (name, reason) != NOT_BEGUN:
            problems.append(f"killed, status {name}")
        return problems
    elif "signal" in fault.kind or (fault.kind == "output" and code == SIGNALLED):
        if code is None or code < 0:  # before Python handles signals, or when all is done
            if name not in (None, "finished"):
                problems.append(f"exit code {code}, status {name}")
        elif code != SIGNALLED:
            problems.append(f"exit code {code}")
        if name not in (None, "interrupted", "finished") or (name == "finished" and steps_then < STEPS - 1):
            problems.append(f"interrupted, status {name}")
    else:
        if code != 1:
            problems.append(f"exit code {code}")
        if fault.kind != "error in a call" and not re.search("^error: .", ended.err, re.MULTILINE):
            problems.append("no line that says error:")
        if name == "failed" and not reason:
            problems.append("failed, without a reason")
        lasting = fault.persistent or fault.kind == "full disk"
        unchanged = name == "running" or (name, reason) == NOT_BEGUN  # nobody can write another
        if name not in (None, "failed") and not (lasting and unchanged):
            problems.append(f"failed, status {name}")
    return problems


def recovery_problems(directory: Path, prepared: Prepared, logs: Path) -> list[str]:
    """Going on as the documentation says works at once: resume, or begin anew where nothing was saved, or where a run
    was being replaced."""
    arguments: tuple[str, ...] = ("--resume", "RUN")
    now = status(directory)
    if not list_checkpoints(directory / "checkpoints") or (now is not None and now["status"] not in STATUSES):
        anew = ("--overwrite",) if now is not None else ()
        arguments = (*(one for one in prepared.scenario.settings if one != "--overwrite"), *anew)
    ended = run(command(directory, arguments), logs, whole=prepared.scenario.whole)
    if ended.code == 0:
        return []
    return [f"{'resume' if '--resume' in arguments else 'new start'} failed: {last_line(ended.err)}"]


def finished_problems(directory: Path, prepared: Prepared, foreign: set[str]) -> list[str]:
    """After the run was brought to its end: as if nothing had happened."""
    problems, expected = [], truth_of(directory, prepared)
    now = status(directory)
    if now is None or now["status"] != "finished":
        problems.append(f"at the end, status {now and now['status']}")
    for name, got, right in zip(("metrics", "evaluations"), outcome(directory), expected.outcome, strict=True):
        if got != right:
            steps = " ".join(str(record["step"]) for record in got)
            problems.append(f"{name} differ from the undisturbed run's; of steps {steps}")
    last = list_checkpoints(directory / "checkpoints")[-1:]
    if not last or last[0].step != STEPS or state_of(last[0].path) != expected.states[STEPS]:
        problems.append("the last checkpoint is not the undisturbed run's")
    files = {name for name in files_of(directory) if name not in foreign}
    if missing := expected.files - files:
        problems.append(f"missing: {', '.join(sorted(missing))}")
    if extra := files - expected.files:
        problems.append(f"left behind: {', '.join(sorted(extra))}")
    for path in (directory / "checkpoints").iterdir():
        theirs = any(name.startswith(f"checkpoints/{path.name}") for name in foreign)
        if not re.fullmatch(r"step_\d{6,}", path.name) and not theirs:
            problems.append(f"left behind: checkpoints/{path.name}")
    return problems


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing on stderr"])[-1][:300]
