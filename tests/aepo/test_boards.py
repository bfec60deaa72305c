"""TensorBoard and Weights & Biases get the numbers of the run's files, and cannot end a run."""

import json
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from aepo.config import load_config
from aepo.run.directory import RunDirectory
from aepo.run.files import read_records
from aepo.run.log import RunLog

RECORD = {"step": 1, "reward.mean": 0.25, "tools.calls.search": 3, "policy.kl": None, "rollout.branches_per_path": [1]}


def run_log(directory: Path, *settings: str, step: int = 0, resumed: bool = False) -> RunLog:
    config = load_config(None, [f"run.dir={directory}", *settings])
    held = RunDirectory.claim(directory, resume_step=2 if resumed else None)
    return RunLog(held, config, {"model": {}}, step, resumed=resumed)


def logged_records(file: Path) -> Iterator[bytes]:
    """Of a .wandb file: a header of 7 bytes, then blocks of 32 KiB with pieces of records, as in a log of LevelDB."""
    data, at, record = file.read_bytes(), 7, b""
    while len(data) - at >= 7:
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def written(directory: Path) -> list[dict]:
    """What Weights & Biases keeps offline, oldest first: per start who the run is, per call of log what was logged."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    entries = []
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in logged_records(file):
            record = protocol.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                run = record.run
                entries.append({"id": run.run_id, "name": run.display_name, "project": run.project})
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                entries.append({key: value for key, value in values.items() if not key.startswith("_")})
    return entries


def test_wandb_has_the_numbers_of_tensorboard_and_a_resumed_run_continues(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    log = run_log(run, "log.wandb=cities")
    log.step(RECORD)
    log.evaluation({"step": 1, "success": 0.5})
    log.close("finished")
    log.directory.release()
    resumed = run_log(run, "log.wandb=cities", step=1, resumed=True)
    resumed.step({"step": 2, "reward.mean": 0.5})
    resumed.close("finished")
    known = json.loads((run / "run.json").read_text())["wandb_id"]
    begun = {"id": known, "name": str(run), "project": "cities"}
    expected = [
        begun,
        {"reward/mean": 0.25, "tools/calls.search": 3, "step": 1},
        {"heldout/success": 0.5, "step": 1},
        begun,
        {"reward/mean": 0.5, "step": 2},
    ]
    end = time.monotonic() + 60  # on a busy machine its process writes the last of it after `finish`
    while written(run) != expected and time.monotonic() < end:
        time.sleep(0.1)
    assert written(run) == expected
    resumed.directory.release()
    (run / "wandb" / "run-20260101_000000-other").mkdir()
    (run / "wandb" / f"offline-run-20260101_000000-{known}-12").mkdir()  # wandb's name for one in the same second
    held = RunDirectory.claim(run, overwrite=True)
    held.replace_old()
    assert sorted(path.name for path in run.rglob("*")) == [".lock", "run-20260101_000000-other", "wandb"]


def failing_wandb(**methods: object) -> SimpleNamespace:
    run = SimpleNamespace(
        define_metric=lambda *given, **named: None, log=lambda values: None, finish=lambda **named: None
    )
    vars(run).update(methods)
    return SimpleNamespace(init=lambda **named: run, Settings=lambda **named: None, __spec__=object())


@pytest.mark.parametrize("where", ["define_metric", "log", "finish"])
def test_a_failing_wandb_is_one_line_and_the_run_goes_on(where, tmp_path, monkeypatch, capsys):
    def fail(*given: object, **named: object) -> None:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setitem(sys.modules, "wandb", failing_wandb(**{where: fail}))
    log = run_log(tmp_path / "run", "log.wandb=p", "log.tensorboard=false")
    log.step(RECORD)
    log.step({**RECORD, "step": 2})
    log.close("finished")
    warned = "warning: log.wandb: no route to host; nothing more is written there\n"
    assert capsys.readouterr().err == warned
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_wandb_that_is_not_installed_is_said_before_the_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    held = RunDirectory.claim(tmp_path / "run")
    with pytest.raises(ModuleNotFoundError, match=r"log.wandb = 'p' needs wandb, .*: pip install .*\[wandb\]"):
        RunLog(held, load_config(None, ["log.wandb=p"]), {}, 0, resumed=False)
    held.release()
    assert not (tmp_path / "run").exists()


def test_a_deleted_tensorboard_directory_is_one_line_and_the_run_goes_on(tmp_path, capfd):
    log = run_log(tmp_path / "run")
    log.step(RECORD)
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    for step in (2, 3):
        log.step({**RECORD, "step": step})
    log.close("finished")
    printed = capfd.readouterr().err
    assert printed == f"warning: log.tensorboard: {tmp_path}/run/tensorboard is gone; nothing more is written there\n"
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
