"""`aepo bench` as a user runs it: tables, JSON, figure, messages, exit codes. Shapes are tiny, nothing is compiled."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_bench import toy_problem
from typer.testing import CliRunner, Result

from aepo import cli
from aepo.bench import harness, peers, progress
from aepo.bench import run as bench
from aepo.bench.harness import Row
from aepo.bench.plot import draw

TINY = ("--device", "cpu", "--tokens", "8", "--vocab", "300", "--hidden", "32", "--rounds", "1")


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch: pytest.MonkeyPatch):
    """No peers, no compilation: their time is not what is tested here."""
    monkeypatch.setattr(peers, "PEERS", ())
    with torch.compiler.set_stance("force_eager"):
        yield


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def test_all_questions_into_tables_and_json(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    done = run(*TINY, "--json", file, "--threads", 1)
    assert done.exit_code == 0, done.output
    result = json.loads(file.read_text())
    assert result["machine"]["device"] == "cpu"
    assert result["machine"]["threads"] == 1
    assert result["refused"] == []
    assert {row["question"] for row in result["rows"]} == set(bench.QUESTIONS)
    assert {row["vocab"] for row in result["rows"]} == {300}
    for row in result["rows"]:
        assert row["problem"] in done.output
        assert row["median_ms"] > 0


def test_chosen_questions_and_shapes(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    shapes = ("--tokens", "8,12", "--vocab", "300,200", "--dtype", "float32", "--rounds", "2")
    assert run("token-stats", "--device", "cpu", *shapes, "--json", file).exit_code == 0
    rows = [row for row in json.loads(file.read_text())["rows"] if row["provider"] == "aepo_kernels"]
    assert [(row["tokens"], row["vocab"]) for row in rows] == [(8, 300), (12, 300), (8, 200), (12, 200)]
    assert {row["dtype"] for row in rows} == {"float32"}


def fake(*problems) -> SimpleNamespace:
    return SimpleNamespace(NOTE="", CPU=[], CUDA=[], QUICK=(1, 1), problems=lambda settings: iter(problems))


def test_a_wrong_kernel_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, right = ("aepo_kernels, in place", lambda x: (x * 3,)), ("peer", lambda x: (x * 2,))
    monkeypatch.setattr(bench, "QUESTIONS", {"toy": fake(toy_problem(wrong, right))})
    done = run("toy", "--device", "cpu", "--rounds", "1")
    assert done.exit_code == 1
    assert "no row for aepo_kernels, in place: wrong: error 0.5" in done.output
    assert "error: a kernel of this library has no row" in done.output


def test_a_wrong_peer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ("aepo_kernels", lambda x: (x * 2,)), ("peer", lambda x: (x * 3,))
    monkeypatch.setattr(bench, "QUESTIONS", {"toy": fake(toy_problem(*providers))})
    done = run("toy", "--device", "cpu", "--rounds", "1")
    assert done.exit_code == 0
    assert "no row for peer: wrong" in done.output


@pytest.mark.parametrize(
    "sizes",
    [
        ("--tokens", "100000000000000000000"),
        ("--tokens", "1000000", "--vocab", "151936000"),
        ("--vocab", "4", "--tokens", "4", "--hidden", "1000000000000"),
    ],
)
def test_sizes_that_no_memory_holds_are_one_line(sizes) -> None:
    done = run("linear", "--device", "cpu", *sizes)
    assert done.exit_code == 1
    assert re.fullmatch(r"error: tokens \d+, vocab \d+, .* takes .* GiB, and this machine has .*\n", done.output)


def test_a_json_file_that_cannot_be_written_is_said_before_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "rows.json", "Not a directory")):
        done = run("decode", "--device", "cpu", "--quick", "--json", path)
        assert done.exit_code == 1
        assert done.output == f"error: --json {path}: expected a file that can be written: {why}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_loaded_machine_and_unsteady_rows_are_said_not_compared() -> None:
    rows = [dataclasses.replace(toy_row(1, 1, name), others_cores=1.5) for name in ("aepo_kernels", "eager")]
    rows[1] = dataclasses.replace(rows[1], spread=0.3)
    cores = os.cpu_count()
    assert list(bench.warnings(rows[:1], "cuda")) == []
    loaded, unsteady = bench.warnings(rows, "cpu")
    if torch.get_num_threads() >= cores - 1:
        assert loaded.startswith(f"loaded machine: other programs kept 1.5 of {cores} cores busy")
    assert unsteady.startswith("spread above 25%: eager; nothing is compared with that (~)")
    text = render(bench.table(rows))
    assert text.count("~") == 4  # two columns of both rows
    assert " 30% " in text
    assert "~" not in render(bench.table(rows[:1]))


def render(table) -> str:
    console = bench.make_console()
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_warnings_and_spread_reach_output_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rounds of 60, 10, 60, 10 and 60 ms, on a machine whose other cores are all taken."""
    delays = itertools.cycle([0.01, 0.06])

    def uneven(x):
        if len(x) > 2:  # not at the gate
            time.sleep(next(delays))
        return (x * 2,)

    monkeypatch.setattr(harness, "SHORT_S", 0)
    monkeypatch.setattr(harness.LoadMeter, "others_cores", lambda self: float(os.cpu_count()))
    problem = toy_problem(("aepo_kernels", lambda x: (x * 2,)), ("uneven", uneven))
    monkeypatch.setattr(bench, "QUESTIONS", {"toy": fake(problem)})
    done = run("toy", "--device", "cpu", "--rounds", "5", "--json", tmp_path / "rows.json")
    assert done.exit_code == 0
    assert f"loaded machine: other programs kept {os.cpu_count()}.0 of {os.cpu_count()} cores busy" in done.stdout
    assert "spread above 25%" in done.stdout
    last = json.loads((tmp_path / "rows.json").read_text())["rows"][-1]
    assert last["provider"] == "uneven"
    assert 0.3 < last["spread"] < 3
    assert last["percent_of_ceiling"] is None
    assert last["others_cores"] == os.cpu_count()


