"""Paths in settings and arguments: ~ is a home directory everywhere, and a name that no file can have is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from aepo.agents.tools.make import make_tools
from aepo.config import RunConfig, VLLMConfig, load_config, to_yaml
from aepo.files.user_paths import user_path
from aepo.load import load_model, load_task
from aepo.subject import find_subject


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_home_directory_in_settings(home: Path, tmp_path: Path) -> None:
    config = load_config(None, ["run.dir=~/x", "vllm.weights_dir=~/w"])
    assert (config.run.dir, config.vllm.weights_dir) == (f"{home}/x", f"{home}/w")
    assert RunConfig(dir="~").dir == str(home)
    assert VLLMConfig(weights_dir=None).weights_dir is None
    here = tmp_path / "here"
    assert RunConfig(dir="./~/x").dir == f"{here}/~/x"
    assert VLLMConfig(weights_dir="./~nobody-here").weights_dir == f"{here}/~nobody-here"
    assert RunConfig(dir="a/~/x").dir == "a/~/x"


@pytest.mark.parametrize("given", ["~/x", "./~/x", "././~", ".//~nobody-here/x", "a/~/x", "./x", "x"])
def test_a_path_that_was_read_means_the_same_when_it_is_read_again(given: str) -> None:
    once = user_path("RUN", given)
    assert once.is_absolute() == ("~" in given and not given.startswith("a"))
    for again in (
        str(once),
        RunConfig(dir=str(once)).dir,
        RunConfig(dir=given).dir,
        str(Path(RunConfig(dir=given).dir)),
    ):
        assert user_path("RUN", again) == once


def test_saved_settings_mean_the_same_directory(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("run:\n  dir: ~/x\n")
    saved = to_yaml(load_config(file))
    file.write_text(saved)
    monkeypatch.setenv("HOME", "/elsewhere")
    assert load_config(file).run.dir == f"{home}/x"


def test_a_home_directory_in_data_tools_and_subjects(home: Path) -> None:
    (home / "docs.jsonl").write_text('{"text": "the moon"}\n')
    (home / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n')
    assert len(make_tools(["search:~/docs.jsonl"], 1.0)) == 1
    config = load_config(None, ["task.name=files", "task.train=~/rows.jsonl", "task.heldout=0.5"])
    assert len(load_task(config.task).train) == 1
    (home / "model").mkdir()
    (home / "model" / "config.json").write_text("{}")
    assert find_subject("~/model", None, []).config.model.name == "~/model"


@pytest.mark.parametrize("given", ["~nobody-here/x", "", "a\0b", "q\udcff"])
def test_what_is_no_path_is_one_line_that_names_it(given: str) -> None:
    for name, use in {
        "--out": lambda: user_path("--out", given),
        "run.dir": lambda: RunConfig(dir=given),
        "vllm.weights_dir": lambda: VLLMConfig(weights_dir=given),
        "RUN|MODEL": lambda: find_subject(given, None, []),
    }.items():
        with pytest.raises(ValueError, match="expected") as refused:
            use()
        assert str(refused.value).startswith(f"{name} = ")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("setting", ["model.cache_dir", "model.name", "task.train"])
def test_the_home_of_nobody_in_other_settings(setting: str) -> None:
    more = ["task.name=files"] if setting == "task.train" else []
    config = load_config(None, [*more, f"{setting}=~nobody-here/x"])
    with pytest.raises(ValueError, match=f"^{setting} = '~nobody-here/x': expected ~ or ~user"):
        load_model(config.model, config.warm_start) if "model" in setting else load_task(config.task)


def test_a_system_message_may_begin_with_a_tilde() -> None:
    assert (
        load_task(load_config(None, ["task.system=~nobody-here says hello"]).task).system == "~nobody-here says hello"
    )
