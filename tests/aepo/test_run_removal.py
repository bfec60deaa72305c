"""Nothing is removed or moved that no run wrote, and whatever is killed while it does so can be done again."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from disk_toys import recorded
from run_toys import FACTS, add_other_files, content, killed_at, make_run, other_files, steps

from aepo.run.directory import RunDirectory


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
