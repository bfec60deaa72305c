"""Models that are made once: by several processes, after kills, and where the cache is damaged."""

from __future__ import annotations

import errno
import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_toys import ToyLanguageModel
from transformers import GPT2Config, GPT2LMHeadModel

from aepo.agents.tasks.facts.warmstart import untrained, warm_started
from aepo.config import ModelConfig, WarmStartConfig
from aepo.load import load_model
from aepo.models.adapters import refuse_adapters
from aepo.models.cache import cached

UNTRAINED = WarmStartConfig(steps=0)
MAKER = """
import sys, time
from pathlib import Path
from aepo.models.cache import cached

def make(directory):
    print("making", flush=True)
    sys.stdin.readline()
    (directory / "weights").write_text("whole")

print(cached(Path(sys.argv[1]), make))
"""


def process(target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKER, str(target)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def started(target: Path) -> subprocess.Popen[str]:
    one = process(target)
    assert one.stdout is not None
    assert one.stdout.readline() == "making\n"
    return one


def write(directory: Path) -> None:
    (directory / "weights").write_text("whole")


def test_two_first_uses_at_once(tmp_path: Path) -> None:
    target = tmp_path / "model"
    first, second = started(target), started(target)
    assert first.communicate("\n")[0] == f"{target}\n"
    inode = target.stat().st_ino
    assert second.communicate("\n")[0] == f"{target}\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert target.stat().st_ino == inode, "the second took what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_get_its_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a path at which nothing is."""

    def rename(*paths: Path) -> None:
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(
        ValueError, match=r"model\.cache_dir = .* a directory to write to: .*model is not what was written"
    ):
        cached(tmp_path / "model", write)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "model"
    dead, living = started(target), started(target)
    dead.kill()
    dead.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    assert cached(target, write) == target
    assert len(list(tmp_path.iterdir())) == 2, "the model, and what the living one makes"
    assert living.communicate("\n")[0] == f"{target}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_system_without_locks_has_a_cache_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be of a living process is then left."""
    calls = 0

    def flock(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        assert calls < 10, "it tries for ever"
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "model.others").mkdir()
    assert cached(tmp_path / "model", write) == tmp_path / "model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.others"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one model."""
    cache = tmp_path_factory.mktemp("whole")
    warm_started(UNTRAINED, cache)
    return cache


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "sums", "empty", "file"])
def test_damage_is_mended(tmp_path: Path, whole: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (target,) = tmp_path.iterdir()
    first = load_file(whole / target.name / "model.safetensors")
    weights = target / "model.safetensors"
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:1000])
    elif damage == "bit":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "gone":
        weights.unlink()
    elif damage == "sums":
        (target / "SHA256SUMS").write_text("")
    else:
        shutil.rmtree(target)
        target.mkdir() if damage == "empty" else target.write_text("")
    again = warm_started(UNTRAINED, tmp_path)
    assert f"warning: {target} is not what was written, and is made again\n" in capsys.readouterr().err
    for name, weight in first.items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    warm_started(UNTRAINED, tmp_path)
    assert "warning" not in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_said_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(
        ValueError, match=r"model.cache_dir = '.*file/cache': expected a directory to write to: Not"
    ) as e:
        load_model(ModelConfig(cache_dir=cache_dir), WarmStartConfig(steps=10**9))
    assert "\n" not in str(e.value)


def model_directory(path: Path) -> Path:
    tiny = untrained(UNTRAINED)
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("damage", ["cut", "other size", "no weights", "empty config", "a weight less", "adapter"])
def test_a_directory_that_is_no_model_is_one_line(tmp_path: Path, damage: str) -> None:
    path = model_directory(tmp_path)
    weights, config = path / "model.safetensors", path / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other size":
        config.write_text(config.read_text().replace('"hidden_size": 128', '"hidden_size": 64'))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "empty config":
        config.write_text("")
    elif damage == "a weight less":
        config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    else:
        config.rename(path / "adapter_config.json")
    expected = {"adapter": "got an adapter", "a weight less": "model.layers.3.* is missing"}
    with pytest.raises(ValueError, match=expected.get(damage, "expected a model directory of transformers: ")) as error:
        load_model(ModelConfig(name=str(path)), UNTRAINED)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_adapters_are_refused() -> None:
    refuse_adapters(ToyLanguageModel().model)
    refuse_adapters(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)))
    model = ToyLanguageModel().model
    model.model.peft_config = {"default": {}}
    with pytest.raises(ValueError, match="model: expected one without adapters, got Qwen3Model in model: merge it"):
        refuse_adapters(model)
