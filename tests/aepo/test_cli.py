"""The command line: what it prints, its exit codes, and Ctrl-C as a terminal sends it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainer_toys import ToyLanguageModel, toy_agent
from typer.testing import CliRunner, Result

from aepo import cli, cli_shared
from aepo.run.checkpoint import CheckpointError, list_checkpoints
from aepo.run.checkpoints import Checkpoints
from aepo.run.files import read_records
from aepo.run.log import RunLog

SMALL = ["train.steps=2", "train.questions=4", "rollout.paths=2", "rollout.max_tokens=6", "log.tensorboard=false"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy task in place of the real one, whose model takes a warm start of a minute."""
    monkeypatch.setattr(cli_shared, "load", lambda config: (toy_agent(), ToyLanguageModel()))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("toy")
def test_train_resume_eval_and_report(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = run("train", *SMALL, f"run.dir={directory}")
    assert done.exit_code == 0, done.output
    assert f"aepo report {directory}" in done.output
    assert [record["step"] for record in read_records(directory / "metrics.jsonl")] == [1, 2]

    again = run("train", *SMALL, f"run.dir={directory}")
    assert again.exit_code == 1
    assert "already holds a run: continue it with --resume" in again.output

    longer = run("train", "--resume", directory, "train.steps=3")
    assert longer.exit_code == 0, longer.output
    assert "resumed after step 2" in longer.output
    assert [record["step"] for record in read_records(directory / "metrics.jsonl")] == [1, 2, 3]

    evaluated = run("eval", directory, "--best", "--questions", "3")
    assert evaluated.exit_code == 0, evaluated.output
    assert "3 questions, 1 answer each at temperature 0" in evaluated.output
    reported = run("report", directory)
    assert reported.exit_code == 0, reported.output
    assert (directory / "report.html").stat().st_size > 10_000

    replaced = run("train", *SMALL, f"run.dir={directory}", "train.steps=1", "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    assert [record["step"] for record in read_records(directory / "metrics.jsonl")] == [1]


@pytest.mark.usefixtures("toy")
def test_resume_from_a_corrupt_checkpoint_names_the_file_and_the_way_out(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run("train", *SMALL, "checkpoint.every=1", f"run.dir={directory}").exit_code == 0
    (directory / "checkpoints" / "step_000002" / "model.safetensors").write_bytes(b"")
    metrics = (directory / "metrics.jsonl").read_text()
    failed = run("train", "--resume", directory, "train.steps=3")
    assert failed.exit_code == 1
    assert "step_000002/model.safetensors does not have the checksum" in failed.output
    assert "--from-step 1" in failed.output
    assert (directory / "metrics.jsonl").read_text() == metrics, "nothing was cut back"
    assert run("train", "--resume", directory, "--from-step", "1", "train.steps=3").exit_code == 0
    assert [record["step"] for record in read_records(directory / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.usefixtures("toy")
def test_home_directories_in_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text("run: {dir: ~/run}\n")
    done = run("train", *SMALL, "--config", "~/settings.yaml")
    assert done.exit_code == 0, done.output
    assert f"aepo report {tmp_path}/run" in done.output
    assert run("train", "--resume", "~/run", "train.steps=3").exit_code == 0
    evaluated = run("eval", "~/run", "--json", "~/numbers.json", "--answers", "~/answers.jsonl")
    assert evaluated.exit_code == 0, evaluated.output
    assert run("rollout", "~/run", "--out", "~/trees").exit_code == 0
    assert run("report", "~/run", "--out", "~/page.html").exit_code == 0
    found = {"run", "settings.yaml", "numbers.json", "answers.jsonl", "trees", "page.html"}
    assert set(os.listdir(tmp_path)) == found


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("saved", [None, "~/x", "./~/x"])
def test_a_folder_called_tilde_is_not_the_home_directory(
    saved: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """saved: run.dir in the config.yaml of an earlier version, None: of this one."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    there, other = tmp_path / "~" / "x", tmp_path / "home" / "x"
    for directory in ("./~/x", "~/x"):
        done = run("train", *SMALL, f"run.dir={directory}")
        assert done.exit_code == 0, done.output
    if saved is not None:
        file = there / "config.yaml"
        file.write_text(re.sub("(?m)^  dir: .*", f"  dir: {saved}", file.read_text()))
    longer = run("train", "--resume", "./~/x", "train.steps=3")
    assert longer.exit_code == 0, longer.output
    assert longer.output.endswith(f"Look at it with: aepo report '{there}'\n")
    assert [len(read_records(one / "metrics.jsonl")) for one in (there, other)] == [3, 2]
    evaluated = run("eval", "./~/x", "--json", "-")
    assert json.loads(evaluated.stdout)["step"] == 3


@pytest.mark.usefixtures("toy")
def test_a_run_does_not_remove_what_it_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", *SMALL, "checkpoint.every=1", "run.dir=run").exit_code == 0
    Path("links").mkdir()
    Path("links/config.json").symlink_to("../run/checkpoints/step_000002/config.json")
    Path("link").symlink_to("run/checkpoints/step_000002")
    before = {path: path.read_bytes() for path in Path("run").rglob("*.*") if path.is_file() and path.name != ".lock"}
    for model in ("run/checkpoints/step_000002", "link", "links"):
        for command, how in (
            ([*SMALL, "run.dir=run", "--overwrite"], "--overwrite removes"),
            (["--resume", "run", "--from-step", "1"], "going on from step 1 moves"),
        ):
            done = run("train", *command, f"model.name={model}")
            expected = f"error: model.name: expected files that stay, {how} {model}: copy it and name the copy\n"
            assert (done.exit_code, done.output) == (1, expected)
    assert {
        path: path.read_bytes() for path in Path("run").rglob("*.*") if path.is_file() and path.name != ".lock"
    } == before
    kept = run("train", *SMALL, "run.dir=other", "model.name=run/checkpoints/step_000002", "--overwrite")
    assert kept.exit_code == 0, kept.output
    earlier = run("train", "--resume", "run", "--from-step", "1", "model.name=run/checkpoints/step_000001")
    assert earlier.exit_code == 0, earlier.output


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("steps", [0, 1])
def test_a_full_disk_ends_with_the_way_to_go_on(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(log: RunLog, record: dict) -> None:
        if record["step"] > steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    def unsaved(*arguments: object, **others: object) -> None:
        raise CheckpointError("cannot save") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunLog, "step", full)
    if steps == 0:
        monkeypatch.setattr(Checkpoints, "save", unsaved)
    directory = tmp_path / "run"
    done = run("train", *SMALL, "checkpoint.every=1", f"run.dir={directory}")
    assert done.exit_code == 1
    how = f"aepo train --resume {directory}" if steps else "the same command, with --overwrite if it refuses"
    assert f"the disk of {directory} is full: make room, then go on with: {how}\n" in done.output


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "checkpoints/step_000002/config.json"])
def test_a_pipe_in_a_run_ends_its_resumption(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run("train", *SMALL, f"run.dir={directory}").exit_code == 0
    (directory / name).unlink()
    os.mkfifo(directory / name)
    failed = run("train", "--resume", directory, "train.steps=3")
    assert failed.exit_code == 1
    assert f"{name}: expected a file, got a pipe, a socket or a device" in failed.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "train.stepz=3"], "did you mean 'train.steps'?"),
        (["train", "policy.preset=ppo"], "expected one of aepo, arpo"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--from-step", "3"], "expected --resume RUN with it"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "--resume", "here", "run.dir=there"], "run.dir: expected not to be set with --resume"),
        (["train", "--resume", "nowhere", "--overwrite"], "expected no --config, no --overwrite"),
        (["eval", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["train", "--config", ""], "--config = '': expected a path, got none"),
        (["train", "--resume", ""], "--resume = '': expected a path, got none"),
        (
            ["train", "run.dir=~nobody-here/x"],
            "run.dir = '~nobody-here/x': expected ~ or ~user, whose",
        ),
        (["train", "run.dir=a\0b"], "run.dir = 'a\\x00b': expected a path, got a NUL character in it"),
        (["train", "run.dir=q\udcff"], "run.dir = 'q\\udcff': expected a path in UTF-8"),
        (["train", "run.dir=/proc/x/y"], "run.dir = /proc/x/y: expected a directory that can be made, locked and"),
        (["bench", "linear", "--json", ""], "--json = '': expected a path, got none"),
        (["bench", "linear", "--plot", ""], "--plot = '': expected a path, got none"),
        (["keys", "nosuchkey"], "no key contains 'nosuchkey'\n"),
        (["keys", "lerning_rate"], "no key contains 'lerning_rate': did you mean 'learning_rate'?"),
        (["keys", "taks"], "did you mean 'task'?"),
    ],
)
def test_mistakes_are_one_line_not_a_traceback(arguments: list[str], expected: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert expected in done.output
    assert "Traceback" not in done.output


@pytest.mark.usefixtures("toy")
def test_engines_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what is missing, and no half-made run in the way of the next attempt."""
    vllm = ["train", *SMALL, "rollout.engine=vllm", f"run.dir={tmp_path / 'run'}"]
    closed = run(*vllm, "vllm.endpoints=[http://127.0.0.1:9]")
    assert closed.output.startswith("error: http://127.0.0.1:9 does not answer"), closed.output
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "aepo.rollout.engines.vllm.local", raising=False)
    missing = run(*vllm)
    assert missing.output.splitlines()[-1] == (
        'error: rollout.engine = vllm: vllm is not installed; pip install "aepo-kernels[vllm]"'
    )
    assert run("train", *SMALL, f"run.dir={tmp_path / 'run'}").exit_code == 0


def test_a_request_to_terminate_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not death at once, which would leave behind what has been started."""
    monkeypatch.setattr(cli_shared, "load", lambda config: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    done = run("train", f"run.dir={tmp_path / 'run'}")
    assert (done.exit_code, done.output) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_help_teaches() -> None:
    text = run("train", "--help").output
    assert "aepo train --config configs/demo.yaml" in text
    assert "--resume" in text
    listed = run("keys", "optimizer").output
    assert "optimizer.learning_rate = 1e-06" in listed
    assert "policy" not in listed


@pytest.mark.parametrize(
    ("missing", "arguments", "expected"),
    [
        (
            "transformers",
            ["train", *SMALL],
            'aepo train needs transformers, which is not installed: pip install "aepo-kernels[train]"',
        ),
        (
            "transformers",
            ["eval", "x"],
            'aepo eval needs transformers, which is not installed: pip install "aepo-kernels[train]"',
        ),
        (
            "jinja2",
            ["report", "x"],
            'aepo report needs jinja2, which is not installed: pip install "aepo-kernels[train]"',
        ),
        (
            "rich",
            ["bench", "--list"],
            'aepo bench needs rich, which is not installed: pip install "aepo-kernels[bench]"',
        ),
        ("torch", ["bench", "--list"], "aepo bench needs torch, which is not installed: pip install torch"),
    ],
)
def test_a_missing_package_is_one_line_with_its_command(missing: str, arguments: list[str], expected: str) -> None:
    """In a process of its own, where nothing that needs the package has been imported yet."""
    program = f"import sys; sys.modules[{missing!r}] = None; from aepo.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (1, f"error: {expected}\n", "")


def aepo_without_typer(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; sys.modules['typer'] = None; from aepo.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


def test_every_command_says_what_it_needs_where_only_the_kernels_are_installed() -> None:
    from aepo.install import COMMANDS

    listed = {one.name or one.callback.__name__ for one in cli.app.registered_commands if one.callback}
    assert listed == {*COMMANDS, "doctor"}
    help_text = aepo_without_typer("--help")
    assert help_text.returncode == 0
    assert aepo_without_typer().returncode == run().exit_code == 2
    for command, extra in COMMANDS.items():
        assert f'needs pip install "aepo-kernels[{extra}]"' in " ".join(help_text.stdout.split())
        done = aepo_without_typer(command, "--config", "x.yaml", "--help")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f'error: aepo {command} needs typer, which is not installed: pip install "aepo-kernels[{extra}]"\n'
        )
    misspelt = aepo_without_typer("trian")
    assert (misspelt.returncode, "Traceback" in misspelt.stderr) == (2, False)
    assert aepo_without_typer("doctor", "--jsn").returncode == 2


def test_the_version_is_that_of_the_kernels_everywhere() -> None:
    import aepo
    import aepo_kernels

    assert aepo.__version__ == aepo_kernels.__version__
    expected = f"aepo-kernels {aepo_kernels.__version__}\n"
    assert (run("--version").output, run("--version").exit_code) == (expected, 0)
    assert aepo_without_typer("--version").stdout == expected
    as_module = subprocess.run([sys.executable, "-m", "aepo", "--version"], capture_output=True, text=True, check=True)
    assert as_module.stdout == expected
    with pytest.raises(AttributeError, match="no attribute 'version'"):
        aepo.version  # noqa: B018


def test_a_command_line_that_cannot_be_loaded_leads_to_the_doctor() -> None:
    """So it is where another project's aepo/cli.py lies over ours."""
    program = "import sys; sys.modules['aepo.cli'] = sys; from aepo.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: aepo/cli.py cannot be loaded (cannot import name 'main'")
    assert "python -m aepo.doctor" in done.stderr


PROGRAM = """
import sys
from trainer_toys import ToyLanguageModel, ToyTask, toy_agent
from aepo import cli, cli_shared
cli_shared.load = lambda config: (toy_agent(), ToyLanguageModel())
cli.main()
"""


def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """SIGINT to the process group while steps are running: exit code 130, and the run goes on from where it was."""
    directory, here = tmp_path / "run", Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, "train"]
    process = subprocess.Popen(
        [*command, *SMALL, "train.steps=100000", f"run.dir={directory}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(read_lines(directory / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    finished = len(read_records(directory / "metrics.jsonl"))
    assert f"the state after step {finished} is saved" in output
    assert f"go on with: aepo train --resume {directory}" in output
    assert list_checkpoints(directory / "checkpoints")[-1].step == finished


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    refused = run("train", *SMALL, "run.device=cuda", f"run.dir={tmp_path / 'run'}")
    assert refused.output.startswith("error: run.device = 'cuda': expected a GPU that torch can use")
    assert not (tmp_path / "run").exists()
