"""Checkpoints hold everything, notice damage, and never cost the ones before them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_toys import flushed, full_disk, recorded
from safetensors.torch import load_file, save_file
from trainer_toys import ToyLanguageModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from aepo.config import Config, to_yaml
from aepo.learning.optimizer import make_optimizer
from aepo.models.language_model import LanguageModel
from aepo.parallel import OneProcess
from aepo.run.checkpoint import CheckpointError, best_checkpoint, list_checkpoints, verify_checkpoint
from aepo.run.checkpoint_fit import model_problem, require_tokenizer
from aepo.run.checkpoint_load import load_state, load_weights
from aepo.run.checkpoints import Checkpoints

YAML = to_yaml(Config())


def trained(steps: int = 2) -> tuple[ToyLanguageModel, torch.optim.Optimizer]:
    toy = ToyLanguageModel()
    optimizer = make_optimizer(toy.model, Config().optimizer)
    for step in range(steps):
        toy.model(input_ids=torch.tensor([[1, 2, 3 + step]])).logits.square().sum().backward()
        optimizer.step()
    return toy, optimizer


def checkpoints(
    directory: Path, toy: ToyLanguageModel | LanguageModel, optimizer: torch.optim.Optimizer, keep: int = 2
) -> Checkpoints:
    return Checkpoints(
        directory,
        keep=keep,
        config_yaml=YAML,
        model=toy.model,
        tokenizer=toy.tokenizer,
        optimizer=optimizer,
        parallel=OneProcess(),
    )


def save(directory: Path, step: int, success: float | None = None, keep: int = 2) -> Path:
    return checkpoints(directory, *trained(), keep).save(step, success)


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


def load(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    load_state(path, model, optimizer, OneProcess())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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


# Whatever ends a save


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


# What is of another


def fresh(seed: int = 1) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    model = ToyLanguageModel(seed=seed).model
    return model, make_optimizer(model, Config().optimizer)


def rewrite(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Another content of a file, with its right checksum."""
    file = path / name
    if name.endswith(".safetensors"):
        save_file(change(load_file(file)), file)
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    sums = [line.split("  ") for line in (path / "SHA256SUMS").read_text().splitlines()]
    lines = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for _, n in sums]
    (path / "SHA256SUMS").write_text("".join(lines))


def without(found: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in keys}


