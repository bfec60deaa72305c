"""Checkpoints hold everything, notice damage, and never cost the ones before them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_toys import checkpoints, fresh, load, names, save, trained
from disk_toys import full_disk
from trainer_toys import ToyLanguageModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from aepo.config import Config
from aepo.learning.optimizer import make_optimizer
from aepo.run.checkpoint import CheckpointError, best_checkpoint, list_checkpoints, verify_checkpoint


def test_round_trip(tmp_path: Path) -> None:
    toy, optimizer = trained()
    path = checkpoints(tmp_path, toy, optimizer).save(7, 0.5)
    fresh = ToyLanguageModel(seed=1)
    fresh_optimizer = make_optimizer(fresh.model, Config().optimizer)
    assert checkpoints(tmp_path, fresh, fresh_optimizer).load(7) == path
    for mine, theirs in zip(fresh.model.parameters(), toy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for name, value in optimizer.state[theirs].items():
            assert torch.equal(fresh_optimizer.state[mine][name], value), name
    # The next step is the same too: nothing that AdamW needs was left out.
    for toy_, optimizer_ in ((toy, optimizer), (fresh, fresh_optimizer)):
        optimizer_.zero_grad()
        toy_.model(input_ids=torch.tensor([[4, 5]])).logits.square().sum().backward()
        optimizer_.step()
    assert all(torch.equal(a, b) for a, b in zip(toy.model.parameters(), fresh.model.parameters(), strict=True))


def test_it_is_a_transformers_model_directory_and_its_sums_are_standard(tmp_path: Path) -> None:
    toy, _ = trained()
    path = save(tmp_path, 1)
    ids = torch.tensor([[1, 2, 3]])
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(loaded(input_ids=ids).logits, toy.model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("<search>") == 3
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=path, check=False).returncode == 0


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, success in [(1, 0.2), (2, 0.9), (3, None), (4, 0.4), (5, None), (6, 0.5)]:
        save(tmp_path, step, success)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [2, 5, 6]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.step == 2


def test_a_step_is_written_anew_and_later_ones_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    save(tmp_path, 2, success=0.5, keep=5)
    assert [(c.step, c.heldout_success) for c in list_checkpoints(tmp_path)] == [(1, None), (2, 0.5), (3, None)]
    verify_checkpoint(tmp_path / "step_000002")
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000003"], "nothing is left behind"


def test_an_older_step_that_is_saved_is_kept_beside_later_ones(tmp_path: Path) -> None:
    """keep and the best are counted among those up to the step: a run that was resumed from before writes them."""
    for step, success in ((3, None), (4, 0.5), (10, 0.9)):
        save(tmp_path, step, success, keep=5)
    save(tmp_path, 5, keep=1)
    assert [c.step for c in list_checkpoints(tmp_path)] == [4, 5, 10]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS", "run.yaml"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damage_is_noticed_named_and_the_next_whole_one_suggested(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    toy, optimizer = trained()
    before = [p.detach().clone() for p in toy.model.parameters()]
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "step_000002", toy.model, optimizer)
    # A flipped bit in SHA256SUMS accuses the file that the sum stands for.
    assert str(file.parent if (name, damage) == ("SHA256SUMS", "bit") else file) in str(error.value)
    assert "step_000001 is whole: resume from it with --from-step 1" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(toy.model.parameters(), before, strict=True)), "nothing was loaded"
    (tmp_path / "step_000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no older checkpoint that is whole"):
        verify_checkpoint(tmp_path / "step_000002")


@pytest.mark.parametrize("name", ["config.json", "state.json", "SHA256SUMS", "model.safetensors"])
def test_a_pipe_is_no_file_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    """Reading from it would never end."""
    path = save(tmp_path, 1)
    (path / name).unlink()
    os.mkfifo(path / name)
    assert [one.step for one in list_checkpoints(tmp_path)] == [1]
    with pytest.raises(CheckpointError, match=f"corrupt checkpoint: .*{name}: expected a file, got a pipe"):
        verify_checkpoint(path)


def test_an_older_checkpoint_is_suggested_and_not_a_later_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    (tmp_path / "step_000002" / "run.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"; step_000001 is whole: resume from it with --from-step 1$"):
        verify_checkpoint(tmp_path / "step_000002")


@pytest.mark.parametrize("limit", [100_000, 500])  # bytes: fails in the weights, and in the configuration
def test_a_disk_that_takes_no_more_keeps_the_old_checkpoint(tmp_path: Path, limit: int) -> None:
    """The system refuses to let a file grow beyond `limit`, as a full disk does."""
    save(tmp_path, 1)
    with full_disk(limit), pytest.raises(CheckpointError) as error:
        save(tmp_path, 2)
    assert "cannot save checkpoint" in str(error.value)
    assert "Older checkpoints kept: step_000001" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"], "no half-written files are left"
    verify_checkpoint(tmp_path / "step_000001")


def test_an_unreadable_state_does_not_hide_a_checkpoint(tmp_path: Path) -> None:
    (save(tmp_path, 3, success=0.7) / "state.json").write_text("{")
    (checkpoint,) = list_checkpoints(tmp_path)
    assert (checkpoint.step, checkpoint.heldout_success) == (3, None)
    assert best_checkpoint(tmp_path) is None


def test_state_is_small_and_plain(tmp_path: Path) -> None:
    state = json.loads((save(tmp_path, 3, success=0.7) / "state.json").read_text())
    one = {"format": 1, "step": 3, "heldout_success": 0.7, "optimizer": "AdamW", "moments": 24, "records": {}}
    assert state == one


# What is not ours


def test_what_a_run_did_not_write_is_left_alone(tmp_path: Path) -> None:
    directory, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save(directory, 10, success=0.9)
    save(elsewhere, 4)
    shutil.copytree(directory / "step_000010", directory / "step_000010_backup")
    for name in ("step_000010_1", "step_10", "step_0000010", "step_-00001", ".writing_1", "\u0661\u0661\u0661"):
        (directory / name).mkdir()
    (directory / "step_\u0661\u0661\u0661\u0661\u0661\u0661").mkdir()  # digits, but not ours
    (directory / "step_000010.tar.gz").write_text("mine")
    (directory / "step_000003").write_text("mine")
    (directory / "notes.txt").write_text("mine")
    (directory / "step_000004").symlink_to(elsewhere / "step_000004")
    (directory / "step_000005").symlink_to(tmp_path / "nowhere")
    mine = {name for name in names(directory) if name != "step_000010"}
    assert [c.step for c in list_checkpoints(directory)] == [4, 10]
    load(directory / "step_000004", *fresh())
    for step in (11, 12, 13):
        save(directory, step, keep=1, success=0.1 * (step - 10))
    assert set(names(directory)) == mine | {"step_000010", "step_000013"}
    verify_checkpoint(elsewhere / "step_000004")
    for step in (3, 4, 5):
        with pytest.raises(CheckpointError, match=f"step_00000{step} is there and was not written by a run"):
            save(directory, step)
    assert set(names(directory)) == mine | {"step_000010", "step_000013"}
    verify_checkpoint(elsewhere / "step_000004")


def test_a_note_in_a_checkpoint_is_not_lost(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "notes.txt").write_text("mine")
    (save(tmp_path, 2) / "notes.txt").write_text("mine too")
    assert (save(tmp_path, 2) / "notes.txt").read_text() == "mine too", "written anew"
    for step in (3, 4, 5):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000005"]


def test_more_than_six_digits(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert [c.step for c in list_checkpoints(tmp_path)] == [999_999, 1_000_000]
    (tmp_path / "step_1000000" / "run.yaml").unlink()
    with pytest.raises(CheckpointError, match="step_999999 is whole"):
        verify_checkpoint(tmp_path / "step_1000000")
    with pytest.raises(CheckpointError, match="no such checkpoint, the steps are: 999999, 1000000"):
        verify_checkpoint(tmp_path / "step_000003")


@pytest.mark.parametrize(
    "state", ["[]", "3", "{", '{"heldout_success": "high"}', '{"heldout_success": NaN}', "[" * 10**5]
)
def test_a_strange_state_breaks_no_list(tmp_path: Path, state: str) -> None:
    (save(tmp_path, 3, success=0.7) / "state.json").write_text(state)
    assert [(c.step, c.heldout_success) for c in list_checkpoints(tmp_path)] == [(3, None)]
    assert best_checkpoint(tmp_path) is None
