"""A run directory: one process holds it, nothing is touched in it that no run wrote, and whatever is killed can be
done again. The other processes are real ones, and so are their deaths."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_toys import full_disk, recorded

from aepo.config import Config, load_config, named_files, to_yaml
from aepo.report import write_report
from aepo.report.reader import read_run
from aepo.report.summary import summary
from aepo.run.directory import RunDirectory
from aepo.run.files import FORMAT, read_facts, read_records
from aepo.run.lock import DirectoryLock, is_held
from aepo.run.log import RunLog
from aepo.run.outputs import refuse_output
from aepo.subject import find_subject

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


def test_a_second_process_is_told_who_holds_the_directory(tmp_path):
    path = tmp_path / "run"
    first = claiming(path)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    expected = rf"run is in use by process {first.pid} on {re.escape(socket.gethostname())} since 20.+: .*python.* -c"
    for refuse in (RunDirectory.claim, RunDirectory.check):
        for options in ({}, {"resume_step": 0}, {"overwrite": True}):
            with pytest.raises(BlockingIOError, match=expected) as error:
                refuse(path, **options)
            assert "\n" not in str(error.value)
    second = claiming(path)
    assert second.communicate()[0].startswith(f"BlockingIOError: {path} is in use by process {first.pid} ")
    first.kill()
    first.wait()
    RunDirectory.claim(path).release()


def test_of_many_that_begin_at_once_one_holds_it(tmp_path):
    for turn in range(3):
        processes = [claiming(tmp_path / str(turn) / "run") for _ in range(5)]
        lines = [process.stdout.readline() for process in processes if process.stdout is not None]
        assert sorted(line == "held\n" for line in lines) == [False] * 4 + [True], lines
        holder = processes[lines.index("held\n")].pid
        assert all(f"in use by process {holder} " in line for line in lines if line != "held\n")
        for process in processes:
            process.kill()
            process.communicate()


def test_a_directory_that_is_given_up_is_not_held_by_the_next(tmp_path):
    """It is removed while others wait for it: what they hold must be there."""
    script = """
import sys, time
from aepo.run.directory import RunDirectory
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        held = RunDirectory.claim(sys.argv[1])
    except BlockingIOError:
        continue
    held.require()
    held.release()
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_what_happened_before_the_lock_was_had_counts(tmp_path, monkeypatch):
    def late(path: Path, **options: bool) -> DirectoryLock:
        make_run(path)  # another process began a run, and ended
        return DirectoryLock(path, **options)

    monkeypatch.setattr("aepo.run.directory.DirectoryLock", late)
    with pytest.raises(FileExistsError, match="already holds a run"):
        RunDirectory.claim(tmp_path / "run")
    assert not is_held(tmp_path / "run")


def test_the_children_of_a_killed_run_do_not_hold_it(tmp_path):
    more = """import subprocess
    one = subprocess.Popen(["sleep", "60"], close_fds=False)
    two = os.fork() or os.execvp("sleep", ["sleep", "60"])
    three = os.fork()
    while not three: sys.stdin.close(); import time; time.sleep(60)
    print(one.pid, two, three, flush=True)"""
    process = claiming(tmp_path / "run", more)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    children = [int(pid) for pid in process.stdout.readline().split()]
    with pytest.raises(BlockingIOError):
        RunDirectory.check(tmp_path / "run")
    process.kill()
    process.wait()
    try:
        assert all(Path(f"/proc/{pid}").exists() for pid in children)
        deadline = time.monotonic() + 30  # a child gives the lock up when it first runs
        while is_held(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.05)
        RunDirectory.claim(tmp_path / "run").release()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_those_who_look_do_not_keep_a_run_from_its_directory(tmp_path):
    """A live report asks again and again."""
    RunDirectory.claim(tmp_path).release()
    script = "import sys, pathlib; from aepo.run.lock import is_held\nwhile True: is_held(pathlib.Path(sys.argv[1]))"
    looking = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            RunDirectory.claim(tmp_path).release()
            assert not is_held(tmp_path), "nor each other"
    finally:
        for process in looking:
            process.kill()
            process.wait()


