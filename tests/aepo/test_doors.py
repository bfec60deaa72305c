"""A task, format, tools, rewards, environment, advantage, branch rule and loss of the user, in one file of theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from door_toys import MINE, OWN, SMALL, aepo, save_chat_model, write_home

from aepo.run.checkpoint import list_checkpoints
from aepo.run.log import read_facts, read_records

WEIGHTS = {"length": 1.0, "calls": 0.5, "judge": -0.25, "environment": 2.0}
REWARDS = "task.rewards={mine:length: 1, mine:calls: 0.5, mine:judge: -0.25, environment: 2}"
ALL = [*SMALL, *OWN, REWARDS]
MEASURED = ("seconds", "memory", "tools.seconds", "tokens.per_second", "tokens.generated_per_second")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen"
    save_chat_model(directory, "qwen")
    return directory


@pytest.fixture
def home(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, which is the current directory."""
    return enter(tmp_path, model, monkeypatch)


def enter(home: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    write_home(home)
    (home / "qwen").symlink_to(model)
    return home


def trees_of(step: int) -> list[dict[str, Any]]:
    return json.loads(Path(f"run/trees/step_{step:06d}.json").read_text())["trees"]


def paths_of(entry: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], str]]:
    """Every path, its nodes after the prompt, and their text."""
    nodes, texts = entry["tree"]["nodes"], entry["texts"]
    for path in entry["tree"]["paths"]:
        chain, node = [], path["leaf"]
        while node:
            chain.append(node)
            node = nodes[node]["parent"]
        chain.reverse()
        yield path, [nodes[node] for node in chain], "".join(piece for node in chain for piece in texts[node])


def by_hand(entry: dict[str, Any]) -> list[dict[str, float]]:
    """What each of the four functions says of each path, from its tokens and its calls; checks every tool result."""
    found = []
    for path, nodes, text in paths_of(entry):
        answer, tokens = entry["tree"]["question"]["answer"], sum(len(node["token_ids"]) for node in nodes)
        count = 100 * answer
        for node in nodes:
            for call, result in zip(node["calls"], node["results"], strict=True):
                if call["tool"] == "move":
                    count += call["arguments"]["by"]
                said = f"now {count}" if call["tool"] == "move" else str(sum(call["arguments"].values()))
                assert (result["text"], result["error"]) == (said, None)
        if (path["finish_reason"], nodes[-1]["finish_reason"]) == ("length", "stop"):  # no room for a result to be read
            count += len(nodes[-1]["token_ids"])
        values = {"length": tokens / 10, "judge": len(text) / 100, "environment": count / 1000}
        if tokens % 3:
            values["calls"] = tokens + answer
        found.append(values)
    return found


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("world", ["World", "ForkingWorld"])
def test_every_door_at_once(home: Path, world: str) -> None:
    done = aepo("train", *ALL, f"task.environment=mine:{world}")
    assert done.code == 0, done.output
    records = read_records(Path("run/metrics.jsonl"))
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        entries = trees_of(record["step"])
        hand = [values for entry in entries for values in by_hand(entry)]
        totals = [sum(WEIGHTS[name] * value for name, value in values.items()) for values in hand]
        saved = [reward for entry in entries for reward in entry["rewards"]]
        assert [reward["total"] for reward in saved] == pytest.approx(totals)
        assert record["reward.mean"] == pytest.approx(mean(totals))
        for name in WEIGHTS:
            applied = [values[name] for values in hand if name in values]
            assert record[f"reward.{name}"] == pytest.approx(mean(applied)), name
        assert 0 < sum("calls" not in values for values in hand) < len(hand), "it applies to some"
        assert record["train.success"] == mean([values["length"] >= 1 for values in hand])
        rewards, questions, advantages = done.mine.ADVANTAGES[record["step"] - 1]
        assert rewards == pytest.approx(totals)
        assert questions == [0] * 4 + [1] * 4 + [2] * 4
        assert advantages == pytest.approx([(total - mean(totals)) / 2 for total in totals])
        assert [a for entry in entries for a in entry["advantages"]] == pytest.approx(advantages)
        calls = [call["tool"] for entry in entries for node in entry["tree"]["nodes"] for call in node["calls"]]
        assert record["tools.calls.move"] == calls.count("move") > 0
        assert record["tools.calls.add"] == calls.count("add") > 0
        decisions = [decision for entry in entries for decision in entry["tree"]["decisions"]]
        assert {decision["probability"] for decision in decisions} <= {0.9, 0.1}
        assert any(decision["branched"] for decision in decisions)
        assert record["rollout.refused_branches"] == 0
        assert record["policy.mine"] == record["tokens.trained"], "one micro-batch"
        for entry in entries:
            question = entry["tree"]["question"]
            prompt = "".join(entry["texts"][0])
            assert prompt == f"Be brief.\n{question['text']}\nThe counter stands at {100 * question['answer']}.\n"
    worlds = done.mine.WORLDS
    assert worlds["made"] == worlds["closed"]
    assert (worlds["forked"] > 0) == (world == "ForkingWorld")


