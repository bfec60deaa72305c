"""Checkpoints hold everything, notice damage, and never cost the ones before them."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from trainer_toys import ToyLanguageModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from aepo.checkpoint import (
    CheckpointError,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from aepo.config import Config, to_yaml
from aepo.learner import make_optimizer

YAML = to_yaml(Config())


def trained(steps: int = 2) -> tuple[ToyLanguageModel, torch.optim.Optimizer]:
    toy = ToyLanguageModel()
    optimizer = make_optimizer(toy.model, Config().optimizer)
    for step in range(steps):
        toy.model(input_ids=torch.tensor([[1, 2, 3 + step]])).logits.square().sum().backward()
        optimizer.step()
    return toy, optimizer


def save(directory: Path, step: int, success: float | None = None, keep: int = 2) -> Path:
    toy, optimizer = trained()
    return save_checkpoint(
        directory, step, toy.model, toy.tokenizer, optimizer, heldout_success=success, config_yaml=YAML, keep=keep
    )


def test_round_trip(tmp_path: Path) -> None:
    toy, optimizer = trained()
    path = save_checkpoint(
        tmp_path, 7, toy.model, toy.tokenizer, optimizer, heldout_success=0.5, config_yaml=YAML, keep=1
    )
    fresh = ToyLanguageModel(seed=1)
    fresh_optimizer = make_optimizer(fresh.model, Config().optimizer)
    assert load_checkpoint(path, fresh.model, fresh_optimizer) == 7
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


def test_saving_an_older_step_ends_the_future_that_was_left(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    save(tmp_path, 2, keep=5)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1, 2]
    verify_checkpoint(tmp_path / "step_000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"], "nothing is left behind"


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
        load_checkpoint(tmp_path / "step_000002", toy.model, optimizer)
    # A flipped bit in SHA256SUMS accuses the file that the sum stands for.
    assert str(file.parent if (name, damage) == ("SHA256SUMS", "bit") else file) in str(error.value)
    assert "step_000001 is whole: resume from it with --from-step 1" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(toy.model.parameters(), before, strict=True)), "nothing was loaded"
    (tmp_path / "step_000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no older checkpoint that is whole"):
        verify_checkpoint(tmp_path / "step_000002")


@pytest.mark.parametrize("limit", [100_000, 500])  # bytes: fails in the weights, and in the configuration
def test_a_disk_that_takes_no_more_keeps_the_old_checkpoint(tmp_path: Path, limit: int) -> None:
    """The system refuses to let a file grow beyond `limit`, as a full disk does."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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
    assert state == {"format": 1, "step": 3, "heldout_success": 0.7}