def test_released_is_free_and_a_start_that_failed_leaves_nothing(tmp_path):
    held = RunDirectory.claim(tmp_path / "runs" / "new")
    with pytest.raises(BlockingIOError, match=rf"in use by this process, {os.getpid()} on"):
        RunDirectory.claim(tmp_path / "runs" / "new")
    held.release()
    held.release()
    assert not (tmp_path / "runs" / "new").exists()
    held = RunDirectory.claim(tmp_path / "runs" / "new")
    (held.path / "notes").write_text("mine")
    (held.path / ".run.json.writing").write_text("")
    (held.path / ".evals.jsonl.writing").symlink_to("notes")
    held.release()
    assert sorted(os.listdir(held.path)) == [".evals.jsonl.writing", ".lock", "notes"]
    (held.path / ".evals.jsonl.writing").unlink()
    (tmp_path / "empty").mkdir()
    RunDirectory.claim(tmp_path / "empty").release()
    assert (tmp_path / "empty").is_dir(), "it was there before"
    link = tmp_path / "link"
    link.symlink_to("runs/new")
    held = RunDirectory.claim(link)
    with pytest.raises(BlockingIOError):
        RunDirectory.claim(tmp_path / "runs" / "new")
    held.release()


def test_a_run_whose_directory_was_replaced_writes_nothing_into_the_other(tmp_path):
    path = tmp_path / "run"
    log = new_log(path)
    shutil.rmtree(path)
    other = RunDirectory.claim(path)
    for write in (lambda: log.step({"step": 1}), log.flush, lambda: log.close("finished")):
        with pytest.raises(FileNotFoundError, match="run: was removed, moved or replaced while this run was going on"):
            write()
    (path / ".run.json.writing").write_text("the other writes this now")
    log.directory.release()
    assert sorted(os.listdir(path)) == [".lock", ".run.json.writing"]
    assert is_held(path)
    other.release()


def broken(path: Path, change: str) -> None:
    make_run(path)
    exec(change, {"path": path, "json": json, "facts": FACTS})


@pytest.mark.parametrize(
    ("mode", "change", "error", "message"),
    [
        ("new", "", FileExistsError, "run already holds a run: continue it with --resume .*run, replace it with"),
        ("new", "(path / 'run.json').unlink()", FileExistsError, "run has config.yaml, metrics.jsonl, evals.jsonl, "),
        ("overwrite", "(path / 'run.json').unlink()", FileExistsError, "and no run.json that says so: move them away"),
        ("resume", "(path / 'run.json').unlink()", ValueError, "expected a run, whose run.json can be read"),
        (
            "replace",
            "(path / 'run.json').write_text('{\"a\": 1}')",
            ValueError,
            "json: expected that of a run.*: move it",
        ),
        ("replace", "(path / 'run.json').write_text('')", ValueError, "whose run.json can be read: .*: move it away"),
        (
            "overwrite",
            "(path / 'checkpoints/step_000020/notes').write_text('mine')",
            ValueError,
            "step_000020/notes: expected only what the run wrote in a checkpoint: move it away",
        ),
        (
            "overwrite",
            "p = path / 'abandoned/1/checkpoints'; p.mkdir(parents=True); s = path / 'checkpoints/step_000030';"
            "(s / 'mine').mkdir(); s.rename(p / s.name)",
            ValueError,
            "abandoned/1/checkpoints/step_000030/mine: expected only what the run wrote in a checkpoint: move it away",
        ),
        (
            "overwrite",
            "p = path / 'checkpoints'; (p / '.replaced_000020').mkdir(); (p / '.replaced_000020/mine').touch()",
            ValueError,
            "checkpoints/.replaced_000020: expected a checkpoint with a list of its files, SHA256SUMS: move it away",
        ),
        (
            "overwrite",
            "(path / 'checkpoints/step_000020/SHA256SUMS').unlink()",
            ValueError,
            "step_000020: expected a checkpoint with a list of its files, SHA256SUMS: move it away",
        ),
        ("resume", "(path / 'run.json').write_text('[]')", ValueError, "run.json: expected an object, got list"),
        (
            "resume",
            "(path / 'run.json').write_text(json.dumps({**facts, 'version': 99}))",
            ValueError,
            rf"run.json: expected version {FORMAT} or below, got 99: a newer aepo wrote it",
        ),
        (
            "resume",
            f"(path / 'run.json').write_text(json.dumps({{**facts, 'version': {FORMAT + 1}}}))",
            ValueError,
            "a newer aepo wrote it",
        ),
        (
            "any",
            "(path / 'trees').rename(path / 't'); (path / 'trees').symlink_to('t')",
            ValueError,
            "trees: expected a folder, as a run has there, got a link",
        ),
        (
            "any",
            "(path / 'checkpoints/step_000040').symlink_to('step_000010')",
            ValueError,
            "step_000040: expected a folder, as a run has there, got a link",
        ),
        (
            "any",
            "(path / '.evals.jsonl.writing').symlink_to('x')",
            ValueError,
            "writing: expected a file, .* got a link",
        ),
        ("any", "(path / 'report.html').symlink_to('config.yaml')", ValueError, "expected a file, .* got a link"),
        ("any", "(path / 'report.html').mkdir()", ValueError, "report.html: expected a file, .* got a folder"),
        ("any", "(path / 'wandb').write_text('')", ValueError, "wandb: expected a folder, .* got a file"),
        ("any", "(path / 'abandoned').symlink_to('/tmp')", ValueError, "abandoned: expected a folder, .* got a link"),
        ("any", "(path / '.lock').symlink_to('/tmp/x')", ValueError, ".lock: expected a file, .* got a link"),
        ("any", "(path / '.lock').write_text('mine')", ValueError, ".lock: expected that of a run: move it away"),
        (
            "resume",
            "(path / 'config.yaml').write_text('')",
            ValueError,
            "config.yaml: expected all .*, is empty; .*run.y",
        ),
        (
            "resume",
            "p = path / 'config.yaml'; p.write_text(p.read_text()[:-4])",
            ValueError,
            "config.yaml: expected all settings of the run, is cut off; .*step_000030/run.yaml is whole",
        ),
        (
            "resume",
            "p = path / 'config.yaml'; p.write_text(p.read_text().replace('  seed:', '  #', 1))",
            ValueError,
            r"config.yaml: expected all settings of the run, lacks run.seed; .*run.yaml has them",
        ),
        (
            "resume",
            "p = path / 'metrics.jsonl'; p.write_text(p.read_text().replace('5}', '5'))",
            ValueError,
            "metrics.jsonl, line 5: not a record",
        ),
        (
            "resume",
            "(path / 'evals.jsonl').write_text('{}\\n')",
            ValueError,
            "evals.jsonl, line 1: expected a record with",
        ),
    ],
)
def test_what_cannot_be_right_is_one_line_and_changes_nothing(mode, change, error, message, tmp_path):
    path = tmp_path / "run"
    broken(path, change)
    before = content(path)
    several = {"any": ("new", "overwrite", "resume"), "replace": ("new", "overwrite")}
    for kind in several.get(mode, (mode,)):
        for refuse in (RunDirectory.check, RunDirectory.claim):
            with pytest.raises(error, match=message) as refused:
                refuse(path, resume_step=0 if kind == "resume" else None, overwrite=kind == "overwrite")
            assert "\n" not in str(refused.value)
    assert content(path) == before


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(ValueError, match="expected a directory, or nothing"):
            RunDirectory.claim(tmp_path / name)


