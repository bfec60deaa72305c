"""What cannot be right in a run directory is said in one line, and nothing has changed by then."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from run_toys import FACTS, content, make_run

from aepo.config import load_config, named_files
from aepo.report import write_report
from aepo.run.directory import RunDirectory
from aepo.run.files import FORMAT, read_facts, read_records
from aepo.run.lock import is_held
from aepo.subject import find_subject


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
