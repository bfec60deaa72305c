"""`aepo eval` and `aepo rollout`: what they print and write, for runs and models, and what they refuse."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from trainer_toys import ToyLanguageModel, ToyTask, toy_agent
from typer.testing import CliRunner, Result

from aepo import cli, cli_shared
from aepo.rollout.sampler import Sampler
from aepo.run.log import read_records

SMALL = ["train.steps=2", "train.questions=4", "rollout.paths=2", "rollout.max_tokens=6", "log.tensorboard=false"]
HELDOUT = 8
LOAD = cli_shared.load


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy agent in place of the one that is configured; everything else is real."""
    agent = lambda: toy_agent(ToyTask(heldout=HELDOUT))  # noqa: E731
    monkeypatch.setattr(cli_shared, "load", lambda config: (agent(), ToyLanguageModel()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_shared, "load", lambda config: (toy_agent(ToyTask(heldout=HELDOUT)), ToyLanguageModel()))
        done = run("train", *SMALL, "optimizer.learning_rate=0.1", "checkpoint.every=1", f"run.dir={directory}")
    assert done.exit_code == 0, done.output
    return directory


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def evaluated(*arguments: str | Path) -> dict[str, Any]:
    done = run("eval", *arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_run_is_evaluated_as_while_it_was_trained(trained: Path) -> None:
    """The same questions, seeds and weights as at the last evaluation of the run."""
    first, last = read_records(trained / "evals.jsonl")
    assert first["reward"] != last["reward"], "other weights would be noticed"
    record = evaluated(trained)
    assert (record["subject"], record["step"], record["task"], record["changed"]) == (str(trained), 2, "toy", {})
    assert record["questions"] == record["questions.asked"] == HELDOUT
    same = set(last) - {"step", "seconds"}
    assert {name: record[name] for name in same} == {name: last[name] for name in same}


def test_what_is_printed(trained: Path) -> None:
    done = run("eval", trained, "--samples", "3", "--pass-at", "1,3", "--temperature", "1")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "set here: eval.samples = 3 (the run: 1)" in lines
    assert "set here: eval.pass_at = (1, 3) (the run: (1,))" in lines
    assert any(line.startswith(f"{trained}, step 2: 8 questions, 3 answers each at temperature 1, ") for line in lines)
    first_words = [line.split()[0] for line in lines if line.strip()]
    assert {"success", "pass@1", "pass@3", "reward", "reward.digit", "tokens", "even", "odd"} <= set(first_words)
    assert "16 of 24 paths" in lines or "24 of 24 paths" in lines, "progress"


def test_samples_differ_and_pass_at_k_is_theirs(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    record = evaluated("tiny", "eval.samples=6", "eval.temperature=1", "eval.pass_at=[2]", "--answers", answers)
    lines = read_records(answers)
    assert [line["question"]["id"] for line in lines] == [f"q{i % 8 + 100 * i}" for i in range(HELDOUT)]
    assert all(len(line["samples"]) == 6 for line in lines)
    assert len({sample["text"] for line in lines for sample in line["samples"]}) > HELDOUT
    wins = [sum(sample["success"] for sample in line["samples"]) for line in lines]
    assert record["success"] == pytest.approx(sum(wins) / 48)
    by_pairs = [1 - (6 - c) * (5 - c) / 30 for c in wins]
    assert record["pass@2"] == pytest.approx(sum(by_pairs) / HELDOUT)
    assert record["tokens"] == pytest.approx(sum(s["tokens"] for line in lines for s in line["samples"]) / 48)
    low, high = record["interval.success"]
    assert low <= record["success"] <= high


def test_questions_are_those_that_are_asked_for(trained: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    record = evaluated(trained, "--questions", "3", "--answers", answers)
    assert (record["questions"], record["changed"]) == (3, {"eval.questions": 3})
    assert [line["question"]["id"] for line in read_records(answers)] == [
        "q202",
        "q303",
        "q707",
    ]
    assert evaluated(trained, "eval.questions=2")["questions"] == 2


def test_checkpoints_of_a_run(trained: Path) -> None:
    assert evaluated(trained, "--step", "1")["step"] == 1
    evaluations = {record["step"]: record["success"] for record in read_records(trained / "evals.jsonl")}
    best = evaluated(trained, "--best")
    assert best["success"] == max(evaluations.values())


def test_a_model_directory_and_a_file_of_numbers(trained: Path, tmp_path: Path) -> None:
    """A checkpoint is one, with the settings that are given."""
    checkpoint, numbers = trained / "checkpoints" / "step_000002", tmp_path / "numbers.json"
    done = run("eval", checkpoint, "--config", checkpoint / "run.yaml", "--json", numbers)
    assert done.exit_code == 0, done.output
    record = json.loads(numbers.read_text())
    assert (record["subject"], record["step"], record["changed"]) == (str(checkpoint), None, {})
    assert record["temperature"] == 0


def test_another_agent_than_the_run_was_trained_with(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli_shared, "load", lambda config: (toy_agent(ToyTask(heldout=5)), ToyLanguageModel()))
    refused = run("eval", trained)
    assert refused.exit_code == 1
    assert refused.output.startswith(f"error: {trained}: the run was begun with another agent: ")
    assert "task.heldout_questions was 8 and is 5" in refused.output
    assert len(refused.output.splitlines()) == 1
    other = run("eval", trained, "--temperature", "0.5", "rollout.max_tokens=5")
    assert other.exit_code == 1, "settings that leave the agent as it is are no consent"
    assert "the run was begun with another agent: task.heldout_questions was 8 and is 5" in other.output
    meant = run("eval", trained, "task.seed=5")
    assert meant.exit_code == 0, meant.output
    assert "set here: task.seed = 5 (the run: 0)" in meant.output
    assert "not as in the run: task.heldout_questions was 8 and is 5" in meant.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "nowhere"], "nowhere: expected a run (a directory with a run.json), a model directory"),
        (["eval", "tiny", "--step", "1"], "--step: expected a run with it, tiny is a model"),
        (["eval", "tiny", "--best"], "--best: expected a run with it"),
        (["eval", "tiny", "model.name=other"], "model.name=other: expected not to be set, the model is tiny"),
        (["eval", "RUN", "--config", "x.yaml"], "--config x.yaml: expected none"),
        (["eval", "RUN", "--step", "7"], "--step 7: RUN has "),
        (["eval", "RUN", "--step", "1", "--best"], "--best: expected no --step 1 with it"),
        (["eval", "RUN", "run.dir=x"], "run.dir=x: expected not to be set"),
        (["eval", "RUN", "--samples", "4"], "eval.samples = 4: expected 1 with eval.temperature = 0"),
        (["eval", "RUN", "--pass-at", "1,2"], "eval.pass_at = (1, 2): expected each at most eval.samples (1)"),
        (["eval", "RUN", "--pass-at", "1;2"], "eval.pass_at = "),
        (["eval", "RUN", "eval.tempature=1"], "did you mean 'eval.temperature'?"),
        (["eval", "RUN/checkpoints/step_000001"], "is the checkpoint of a run: expected the run and --step"),
        (
            ["eval", "RUN", "--json", "no/where.json"],
            "--json no/where.json: expected a file that can be",
        ),
        (["eval", "RUN", "--json", ""], "--json = '': expected a path, got none"),
        (["eval", "RUN", "--answers", ""], "--answers = '': expected a path, got none"),
        (["rollout", "RUN", "--out", ""], "--out = '': expected a path, got none"),
        (["eval", ""], "|MODEL = '': expected a path, got none"),
        (["eval", "RUN", "--json", "RUN/run.json"], "--json RUN/run.json: expected another place, RUN is a run and"),
        (["eval", "RUN", "--answers", "RUN/metrics.jsonl"], "--answers RUN/metrics.jsonl: expected another place, "),
        (["rollout", "RUN", "--out", "RUN/trees/new"], "--out RUN/trees/new: expected another place, RUN is a run"),
        (["report", "RUN", "--out", "RUN/evals.jsonl"], "--out RUN/evals.jsonl: expected another place, RUN is a run"),
        (["report", "RUN", "--out", "no/where.html"], "--out no/where.html: expected a file that can be written: No"),
        (["report", "RUN", "--out", ""], "--out = '': expected a path, got none"),
        (["report", "~nobody-here/run"], " = '~nobody-here/run': expected ~ or ~user, whose home directory is known"),
        (["eval", "RUN", "--answers", "x" * 300], "x: expected a file that can be written: File name too long"),
        (["eval", "RUN", "--answers", "same", "--json", "same"], "--answers same: expected another file than that of"),
        (
            ["rollout", "RUN", "--out", "no/where"],
            "--out no/where: expected a directory that can be made: No",
        ),
        (["eval", "RUN", "--answers", "no/where.jsonl"], "--answers no/where.jsonl: expected a file that can be"),
        (["rollout", "RUN", "--out", "RUN"], "--out RUN: expected a new or an empty directory"),
        (["rollout", "nowhere", "--out", "new"], "nowhere: expected a run"),
    ],
)
def test_mistakes_are_one_line(trained: Path, arguments: list[str], expected: str) -> None:
    done = run(*(argument.replace("RUN", str(trained)) for argument in arguments))
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert expected.replace("RUN", str(trained)) in done.output
    assert len(done.output.splitlines()) == 1