def test_long_work_says_what_it_does_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(x):
        time.sleep(0.2 if len(x) > 2 else 0)
        return (x * 2,)

    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    monkeypatch.setattr(bench, "QUESTIONS", {"toy": fake(toy_problem(("aepo_kernels", slow)))})
    done = run("toy", "--device", "cpu", "--rounds", "3")
    assert "aepo bench, " not in done.stdout
    lines = done.stderr.splitlines()
    assert any(re.fullmatch(r"aepo bench, 0 s: double: .*: warming up aepo_kernels.*", line) for line in lines), lines
    later = re.compile(r"aepo bench, \d s: .*: round 3 of 3, aepo_kernels, about \d s more for this table")
    assert any(later.fullmatch(line) for line in lines), lines


def test_progress_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress(bench.make_console())
    now[0] = 103
    bar.begin("subject")
    assert bar.line() == "aepo bench, 3 s: subject: making inputs"
    bar("round 2", 50.0)
    now[0] = 123
    assert bar.line() == "aepo bench, 23 s: subject: round 2, about 30 s more for this table"


def test_a_stopped_run_leaves_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(settings):
        raise KeyboardInterrupt
        yield

    first = fake(toy_problem(("aepo_kernels", lambda x: (x * 2,))))
    monkeypatch.setattr(
        bench, "QUESTIONS", {"first": first, "second": SimpleNamespace(**{**vars(first), "problems": stopped})}
    )
    done = run("--device", "cpu", "--rounds", "1", "--json", tmp_path / "rows.json")
    assert done.exit_code == 130
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == ["one", "two", "aepo_kernels"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["everything"], "question must be one of token-stats"),
        (["--device", "tpu"], "device must be cpu or cuda; got 'tpu'"),
        (["--tokens", "1k"], "tokens must be integers separated by commas, e.g. 128,512; got '1k'"),
        (["--vocab", "0,5"], "vocab must be integers >= 1; got (0, 5)"),
        (["policy-loss", "--tokens", "3", "--vocab", "100"], "tokens must be >= 4 where a loss is measured; got 3"),
        (["--hidden", "0"], "hidden must be an integer >= 1; got 0"),
        (["--rounds", "0"], "rounds must be an integer >= 1; got 0"),
        (["--threads", "0"], "threads must be an integer >= 1; got 0"),
        (["--dtype", "int8"], "dtype must be one of bfloat16, float16, float32; got 'int8'"),
        (["--plot", "x.svg"], "a plot needs several numbers of tokens"),
        (["--plot", "x.doc", "--tokens", "8,16"], "a plot's file must end with one of .svg, .png, .pdf; got x.doc"),
    ],
)
def test_bad_input_is_explained(arguments: list[str], message: str) -> None:
    done = run("--device", "cpu", *arguments)
    assert done.exit_code == 1
    assert message in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_explained() -> None:
    assert "torch.cuda.is_available() is False" in run("--device", "cuda").output


def test_list_and_help_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = peers.Peer("Peer", "a-package-that-is-not-there", "logits", "entropy", ("cpu",), lambda: max)
    monkeypatch.setattr(peers, "PEERS", (absent,))
    assert "no: a-package-that-is-not-there is not installed" in run("--list").output
    text = run("--help").output
    assert "aepo bench linear --tokens 4096" in text
    assert "--list" in text


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / "losses.svg"
    arguments = ("policy-loss", "linear", "--device", "cpu", "--tokens", "8,16", "--vocab", "300", "--hidden", "32")
    done = run(*arguments, "--rounds", "1", "--plot", file)
    assert done.exit_code == 0, done.output
    assert "<svg" in file.read_text()


def test_figure_has_a_line_per_provider_and_skips_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both tokens and vocabulary vary, two panels per vocabulary."""
    figures = pytest.importorskip("matplotlib.figure")
    saved = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path: (saved.append(self), save(self, path)))
    names = ("aepo_kernels", "eager", "ceiling")
    draw([toy_row(t, v, name) for v in (100, 200) for t in (8, 16) for name in names], tmp_path / "x.png")
    assert len(saved[0].axes) == 4
    for panel, per_token in zip(saved[0].axes, (100, 100, 200, 200), strict=True):
        assert len(panel.lines) == 2
        for line in panel.lines:
            assert list(line.get_xdata()) == [8, 16]
            assert list(line.get_ydata()) == [8 * per_token, 16 * per_token]


def toy_row(tokens: int, vocab: int, provider: str) -> Row:
    """As many milliseconds and MiB as logits."""
    return Row(
        "q", "title", "problem", provider, "loss", tokens=tokens, vocab=vocab, hidden=None, dtype="float32", rounds=1,
        median_ms=tokens * vocab, spread=0.0, rate=1, unit="GB/s", extra_bytes=tokens * vocab * 2**20, extra_share=1,
        max_error=None if provider == "ceiling" else 0.0,
    )  # fmt: skip