def other_positions(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta is in rope_parameters since transformers 5."""
    if "rope_parameters" in config:
        return {**config, "rope_parameters": {**config["rope_parameters"], "rope_theta": 5.0}}
    return {**config, "rope_theta": 5.0}


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
OTHERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "newer": ("state.json", lambda s: {**s, "format": 2}, "format 2 is of a newer version of aepo, this one reads 1"),
    "no format": ("state.json", lambda s: without(s, "format"), "format: expected a whole number from 1, got None"),
    "old format": ("state.json", lambda s: {**s, "format": 0}, "format: expected a whole number from 1, got 0"),
    "few moments": ("state.json", lambda s: {**s, "moments": -1}, "moments: expected a whole number from 0, got -1"),
    "before": ("state.json", lambda s: {**s, "step": -1}, "step: expected a whole number from 0, got -1"),
    "no object": ("state.json", lambda s: [s], "state.json: expected an object, got list"),
    "text": ("state.json", lambda s: {**s, "step": "2"}, "step: expected a whole number from 0, got '2'"),
    "truth": ("state.json", lambda s: {**s, "step": True}, "step: expected a whole number from 0, got True"),
    "other step": ("state.json", lambda s: {**s, "step": 3}, "step 3 does not fit the directory's name"),
    "optimizer": ("state.json", lambda s: {**s, "optimizer": "SGD"}, "the optimizer was SGD, here it is AdamW"),
    "moments": ("state.json", lambda s: {**s, "moments": "all"}, "moments: expected a whole number from 0, got 'all'"),
    "type": ("config.json", lambda c: {**c, "model_type": "qwen2"}, "model_type was 'qwen2', here it is 'qwen3'"),
    "epsilon": ("config.json", lambda c: {**c, "rms_norm_eps": 0.1}, "rms_norm_eps was 0.1, here it is 1e-06"),
    "theta": ("config.json", other_positions, "rope_theta was 5"),
    "list": ("config.json", lambda c: [c], "config.json: expected an object, got list"),
    "class": ("config.json", lambda c: {**c, "num_hidden_layers": "two"}, "config.json cannot be used: "),
    "no weight": ("model.safetensors", lambda w: without(w, NORM), f"model.safetensors: {NORM!r} is missing"),
    "surplus": ("model.safetensors", lambda w: {**w, "bias": w[NORM].clone()}, "'bias' is not of this model"),
    "shape": ("model.safetensors", lambda w: {**w, NORM: w[NORM][:3].clone()}, "expected the shape [32], got [3]"),
    "kind": ("model.safetensors", lambda w: {**w, NORM: w[NORM].int()}, "expected torch.float32, got I32"),
    "nan": ("model.safetensors", lambda w: {**w, NORM: w[NORM] * float("nan")}, "values that are not finite"),
    "no moments": (
        "optimizer.safetensors",
        lambda m: {k: v for k, v in m.items() if not k.startswith(DOWN)},
        f"expected moments of 24 parameters, got 23, none of {DOWN!r}",
    ),
    "none at all": ("optimizer.safetensors", lambda m: {}, "expected moments of 24 parameters, got 0"),
    "other names": (
        "optimizer.safetensors",
        lambda m: {f"base.{k}": v for k, v in m.items()},
        "'base.model.embed_tokens.weight|exp_avg' is not of this model (and 71 more)",
    ),
    "no square": (
        "optimizer.safetensors",
        lambda m: without(m, f"{DOWN}|exp_avg_sq"),
        f"'{DOWN}|exp_avg_sq' is missing",
    ),
    "one more": (
        "optimizer.safetensors",
        lambda m: {**m, f"{DOWN}|max_exp_avg_sq": m[f"{DOWN}|exp_avg_sq"].clone()},
        f"'{DOWN}|max_exp_avg_sq' is not of this model",
    ),
    "moment's shape": (
        "optimizer.safetensors",
        lambda m: {**m, f"{NORM}|exp_avg": m[f"{NORM}|exp_avg"][:2].clone()},
        "expected the shape [32], got [2]",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_of_another_is_refused_before_anything_changes(tmp_path: Path, name: str) -> None:
    file, change, expected = OTHERS[name]
    path = save(tmp_path, 2)
    rewrite(path, file, change)
    verify_checkpoint(path)
    model, optimizer = trained(1)[0].model, None
    optimizer = make_optimizer(model, Config().optimizer)
    model(input_ids=torch.tensor([[1, 2]])).logits.square().sum().backward()
    optimizer.step()
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError) as error:
        load(path, model, optimizer)
    assert str(error.value).startswith(f"cannot load checkpoint {path}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(v, after[i][k]) for i, entry in moments["state"].items() for k, v in entry.items())


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, _ = fresh()
    with pytest.raises(CheckpointError, match=r"the optimizer was AdamW, here it is Adam$"):
        load(save(tmp_path, 2), model, torch.optim.Adam(model.parameters()))


def test_parameters_without_a_gradient_have_no_moments(tmp_path: Path) -> None:
    toy = ToyLanguageModel()
    optimizer = make_optimizer(toy.model, Config().optimizer)
    for step in (0, 1):
        path = checkpoints(tmp_path, toy, optimizer).save(step, None)
        model, other = fresh()
        load(path, model, other)
        assert len(other.state) == step
        toy.model.model.norm.weight.grad = torch.ones(32)  # that of no other
        optimizer.step()


def test_loading_is_in_place_and_older_names_of_tied_weights_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    stored = load_file(path / "model.safetensors")
    assert "model.embed_tokens.weight" in stored, "vLLM passes over lm_head where it is tied"
    rewrite(path, "model.safetensors", lambda w: {k.replace("model.embed_tokens", "lm_head"): v for k, v in w.items()})
    model, _ = fresh()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    load_weights(path, model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "mistral", "gemma3_text", "gemma2", "qwen3_moe", "olmo2", "granite"]
)
def test_other_architectures_fit_themselves_and_load_in_transformers(tmp_path: Path, kind: str, tie: bool) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 18, "num_experts": 8, "moe_intermediate_size": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, tie_word_embeddings=tie)).eval()
    optimizer = make_optimizer(model, Config().optimizer)
    path = checkpoints(tmp_path, LanguageModel(model, ToyLanguageModel().tokenizer), optimizer).save(0, None)
    load(path, model, optimizer)
    loaded, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    load_weights(path, loaded)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


# What belongs to a model besides its weights


def test_all_ends_of_text_of_the_model_are_kept(tmp_path: Path) -> None:
    toy, optimizer = trained()
    toy.model.generation_config.eos_token_id = [1, 6]
    toy.model.generation_config.temperature = 0.9  # without sampling: transformers does not save that
    path = checkpoints(tmp_path, toy, optimizer).save(1, None)
    before = LanguageModel(toy.model, toy.tokenizer).eos_ids
    assert before == (1, 6)
    assert LanguageModel.from_directory(path, dtype=torch.float32, device="cpu").eos_ids == before


@pytest.mark.parametrize("was", [1, [1], [1, 5], [5, 1], [5, 1, 5]])
@pytest.mark.parametrize("now", [1, [1], [1, 5], [5, 1]])
def test_ends_of_text_are_the_same_in_any_order(was: Any, now: Any, tmp_path: Path) -> None:
    toy, optimizer = trained()
    same = {*(was if isinstance(was, list) else [was])} == {*(now if isinstance(now, list) else [now])}
    for owner, what in ((toy.model.config, "config.json"), (toy.model.generation_config, "generation_config.json")):
        owner.eos_token_id = was
        path = checkpoints(tmp_path, toy, optimizer).save(1, None)
        owner.eos_token_id = now
        language_model = LanguageModel(toy.model, toy.tokenizer)
        with contextlib.nullcontext() if same else pytest.raises(ValueError, match=f"{what}: eos_token_id was"):
            if problem := model_problem(path, toy.model, OneProcess()):
                raise ValueError(problem)
            require_tokenizer(path, language_model, "toy")


def test_a_tokenizer_with_several_chat_templates(tmp_path: Path) -> None:
    toy, optimizer = trained()
    toy.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    path = checkpoints(tmp_path, toy, optimizer).save(1, None)
    assert "  additional_chat_templates/tool_use.jinja\n" in (path / "SHA256SUMS").read_text()
    verify_checkpoint(path)
    assert AutoTokenizer.from_pretrained(path).chat_template == toy.tokenizer.chat_template
