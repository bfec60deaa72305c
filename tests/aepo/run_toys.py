"""Run directories as a killed run leaves them, processes that hold one, and what is in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from aepo.config import Config, load_config, to_yaml
from aepo.run.directory import RunDirectory
from aepo.run.files import FORMAT, read_records
from aepo.run.log import RunLog

CLAIM = """
import os, sys
from aepo.run.directory import RunDirectory
try:
    held = RunDirectory.claim(sys.argv[1])
except OSError as error:
    print(f"{type(error).__name__}: {error}")
else:
    print("held", flush=True)
    {more}
    sys.stdin.readline()
"""
FACTS = {"version": FORMAT, "started": "now", "status": "running", "resumed": [], "wall_seconds": None}


def claiming(path: Path, more: str = "pass") -> subprocess.Popen[str]:
    script = CLAIM.replace("{more}", more)
    command = [sys.executable, "-c", script, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def make_run(path: Path, steps: int = 35, every: int = 10) -> None:
    """What a run of so many steps leaves that was killed."""
    config = to_yaml(Config())
    for folder in ("trees", "answers", "tensorboard", *(f"checkpoints/step_{s:06d}" for s in range(0, steps, every))):
        (path / folder).mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(FACTS))
    (path / "config.yaml").write_text(config)
    (path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, steps + 1)))
    (path / "evals.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(0, steps, every)))
    (path / "tensorboard" / "events.out.tfevents.1.host").touch()
    for step in range(0, steps, every):
        (path / "answers" / f"step_{step:06d}.jsonl").write_text(f"answers {step}\n")
        (path / "trees" / f"step_{step:06d}.json").write_text(f"trees {step}\n")
        (path / "checkpoints" / f"step_{step:06d}" / "run.yaml").write_text(config)
        (path / "checkpoints" / f"step_{step:06d}" / "SHA256SUMS").write_text(f"{step:064}  run.yaml\n")


def add_other_files(path: Path) -> None:
    """Of the user, as near to ours as they get. `latest` is a link to a checkpoint."""
    names = "notes.txt metrics.jsonl.bak trees/step_1.json trees/step_000010.json.bak answers/readme wandb/mine"
    names += " checkpoints/step_000010_backup/run.yaml checkpoints/step_000010_1/x checkpoints/step_10/x"
    names += " checkpoints/step_0000010/x checkpoints/step_000010.tar.gz checkpoints/notes tensorboard/mine"
    names += " abandoned/mine abandoned/01/metrics.jsonl abandoned/3 .writing_000010 trees/.writing_000010"
    names += " .engine-of-mine/x .run.json.writing.mine trees/.step_000010.json.writing.bak"
    for name in names.split():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    (path / "checkpoints" / "latest").symlink_to("step_000010")


def content(path: Path) -> dict[str, str]:
    """Of every file, link and empty folder."""
    found = {}
    for one in sorted(path.rglob("*")):
        name = str(one.relative_to(path))
        if one.is_symlink():
            found[name] = f"-> {os.readlink(one)}"
        elif one.is_file() and name != ".lock":
            found[name] = one.read_text()
        elif one.is_dir() and not any(one.iterdir()):
            found[name] = "empty"
    return found


def other_files(path: Path) -> dict[str, str]:
    return {name: text for name, text in content(path).items() if text == name or text.startswith("->")}


def killed_at(count: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that dies, by kill -9, before its `count`-th change of a file or folder. False: it made
    fewer."""
    child = os.fork()
    if child == 0:
        changes = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal changes
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir"):
                changes += 1
                if changes == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def new_log(path: Path) -> RunLog:
    config = load_config(None, ["log.tensorboard=false"])
    return RunLog(RunDirectory.claim(path), config, {}, 0, resumed=False)


def steps(file: Path) -> list[int]:
    return [record["step"] for record in read_records(file)]