def test_resuming_creates_nothing(tmp_path):
    with pytest.raises(ValueError, match="expected a run"):
        RunDirectory.claim(tmp_path / "new", resume_step=0)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_an_older_version_are_enough(tmp_path):
    """It wrote fewer keys, into both files; config.yaml alone is rewritten where a run is resumed with others."""
    make_run(tmp_path / "run")
    files = [tmp_path / "run" / "config.yaml", *tmp_path.glob("run/checkpoints/*/run.yaml")]
    for file in files:
        file.write_text(re.sub("  seed: .*\n", "", file.read_text()))
    files[0].write_text(files[0].read_text().replace("steps: ", "steps: 1"))
    RunDirectory.check(tmp_path / "run", resume_step=0)


def test_no_evaluation_with_defaults_in_place_of_settings_that_are_lost(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config.yaml: expected all settings of the run, is empty"):
        find_subject(str(tmp_path / "run"), None, [])


def test_replacing_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    RunDirectory.claim(path, resume_step=0).set_aside(20)
    (path / ".run.json.writing").touch()
    (path / "checkpoints" / ".writing_000010").mkdir()
    (path / ".engine-abcd_123").mkdir()
    add_other_files(path)
    others = other_files(path)
    held = RunDirectory.claim(path, overwrite=True)
    assert len(content(path)) > len(others), "claiming removes nothing"
    held.replace_old()
    assert content(path) == others
    held.release()
    RunDirectory.claim(path)


def test_replacing_removes_the_files_of_its_own_run_from_wandb(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    (path / "run.json").write_text(json.dumps({**FACTS, "wandb_id": "abcd"}))
    for name in ("offline-run-1-abcd", "run-2-abcd", "run-3-abcd1234", "run-4-other"):
        (path / "wandb" / name).mkdir(parents=True)
    for name in ("run-2-abcd", "run-3-abcd1234"):
        (path / "wandb" / f"latest-{name}").symlink_to(name)
    (path / "wandb" / "debug.log").symlink_to("run-2-abcd/logs/debug.log")
    with RunDirectory.claim(path, overwrite=True) as held:
        held.replace_old()
    assert sorted(os.listdir(path / "wandb")) == ["latest-run-3-abcd1234", "run-3-abcd1234", "run-4-other"]


def test_a_killed_replacement_can_be_repeated_and_is_not_resumed(tmp_path):
    """At every single file that it removes."""
    old = tmp_path / "old"
    make_run(old, steps=12)
    with RunDirectory.claim(old, resume_step=0) as held:
        held.set_aside(5)
    add_other_files(old)
    others = other_files(old)
    for count in range(1, 100):
        path = tmp_path / str(count)
        shutil.copytree(old, path, symlinks=True)
        held = RunDirectory.claim(path, overwrite=True)
        before, killed = content(path), killed_at(count, held.replace_old)
        held.release()
        now = content(path)
        assert other_files(path) == others
        if "run.json" in now:
            with pytest.raises(FileExistsError, match="--overwrite"):
                RunDirectory.check(path)
            if {**now, ".run.json.writing": ""} != {**before, ".run.json.writing": ""}:
                with pytest.raises(ValueError, match="was being replaced by --overwrite, which did not end"):
                    RunDirectory.check(path, resume_step=0)
        else:
            assert now == others
            RunDirectory.check(path)
        held = RunDirectory.claim(path, overwrite=True)
        held.replace_old()
        held.release()
        assert content(path) == others
        if not killed:
            break
        shutil.rmtree(path)
    assert count > 15


def steps(file: Path) -> list[int]:
    return [record["step"] for record in read_records(file)]


def test_what_is_later_than_the_step_is_set_aside(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 36, "policy.lo')  # the line that was being written
    add_other_files(path)
    others = other_files(path)
    before = content(path)
    held = RunDirectory.claim(path, resume_step=0)
    assert held.set_aside(20) == path / "abandoned" / "4"
    assert (steps(path / "metrics.jsonl"), steps(path / "evals.jsonl")) == ([*range(1, 21)], [0, 10, 20])
    aside = path / "abandoned" / "4"
    assert (aside / "metrics.jsonl").read_text().endswith('{"step": 35}\n{"step": 36, "policy.lo')
    assert steps(aside / "metrics.jsonl") == [*range(21, 36)]
    assert steps(aside / "evals.jsonl") == [30]
    for name in ("checkpoints/step_000030/run.yaml", "trees/step_000030.json", "answers/step_000030.jsonl"):
        assert (aside / name).read_text() == before[name]
        assert not (path / name).exists()
        kept = name.replace("30", "20")
        assert (path / kept).read_text() == before[kept]
    assert other_files(path) == others
    assert held.set_aside(20) is None
    assert held.set_aside(0) == path / "abandoned" / "5"
    assert sorted(one.name for one in path.glob("checkpoints/step_??????")) == ["step_000000"]
    assert steps(path / "abandoned/5/metrics.jsonl") == [*range(1, 21)]


def test_the_order_of_setting_aside_is_that_of_the_disk(tmp_path, monkeypatch):
    """Checkpoints are on the disk in their new place before their records are, and all before it counts as done."""
    path = tmp_path / "run"
    make_run(path)
    with RunDirectory.claim(path, resume_step=0) as held:
        events = recorded(monkeypatch)
        held.set_aside(10)
    checkpoints = ["rename step_000030 step_000030", "rename step_000020 step_000020"]
    assert events[:5] == [*checkpoints, "flush .unfinished", "flush checkpoints", "flush checkpoints"]
    assert events[5] == f"flush .metrics.jsonl.writing {(path / 'abandoned/1/metrics.jsonl').stat().st_size}"
    assert events[-2:] == ["rename .unfinished 1", "flush abandoned"]


def test_a_killed_setting_aside_can_be_repeated_and_loses_nothing(tmp_path):
    """At every single change. In between, every checkpoint that is there has its records."""
    old = tmp_path / "old"
    make_run(old)
    whole = content(old)
    texts = {text for name, text in whole.items() if "step_" in name}
    for count in range(1, 100):
        for again in (10, 0):  # the same step, and one before it
            path = tmp_path / f"{count}-{again}"
            shutil.copytree(old, path)
            held = RunDirectory.claim(path, resume_step=0)
            killed = killed_at(count, lambda held=held: held.set_aside(10))
            there = [int(one.name[5:]) for one in path.glob("checkpoints/step_*")]
            assert sorted(there) == [*range(0, max(there) + 1, 10)], "those that are left are the oldest"
            assert set(range(1, max(there) + 1)) <= set(steps(path / "metrics.jsonl"))
            assert set(range(0, max(there) + 1, 10)) <= set(steps(path / "evals.jsonl"))
            held.release()
            held = RunDirectory.claim(path, resume_step=0)
            held.set_aside(again)
            held.release()
            for name, first in (("metrics.jsonl", 1), ("evals.jsonl", 0)):
                aside = [step for n in (1, 2) for step in steps(path / f"abandoned/{n}/{name}")]
                assert steps(path / name) == [step for step in steps(old / name) if step <= again]
                assert sorted(aside + steps(path / name)) == steps(old / name), (count, again, first)
            assert texts == {text for name, text in content(path).items() if "step_" in name}
            assert not [name for name in content(path) if "/." in name or name.startswith(".")]
            shutil.rmtree(path)
        if not killed:
            break
    assert count > 8


def test_what_a_killed_run_was_writing_is_removed_when_it_is_resumed(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    before = content(path)
    for name in (".run.json.writing", "trees/.step_000040.json.writing", "answers/.step_000040.jsonl.writing"):
        (path / name).touch()
    for name in ("checkpoints/.writing_000040/x", "checkpoints/.replaced_000030/x", ".engine-a1b2c3d4/x"):
        (path / name).mkdir(parents=True)
    (path / "checkpoints" / "step_000020").rename(path / "checkpoints" / ".replaced_000020")
    for name in ("notes/1", "notes/2"):
        (path / "checkpoints" / ".replaced_000010" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "checkpoints" / ".replaced_000010" / name).write_text(name)
        before[f"checkpoints/step_000010/{name}"] = name
    before["checkpoints/step_000030/x"] = "empty"  # not in a list, so nobody knows whose it was
    held = RunDirectory.claim(path, resume_step=0)
    assert held.set_aside(40) is None
    assert content(path) == before, "and the only copy of step 20 is put back"


def new_log(path: Path) -> RunLog:
    config = load_config(None, ["log.tensorboard=false"])
    return RunLog(RunDirectory.claim(path), config, {}, 0, resumed=False)


def test_a_record_that_cannot_be_written_is_kept_whole(tmp_path):
    log = new_log(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    log.step({"step": 1, "text": "a" * 100})
    size = file.stat().st_size
    with full_disk(size + 20):
        for step in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                log.step({"step": step, "text": "b" * 100})
        with pytest.raises(OSError, match="File too large"):
            log.evaluation({"step": 3, "success": 0.5, "text": "c" * 200})
        assert file.stat().st_size == size, "no half line"
        assert [record["step"] for record in log.evaluations()] == [3]
        with pytest.raises(OSError, match="File too large"):
            log.flush()
    log.flush()
    log.flush()
    assert steps(file) == [1, 2, 3]
    assert steps(tmp_path / "run" / "evals.jsonl") == [3]


def test_a_run_that_lacks_records_has_not_finished(tmp_path):
    log = new_log(tmp_path / "run")
    log.step({"step": 1, "text": "a" * 10_000})
    with full_disk(9_000):  # run.json fits
        with pytest.raises(OSError, match="File too large"):
            log.step({"step": 2})
        log.close("finished")
    facts = read_facts(tmp_path / "run")
    assert facts["status"] == "failed"
    assert facts["reason"].startswith("metrics.jsonl lacks step 2: [Errno 27] File too")


def test_what_is_written_as_a_whole_stays_whole(tmp_path):
    log = new_log(tmp_path / "run")
    log.trees(1, [], [], vocab_size=5, temperature=1.0, decode=str)
    before = content(tmp_path / "run")
    for write in (
        lambda: log.trees(1, [], [], vocab_size=6, temperature=1.0, decode=str),
        lambda: log.close("finished"),
    ):
        with full_disk(10), pytest.raises(OSError, match="File too large"):
            write()
        assert content(tmp_path / "run") == before


def test_a_run_that_ends_while_it_is_set_up_says_so(tmp_path):
    held = RunDirectory.claim(tmp_path / "run")
    with full_disk(1_500), pytest.raises(OSError, match="File too large"):  # run.json fits, config.yaml does not
        RunLog(held, Config(), {}, 0, resumed=False)
    held.release()
    assert read_facts(tmp_path / "run")["status"] == "failed"
    RunDirectory.check(tmp_path / "run", overwrite=True)


def test_a_cut_off_line_is_left_out_at_the_end_only(tmp_path):
    file = tmp_path / "records.jsonl"
    assert read_records(file) == []
    for tail in ('{"st', '{"step": 2}', "\0\0\0\0"):
        file.write_text('{"step": 1, "a": "\u2028"}\n' + tail)
        assert [record["step"] for record in read_records(file)] == [1]
    for middle in ('{"st', "", "[1]", "3", "\0"):
        file.write_text(f'{{"step": 1}}\n{middle}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match=r"records.jsonl, line 2: not a record"):
            read_records(file)


def test_a_resumed_run_reads_like_one(tmp_path):
    path = tmp_path / "run"
    log = RunLog(RunDirectory.claim(path), Config(), {"model": {}}, 0, resumed=False)
    for step in (1, 2, 3):
        log.step({"step": step, "policy.loss": float("nan"), "rollout.branches_per_path": [step]})
        log.evaluation({"step": step, "success": step / 10})
        log.trees(step, [], [], vocab_size=5, temperature=1.0, decode=str)
    log.close("failed", "power cut")
    log.directory.release()
    held = RunDirectory.claim(path, resume_step=0)
    held.set_aside(2)
    resumed = RunLog(held, Config(), {"model": {}}, 2, resumed=True, changed=["a was 1 and is 2"])
    assert (read_facts(path)["status"], read_facts(path)["reason"]) == ("interrupted", "it had not begun")
    resumed.begin()
    assert (read_facts(path)["status"], read_facts(path)["reason"]) == ("running", None)
    resumed.step({"step": 3, "policy.loss": 0.5})
    resumed.close("finished")
    records = read_records(path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[0] == {"step": 1, "policy.loss": None, "rollout.branches_per_path": [1]}
    assert [record["step"] for record in resumed.evaluations()] == [1, 2]
    assert sorted(file.stem for file in (path / "trees").iterdir()) == ["step_000001", "step_000002"]
    facts = read_facts(path)
    assert (facts["status"], facts["reason"]) == ("finished", None)
    assert [entry["changed"] for entry in facts["resumed"]] == [["a was 1 and is 2"]]
    assert facts["versions"]["torch"]
    assert facts["machine"]["cores"] >= 1


def test_the_report_says_whether_a_run_goes_on_or_was_killed(tmp_path):
    path = tmp_path / "run"

    def progress() -> str:
        return summary(read_run(path, "run"))["progress"]

    more = "import shutil; shutil.copytree(sys.argv[1] + '-files', sys.argv[1], dirs_exist_ok=True); print(flush=True)"
    make_run(tmp_path / "run-files")
    for file in ("metrics.jsonl", "evals.jsonl"):
        text = (tmp_path / "run-files" / file).read_text()
        (tmp_path / "run-files" / file).write_text(text.replace("}", ', "success": 0.5}'))
    process = claiming(path, more)
    assert process.stdout is not None
    assert process.stdout.readline() + process.stdout.readline() == "held\n\n"
    assert progress().endswith("35 of 40 steps, still going")
    process.kill()
    process.wait()
    assert progress().endswith("35 of 40 steps, ended without a word: killed, or the disk was full")
    (path / ".lock").write_text((path / ".lock").read_text().replace(socket.gethostname(), "elsewhere"))
    assert progress().endswith("still going (or it died without a word)")


def test_trees_and_answers_that_could_not_be_written_are_tried_again(tmp_path):
    path = tmp_path / "run"
    log = RunLog(RunDirectory.claim(path), Config(), {"model": {}}, 0, resumed=False)
    for folder in ("trees", "answers"):
        (path / folder).write_text("in the way")
    with pytest.raises(FileExistsError):
        log.trees(1, [], [], vocab_size=5, temperature=1.0, decode=str)
    with pytest.raises(FileExistsError):
        log.answers(1, [])
    with pytest.raises(FileExistsError):
        log.flush()
    (path / "trees").unlink()
    log.close("finished")
    assert json.loads((path / "trees" / "step_000001.json").read_text())["step"] == 1
    facts = read_facts(path)
    assert facts["status"] == "failed"
    assert "answers/step_000001.jsonl is not there" in facts["reason"]
    (path / "answers").unlink()
    log.flush()
    assert (path / "answers" / "step_000001.jsonl").exists()


OWN_FILES = (
    "run.json config.yaml metrics.jsonl evals.jsonl .lock .run.json.writing trees/step_000007.json trees/new "
    "answers/step_000010.jsonl checkpoints/step_000010/run.yaml checkpoints/new tensorboard/new "
    "abandoned/1/evals.jsonl wandb/new link/metrics.jsonl ../other/../run/metrics.jsonl to_a_file to_a_new_file"
)


@pytest.mark.parametrize("name", OWN_FILES.split())
@pytest.mark.parametrize("damaged", [False, True])
def test_no_output_is_written_over_the_files_of_a_run(name, damaged, tmp_path):
    path = tmp_path / "run"
    make_run(path)
    RunDirectory.claim(path, resume_step=0).release()
    (tmp_path / "other").mkdir()
    (path / "link").symlink_to(".")
    (path / "to_a_file").symlink_to("metrics.jsonl")
    (path / "to_a_new_file").symlink_to("trees/step_000099.json")
    if damaged:
        (path / "run.json").write_text("{")
    before = content(path)
    for refuse in (lambda: refuse_output("--out", path / name), lambda: write_report([path], path / name)):
        with pytest.raises(
            ValueError, match=f"^--out {path / name}: expected another place, .*run is a run"
        ) as refused:
            refuse()
        assert "\n" not in str(refused.value)
    assert content(path) == before


@pytest.mark.parametrize("target", ["run/metrics.jsonl", "other/run.json", "other/checkpoints/new"])
def test_no_page_is_written_through_a_link_to_the_files_of_a_run(target, tmp_path):
    for name in ("run", "other"):
        make_run(tmp_path / name)
        RunDirectory.claim(tmp_path / name, resume_step=0).release()
    runs = [tmp_path / "run", tmp_path / "other"]
    for page, reported in ((tmp_path / "run" / "report.html", runs[:1]), (tmp_path / "report.html", runs)):
        page.symlink_to(tmp_path / target)
        before = content(tmp_path)
        with pytest.raises(ValueError, match=f"^report {page}: expected another place, .* is a run"):
            write_report(reported)
        assert content(tmp_path) == before


@pytest.mark.parametrize("resume_step", [None, 20])
def test_what_settings_name_is_not_removed(resume_step, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    with RunDirectory.claim(tmp_path / "run", resume_step=0) as held:
        held.set_aside(30)
    named = {
        "model.name": "run/checkpoints/step_000030",
        "task.train": "run/answers/*30.jsonl",
        "task.heldout": "[run/../run/answers/step_000030.jsonl]",
        "task.system": "run/trees/step_000030.json",
        "task.tools": "['python', 'search:run/answers/step_000030.jsonl']",
    }

    def begin(run: str, step: int | None, *settings: str) -> None:
        needed = named_files(load_config(None, ["task.name=files", *settings]))
        RunDirectory.check(Path(run), resume_step=step, overwrite=step is None, needed=needed)

    before = content(tmp_path / "run")
    for setting, value in named.items():
        with pytest.raises(
            ValueError, match=f"^{setting}: expected files that stay, .* run/.*30.*: copy it"
        ) as refused:
            begin("run", resume_step, f"{setting}={value}")
        assert "\n" not in str(refused.value)
        begin("run", 30, f"{setting}={value}")
        begin("elsewhere", None, f"{setting}={value}")
    if resume_step is None:
        with pytest.raises(ValueError, match=r"^task.train: .*--overwrite removes run/abandoned/1/metrics.jsonl"):
            begin("run", None, "task.train=run/abandoned/1/metrics.jsonl")
    assert not is_held(tmp_path / "run")
    assert content(tmp_path / "run") == before
    (tmp_path / "run" / "answers" / "mine.jsonl").touch()
    begin("run", resume_step, "task.train=run/answers/mine.jsonl", "model.name=tiny", "task.system=~ a\0* **/**")


def test_outputs_beside_the_files_of_a_run_are_written(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    with RunDirectory.claim(path, resume_step=0) as held:
        held.set_aside(20)
        for name in ("report.html", "numbers.json", "metrics.jsonl.bak", "abandoned/1/report.html", "../metrics.jsonl"):
            refuse_output("--out", path / name)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "run.json").write_text('{"success": 1}')
    refuse_output("--json", tmp_path / "no-run" / "run.json")


@pytest.mark.parametrize(
    "folder", ["abandoned/7", "abandoned/.unfinished", "checkpoints", "checkpoints/.writing_000010"]
)
def test_no_run_begins_where_another_keeps_its_files(folder, tmp_path):
    make_run(tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=f"run.dir = .*{folder}: expected another place, .*run is a run"):
        RunDirectory.claim(tmp_path / "run" / folder)
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize(
    "folder", ["abandoned/7", "abandoned/.unfinished", "checkpoints/.writing_000010", ".engine-abcdefgh"]
)
def test_another_run_in_what_is_removed_is_not_replaced(folder, tmp_path):
    """Copied there, or begun with an earlier version."""
    make_run(tmp_path / "copy")
    RunDirectory.claim(tmp_path / "copy", resume_step=0).release()
    make_run(tmp_path / "run")
    shutil.copytree(tmp_path / "copy", tmp_path / "run" / folder)
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=f"{folder}.*: expected only what .* away"):
        RunDirectory.claim(tmp_path / "run", overwrite=True)
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["/proc/x/y", "file/run", "file/deep/run", "x" * 300, "loop/run"])
def test_a_directory_that_cannot_be_made_is_said_before_the_work(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"^run.dir = .*: expected a directory that can be made, locked and written: \w"):
        RunDirectory.check(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


READ_ONLY = """
import os, sys
from aepo.run.directory import RunDirectory
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
for path, step in ((sys.argv[1], 0), (sys.argv[2], None)):
    try:
        RunDirectory.check(path, resume_step=step)
        print("accepted")
    except PermissionError as error:
        print(error)
"""


@pytest.mark.parametrize("what", ["directory", ".lock"])
def test_a_directory_that_cannot_be_written_is_said_before_the_work(what, tmp_path):
    path = tmp_path / "run"
    make_run(path)
    RunDirectory.claim(path, resume_step=0).release()
    for parent in tmp_path.parents:  # of pytest, for its user alone
        if parent.stat().st_uid == os.geteuid() and "pytest" in parent.name:
            parent.chmod(0o755)
    tmp_path.chmod(0o555)
    path.chmod(0o555 if what == "directory" else 0o777)
    (path / ".lock").chmod(0o666 if what == "directory" else 0o444)
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(path), str(tmp_path / "new" / "run")], capture_output=True, text=True
        )
    finally:
        tmp_path.chmod(0o755)
        path.chmod(0o755)
    expected = rf"run.dir = {path}: expected a directory that can be made, locked and written: Permission denied.*\n"
    expected += rf"run.dir = {tmp_path}/new/run: expected .* and written: Permission denied.*\n"
    assert re.fullmatch(expected, done.stdout), done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["run"]


def test_a_start_that_failed_leaves_no_parents_that_it_made(tmp_path):
    RunDirectory.check(tmp_path / "a" / "b" / "run")
    held = RunDirectory.claim(tmp_path / "a" / "b" / "run")
    (tmp_path / "a" / "notes").touch()
    held.release()
    assert os.listdir(tmp_path / "a") == ["notes"]


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "config.yaml", "report.html", ".lock", "trees/step_000010.json"]
)
def test_a_pipe_in_a_run_is_refused_and_not_waited_for(name, tmp_path):
    path = tmp_path / "run"
    make_run(path)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    for call in (
        lambda: RunDirectory.claim(path, resume_step=0),
        lambda: RunDirectory.claim(path, overwrite=True),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected a file, as a run has there, got a pipe"):
            call()
    if name in ("run.json", "metrics.jsonl"):
        read = {"run.json": lambda: read_facts(path), "metrics.jsonl": lambda: read_records(path / name)}[name]
        with pytest.raises((ValueError, OSError), match=f"{name}: expected a file, got a pipe"):
            read()
    if name == "config.yaml":
        with pytest.raises(OSError, match=r"config.yaml: expected a file, got a pipe"):
            find_subject(str(path), None, [])
    with pytest.raises((ValueError, OSError)):  # no number in it; it is read to the end
        write_report([path])


def test_a_full_disk_is_named_with_the_file(tmp_path):
    log = new_log(tmp_path / "run")
    with full_disk(10):
        with pytest.raises(OSError, match=r"metrics.jsonl"):
            log.step({"step": 1, "text": "b" * 100})
        with pytest.raises(OSError, match=r"trees/step_000001.json"):
            log.trees(1, [], [], vocab_size=5, temperature=1.0, decode=str)