def test_what_a_run_remembers(home: Path) -> None:
    assert aepo("train", *ALL, "train.steps=0").code == 0
    facts = read_facts(Path("run"))
    assert facts["task"]["name"] == "Sums"
    assert (facts["task"]["train_questions"], facts["task"]["heldout_questions"]) == (10, 3)
    assert facts["task"]["system"] == "Be brief."
    assert all(len(digest) == 64 for digest in facts["task"]["data"].values())
    assert facts["format"]["name"] == "mine:Counting"
    assert list(facts["tools"]) == ["move", "add"]
    assert facts["environment"] == "World"
    builtin = "aepo.agents.rewards.builtin:environment"
    assert facts["rewards"] == {"mine:length": 1, "mine:calls": 0.5, "mine:judge": -0.25, builtin: 2}
    config = Path("run/config.yaml").read_text()
    for name in ("mine:Sums", "mine:World", "mine:advantage", "mine:rule", "mine:loss"):
        assert name in config


BREAKING = {
    "reward": "reward length, question 't",
    "judge": "reward judge, question 't",
    "reset": "World.reset raised KeyError: ",
    "get_reward": "World.get_reward raised KeyError: ",
    "rule": "rollout.branch_rule: rule failed: KeyError: ",
    "advantage": "policy.advantage: advantage failed: KeyError: ",
    "loss": "policy.loss: loss raised KeyError: ",
    "read": "format.name = 'mine:Counting': read failed: KeyError: ",
    "prompt_tokens": "format.name = 'mine:Counting': prompt_tokens failed: KeyError: ",
    "result_tokens": "format.name = 'mine:Counting': result_tokens failed: KeyError: ",
    "messages": "task Sums: messages of question 't",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[dict[str, Any]]:
    """The records of the run that the test below disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        enter(tmp_path_factory.mktemp("undisturbed"), model, patch)
        assert aepo("train", *ALL).code == 0
        return read_records(Path("run/metrics.jsonl"))


def repeatable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in r.items() if not key.startswith(MEASURED)} for r in records]


@pytest.mark.parametrize("what", BREAKING)
def test_what_fails_in_the_middle(home: Path, undisturbed: list[dict[str, Any]], what: str) -> None:
    """The run ends with one line and its last finished step, and goes on from there as if nothing had been."""
    (home / "mine.py").write_text(MINE.replace("FAIL = None", f"FAIL = {what!r}"))
    line = aepo("train", *ALL).failure
    assert BREAKING[what] in line
    assert f"{what} in step 2" in line
    assert "(mine.py, line " in line
    assert [checkpoint.step for checkpoint in list_checkpoints(Path("run/checkpoints"))][-1] == 1
    assert read_facts(Path("run"))["status"] == "failed"
    assert read_facts(Path("run"))["reason"] == line
    assert repeatable(read_records(Path("run/metrics.jsonl"))) == repeatable(undisturbed[:1])
    (home / "mine.py").write_text(MINE + "\n")  # another size: Python looks at time and size of a file
    done = aepo("train", "--resume", "run")
    assert done.code == 0, done.output
    assert repeatable(read_records(Path("run/metrics.jsonl"))) == repeatable(undisturbed)
    assert read_facts(Path("run"))["status"] == "finished"
