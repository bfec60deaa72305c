"""Questions that cannot be used: refused by every command at the start; long prompts left out and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_trainer import config_for
from trainer_toys import ToyLanguageModel, ToyTask, toy_agent
from typer.testing import CliRunner

from aepo import cli, cli_shared
from aepo.agents.agent import Agent
from aepo.agents.remembered import agent_facts
from aepo.agents.rewards.make import make_rewards
from aepo.rollout.sampler import Sampler
from aepo.run.log import read_records
from aepo.trainer import Trainer
from aepo.types import Question

DROP = "task.long_prompts=drop"
SAID = "2 of 12 training prompts fill the model's context: q10 (4 tokens), q11 (4 tokens); expected fewer than 4 tokens"


def model(positions: int) -> ToyLanguageModel:
    """The prompt of a question of n digits has n + 2 tokens; q10 and q11 have two digits, all held-out ones but q0
    three."""
    made = ToyLanguageModel()
    made.model.config.max_position_embeddings = positions
    return made


def trainer(directory: Path, positions: int, *overrides: str, resume_step: int | None = None) -> Trainer:
    agent = toy_agent(ToyTask(train=12))
    return Trainer(config_for(directory, *overrides), agent, model(positions), resume_step=resume_step)


def test_a_run_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training prompts") as error:
        trainer(tmp_path / "run", 4)
    source = " (max_position_embeddings of model.name = 'tiny'); task.long_prompts=drop leaves them out"
    assert str(error.value) == f"{SAID}{source}"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="3 of 4 held-out prompts"):
        trainer(tmp_path / "run", 5)
    assert len(trainer(tmp_path / "run", 6).questions.train) == 12


def test_long_prompts_are_left_out_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path / "run", 4, DROP)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"left out: {SAID} (max_position")
    assert said[1].startswith("left out: 3 of 4 held-out prompts fill")
    drawn = []
    rollout = run.sampler.rollout

    def seen(questions, *rest, **named):
        drawn.extend(question.id for question in questions)
        return rollout(questions, *rest, **named)

    run.sampler.rollout = seen
    run.train()
    assert set(drawn) <= {f"q{i}" for i in range(10)}
    assert read_records(tmp_path / "run" / "evals.jsonl")[-1]["questions"] == 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["long_prompts_dropped"] == {"train": 2, "heldout": 3}
    resumed = trainer(tmp_path / "run", 4, DROP, "train.steps=4", resume_step=3)
    assert [question.id for question in resumed.questions.train] == [f"q{i}" for i in range(10)]
    resumed.run_directory.release()
    with pytest.raises(ValueError, match=r"begun with another agent: long_prompts_dropped.train was 2 and is 0; "):
        trainer(tmp_path / "run", 6, DROP, resume_step=3)


def test_too_few_are_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.questions = 11: expected <= the task's 10 training questions"):
        trainer(tmp_path / "run", 4, DROP, "train.questions=11")


@pytest.mark.parametrize("command", ["eval", "rollout"])
def test_eval_and_rollout(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer(tmp_path / "run", 4, DROP, "train.steps=0").train()
    monkeypatch.setattr(cli_shared, "load", lambda config: (toy_agent(ToyTask(train=12)), model(4)))
    out = ["--out", str(tmp_path / "out"), "--heldout"] if command == "rollout" else []
    dropped = CliRunner().invoke(cli.app, [command, str(tmp_path / "run"), *out])
    assert dropped.exit_code == 0, dropped.output
    assert "left out: 3 of 4 held-out prompts fill the model's context" in dropped.output
    assert ": 1 questions" in dropped.output
    out = ["--out", str(tmp_path / "none"), "--heldout"] if command == "rollout" else []
    refused = CliRunner().invoke(cli.app, [command, str(tmp_path / "run"), *out, "task.long_prompts=refuse"])
    assert refused.exit_code == 1
    assert "error: 3 of 4 held-out prompts fill the model's context" in refused.output


def test_every_command_says_which_rewards_apply_to_some_questions_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "reward numbers applies to 2 of 4 {} questions: the others have no answer that it can compare"
    agent = toy_agent(ToyTask())
    agent.task.train = agent.task.heldout = [Question(f"q{i}", f"{i}", i if i < 2 else None) for i in range(4)]
    agent = replace(agent, rewards=make_rewards(["numbers", "format"]))
    Trainer(config_for(tmp_path / "run", "train.questions=2", "train.steps=0"), agent, ToyLanguageModel()).train()
    assert capsys.readouterr().out.splitlines()[:2] == [said.format("training"), said.format("held-out")]
    monkeypatch.setattr(cli_shared, "load", lambda config: (agent, ToyLanguageModel()))
    evaluated = CliRunner().invoke(cli.app, ["eval", str(tmp_path / "run")])
    assert evaluated.exit_code == 0, evaluated.output
    assert said.format("held-out") in evaluated.output
    rolled_out = ["rollout", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--questions", "4"]
    assert said.format("training") in CliRunner().invoke(cli.app, rolled_out).output


def coloured(prompts: list, completions: list, colour: list) -> list[float]:
    return [float(one == "red") for one in colour]


def one_without_a_colour(agent: Agent, split: str) -> Agent:
    """The second of two questions lacks a column that a reward needs."""
    agent.task.train = agent.task.heldout = [Question(f"q{i}", f"{i}", 1, "", {"colour": "red"}) for i in range(4)]
    setattr(agent.task, split, [Question("a", "1", 1, "", {"colour": "red"}), Question("b", "2", 1)])
    return replace(agent, rewards={coloured: 1.0})


def one_id_twice(agent: Agent, split: str) -> Agent:
    setattr(agent.task, split, [Question("a", "1"), Question("a", "2")])
    return agent


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("spoil", [one_without_a_colour, one_id_twice])
def test_every_question_is_checked_by_every_command(
    spoil: Callable[[Agent, str], Agent], split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {one_without_a_colour: "question 'b': its parameter 'colour' is no column", one_id_twice: "1 ids belong"}
    agent = spoil(toy_agent(ToyTask()), split)
    with pytest.raises(ValueError, match=expected[spoil]):
        Trainer(config_for(tmp_path / "run", "train.questions=2"), agent, ToyLanguageModel())
    trainer(tmp_path / "run", 9, "train.steps=0").train()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, **agent_facts(agent)}))
    monkeypatch.setattr(cli_shared, "load", lambda config: (agent, ToyLanguageModel()))
    monkeypatch.setattr(Sampler, "rollout", None)  # nothing is drawn
    command = ["rollout", "--out", str(tmp_path / "out")] if split == "train" else ["eval"]
    refused = CliRunner().invoke(cli.app, [*command, str(tmp_path / "run")])
    assert refused.exit_code == 1
    assert expected[spoil] in refused.output