@pytest.mark.parametrize("command", [["eval"], ["train", "--resume"]])
def test_settings_of_a_run_that_are_damaged(trained: Path, tmp_path: Path, command: list[str]) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    (copy / "config.yaml").write_text("train: {steps: 3\n")
    done = run(*command, copy)
    assert done.exit_code == 1
    assert done.output.startswith(f"error: {copy / 'config.yaml'}, line 2: cannot be read as YAML: ")
    assert len(done.output.splitlines()) == 1


def test_a_task_without_heldout_questions(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_shared, "load", lambda config: (toy_agent(ToyTask(heldout=0)), ToyLanguageModel()))
    done = run("eval", "tiny")
    assert (done.exit_code, done.output) == (1, "error: task 'toy' has no held-out questions\n")


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt(), 130), (ConnectionError("it is gone"), 1)])
def test_what_was_finished_is_reported(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int
) -> None:
    """Two questions are sampled at a time here; it ends after the second time."""
    calls, rollout = [], Sampler.rollout

    def ends(sampler: Sampler, questions: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(len(questions))
        if len(calls) == 3:
            raise failure
        return rollout(sampler, questions, *arguments, **named)

    monkeypatch.setattr(Sampler, "rollout", ends)
    answers, numbers = tmp_path / "answers.jsonl", tmp_path / "numbers.json"
    settings = ["--samples", "4", "--temperature", "1", "--answers", answers, "--json", numbers]
    done = run("eval", trained, *settings)
    assert done.exit_code == code
    assert calls == [2, 2, 2]
    assert "4 questions of 8, the others were not finished, 4 answers each" in done.output
    record = json.loads(numbers.read_text())
    assert (record["questions"], record["questions.asked"], len(read_records(answers))) == (4, 8, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "numbers.json"]


def test_interrupted_before_anything_was_finished(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "rollout", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    done = run("eval", trained, "--json", tmp_path / "numbers.json")
    assert (done.exit_code, done.output) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_rollouts_without_training(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "rollouts"
    done = run("rollout", trained, "--out", out, "--questions", "3", "rollout.paths=4", "rollout.branch_threshold=-9")
    assert done.exit_code == 0, done.output
    assert "set here: rollout.paths = 4 (the run: 2)" in done.output
    trees = json.loads((out / "trees" / "step_000002.json").read_text())
    assert [entry["tree"]["question"]["id"] for entry in trees["trees"]] == ["q2", "q3", "q7"]
    assert all(len(entry["tree"]["paths"]) == len(entry["rewards"]) == 4 for entry in trees["trees"])
    assert trees["vocab_size"] == ToyLanguageModel().vocab_size
    answers = read_records(out / "answers.jsonl")
    assert [sample["reward"] for sample in answers[1]["samples"]] == [
        reward["total"] for reward in trees["trees"][1]["rewards"]
    ]
    page = (out / "rollout.html").read_text()
    assert "q7" in page
    assert f"look at {out / 'rollout.html'}" in done.output
    success = sum(sample["success"] for line in answers for sample in line["samples"]) / 12
    assert ["success", f"{success:.3f}"] in [line.split() for line in done.output.splitlines()]


def test_rollouts_follow_a_branch_rule_of_ones_own(trained: Path, tmp_path: Path) -> None:
    done = run("rollout", trained, "--out", tmp_path / "rollouts", "rollout.branch_rule=test_cli_eval:nowhere")
    assert done.exit_code == 1
    assert "rollout.branch_rule = 'test_cli_eval:nowhere': test_cli_eval has no 'nowhere'" in done.output


def test_rollouts_of_heldout_questions(tmp_path: Path) -> None:
    done = run("rollout", "tiny", "--heldout", "--questions", "99", "--out", tmp_path, "rollout.max_tokens=6")
    assert done.exit_code == 0, done.output
    assert [line["question"]["id"] for line in read_records(tmp_path / "answers.jsonl")][:2] == ["q0", "q101"]
    assert len(read_records(tmp_path / "answers.jsonl")) == HELDOUT
    assert {line["step"] for line in read_records(tmp_path / "answers.jsonl")} == {None}


KINDS = ("low", "high")  # as the ends of an interval, too
REWARD = """
def even_length(question, response):
    return 1.0 if len(response.text) % 2 == 0 else 0.0
"""


def test_data_and_a_reward_of_ones_own_with_the_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is a toy: files, a function of the user's, the model that has not been trained."""
    monkeypatch.setattr(cli_shared, "load", LOAD)
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 6), ("heldout", 5), ("harder", 4)):
        rows = ({"question": f"{name}: 2 + {i}?", "answer": f"{2 + i}", "kind": KINDS[i % 2]} for i in range(count))
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("own_reward_of_eval.py").write_text(REWARD)
    files = ["task.name=files", "task.train=train.jsonl", "task.heldout=heldout.jsonl"]
    own = ["task.rewards={'own_reward_of_eval:even_length': 1.0}", "warm_start.steps=0", "model.cache_dir=cache"]
    settings = [*files, *own, *SMALL[1:]]

    record = evaluated("tiny", *settings, "--samples", "3", "--temperature", "1", "--answers", "answers.jsonl")
    lines = read_records(Path("answers.jsonl"))
    assert (record["questions"], record["task"]) == (5, "files")
    right = [len(sample["text"]) % 2 == 0 for line in lines for sample in line["samples"]]
    assert record["success"] == pytest.approx(sum(right) / 15)
    assert 0 < record["success.low"] + record["success.high"] < 2
    assert [line["question"]["answer"] for line in lines] == ["2", "3", "4", "5", "6"]

    assert run("train", *settings, "train.steps=1", "run.dir=run").exit_code == 0
    assert evaluated("run")["success"] == read_records(Path("run/evals.jsonl"))[-1]["success"]
    other = evaluated("run", "task.heldout=harder.jsonl")
    assert (other["questions"], other["changed"]) == (4, {"task.heldout": "harder.jsonl"})
    Path("heldout.jsonl").write_text(Path("harder.jsonl").read_text())
    refused = run("eval", "run")
    assert "task.heldout_questions was 5 and is 4" in refused.output
    assert refused.exit_code == 1

    done = run("rollout", "run", "--out", "rollouts", "--questions", "2", "task.heldout=harder.jsonl")
    assert done.exit_code == 0, done.output
    assert len(read_records(Path("rollouts/answers.jsonl"))) == 2
