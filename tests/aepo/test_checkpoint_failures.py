"""Whatever ends a save, what was there before is still there, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_toys import checkpoints, names, save, trained
from disk_toys import flushed, recorded
from transformers import PreTrainedConfig

from aepo.run.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint


class Stop(BaseException):
    pass


CALLS = ("open", "write_text", "mkdir", "rename", "fsync", "view", "dumps", "save_pretrained", "iterdir", "is_file")


def failing(monkeypatch: pytest.MonkeyPatch, call: str, at: int, error: BaseException) -> list[int]:
    """From now on the call with this name fails the `at`-th time. Returns a list that grows with every call."""
    target: object = {"fsync": os, "dumps": json, "view": torch.Tensor, "save_pretrained": PreTrainedConfig}.get(
        call, Path
    )
    real, count = getattr(target, call), []

    def maybe(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        if len(count) == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(target, call, maybe)
    return count


def raised_by(function: Callable[[], None]) -> BaseException | None:
    try:
        function()
    except BaseException as error:
        return error
    return None


ERRORS = (OSError(5, "disk"), MemoryError(), RuntimeError("two\nlines"), Stop())


@pytest.mark.parametrize("call", CALLS)
def test_whatever_fails_while_saving_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """At every one of these calls, with the errors in turn; with each of them at the first."""
    save(tmp_path, 1)
    before = (save(tmp_path, 2, success=0.5) / "SHA256SUMS").read_text()
    toy, optimizer = trained(1)

    def write() -> None:
        checkpoints(tmp_path, toy, optimizer).save(2, 0.7)

    failed = 0
    for at, error in [*((1, error) for error in ERRORS), *((at, ERRORS[at % 4]) for at in range(2, 200))]:
        with monkeypatch.context() as patch:
            count = failing(patch, call, at, error)
            raised = raised_by(write)
        if raised is not None:
            failed += 1
            assert type(raised) is (Stop if isinstance(error, Stop) else CheckpointError)
            assert "\n" not in str(raised)
        verify_checkpoint(tmp_path / "step_000001")
        verify_checkpoint(tmp_path / "step_000002")
        changed = (tmp_path / "step_000002" / "SHA256SUMS").read_text() != before
        if len(count) < at:
            break
        if not changed:
            assert names(tmp_path) == ["step_000001", "step_000002"]
        else:  # it failed after the checkpoint was there, while it tidied up
            save(tmp_path, 2, success=0.5)
            assert names(tmp_path) == ["step_000001", "step_000002"]
    assert failed > 0
    assert changed, "the last one went through"


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_between_two_renames_costs_nothing(tmp_path: Path, at: int) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, success=0.5)
    toy, optimizer = trained()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the others are not in a child
        real, count = Path.rename, []

        def rename(*args: Any) -> Path:
            count.append(1)
            if len(count) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        Path.rename = rename
        try:
            checkpoints(tmp_path, toy, optimizer).save(2, None)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / ".writing_000002").is_dir(), "it was killed while it saved"
    assert [(c.step, c.heldout_success) for c in list_checkpoints(tmp_path)] == [(1, None), (2, 0.5)]
    assert checkpoints(tmp_path, *trained()).load(2).name.endswith("_000002")
    save(tmp_path, 3, keep=5)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"]
    assert list_checkpoints(tmp_path)[1].heldout_success == 0.5


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    events = recorded(monkeypatch)
    path = save(tmp_path, 1)
    at = events.index("rename step_000001 .replaced_000001")
    assert events[at + 1 :][:2] == ["rename .writing_000001 step_000001", f"flush {tmp_path.name}"]
    files = list(path.rglob("*"))
    assert len(files) > 6
    assert sorted(events[:at]) == sorted(["flush .writing_000001", *map(flushed, files)])


def test_what_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:

        def rmtree(path: Path, ignore_errors: bool = False) -> None:
            if not ignore_errors:
                raise PermissionError(13, "no", str(path))

        patch.setattr(shutil, "rmtree", rmtree)
        save(tmp_path, 2, keep=1)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2], "half a checkpoint is none"
    assert capsys.readouterr().err.startswith(f"warning: cannot remove {tmp_path / 'step_000001'}: PermissionError")
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step_000003"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, where: str, value: float) -> None:
    save(tmp_path, 1)
    toy, optimizer = trained()
    name, parameter = [*toy.model.named_parameters()][3]
    with torch.no_grad():
        (parameter if where == "weight" else optimizer.state[parameter]["exp_avg_sq"]).view(-1)[-1] = value
    file, name = ("model", name) if where == "weight" else ("optimizer", f"{name}|exp_avg_sq")
    with pytest.raises(CheckpointError) as error:
        checkpoints(tmp_path, toy, optimizer, keep=1).save(2, None)
    assert f"{file}.safetensors: {name} has values that are not finite" in str(error.value)
    assert names(tmp_path) == ["step_000001"]
