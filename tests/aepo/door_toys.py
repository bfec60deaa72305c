"""A folder of a user, for the tests of every door: data, a small random chat model, and one file of their own."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import format_templates
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from aepo import cli

SMALL = [
    "run.threads=1",
    "warm_start.steps=0",
    "train.questions=3",
    "train.steps=2",
    "rollout.paths=4",
    "rollout.max_tokens=60",
    "rollout.max_segment_tokens=30",
    "eval.questions=2",
    "log.tensorboard=false",
    "log.trees=3",
    "log.trees_every=1",
    "run.dir=run",
]
"""Two short steps of three questions with four paths."""

MINE = '''
import asyncio
import functools
import time

import torch

from aepo.agents.protocol import Task
from aepo.types import Question, ToolCall, Turn

FAIL = None  # what fails in step 2
DONE = []  # one entry per finished rollout of training
SEEN = []  # (function, question, value) of every reward
POINTS = []  # of the branch rule
WORLDS = {"made": 0, "forked": 0, "closed": 0}
ADVANTAGES = []  # (rewards, questions, advantages)


def breaks(what):
    """In step 2, where the test says so."""
    if what == FAIL and len(DONE) == 1:
        raise KeyError(f"{what} in step 2")


class Sums(Task):
    """Ten sums to train on."""

    system = "Be brief."

    def __init__(self, size: int = 10):
        self.train = [Question(f"t{i}", f"What is {i} + 1?", i + 1, "odd" if i % 2 else "even") for i in range(size)]
        self.heldout = [Question(f"h{i}", f"What is {i} + 2?", i + 2, "even") for i in range(3)]

    def messages(self, question, *, chat):
        breaks("messages")
        return super().messages(question, chat=chat)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


class World:
    """A counter."""

    def __init__(self):
        WORLDS["made"] += 1
        self.count = 0

    def reset(self, **row):
        breaks("reset")
        self.count = 100 * row["answer"]
        return f"The counter stands at {self.count}."

    def move(self, by: int) -> str:
        """Move the counter.

        Args:
            by: how far
        """
        self.count += by
        return f"now {self.count}"

    def get_reward(self):
        breaks("get_reward")
        return self.count / 1000

    def close(self):
        WORLDS["closed"] += 1


class ForkingWorld(World):
    def fork(self):
        WORLDS["forked"] += 1
        other = ForkingWorld()
        other.count = self.count
        return other


class Counting:
    """A format for a model that writes at random: what a segment says depends on how many tokens it has."""

    name = "counting"
    stop_strings = ("e",)

    def __init__(self, settings, language_model, schemas, *, tool_instructions=None):
        self.tokenizer = language_model.tokenizer
        self.vocab_size, self.eos_ids = language_model.vocab_size, language_model.eos_ids
        self.tools = [schema["function"]["name"] for schema in schemas]

    def prompt_tokens(self, messages):
        breaks("prompt_tokens")
        return self.encode("\\n".join(message["content"] for message in messages) + "\\n")

    def read(self, token_ids, finish_reason):
        breaks("read")
        text, count = self.decode(token_ids), len(token_ids)
        if finish_reason == "length":
            return Turn(text, text, well_formed=False)
        if count % 4 == 0:
            return Turn(text, text, answered=True, answer=str(count))
        calls = [ToolCall("move", {"by": count})]
        if "add" in self.tools and count % 2 == 0:
            calls.append(ToolCall("add", {"a": count, "b": 1}))
        return Turn(text, text, tuple(calls))

    def result_tokens(self, turn, results):
        breaks("result_tokens")
        return self.encode("".join(f"\\n{result.text}" for result in results) + "\\n")

    def decode(self, token_ids):
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def encode(self, text):
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def length(question, response):
    """Of one path; ours."""
    breaks("reward")
    value = len(response.token_ids) / 10
    SEEN.append(("length", question.id, value))
    return value


def calls(prompts, completion_ids, answer, **columns):
    """Of all paths of a question; TRL's. It does not apply to short ones."""
    values = [None if len(ids) % 3 == 0 else float(len(ids) + int(answer[0])) for ids in completion_ids]
    SEEN.extend(("calls", columns["id"][0], value) for value in values)
    return values


async def judge(data_source, solution_str, ground_truth, extra_info=None):
    """Of one path, and it waits; verl's."""
    await asyncio.sleep(0.01)
    breaks("judge")
    value = len(solution_str) / 100
    SEEN.append(("judge", data_source, value))
    return {"score": value, "letters": len(solution_str)}


def advantage(rewards, questions):
    """Half of what the batch has above its mean."""
    breaks("advantage")
    found = (rewards - rewards.mean()) / 2
    ADVANTAGES.append((rewards.tolist(), questions.tolist(), found.tolist()))
    DONE.append(1)
    return found


def rule(point):
    breaks("rule")
    POINTS.append(point)
    return 0.9 if point.step % 2 else 0.1


def loss(logprobs, entropy, batch):
    if FAIL == "loss" and len(DONE) == 2:
        raise KeyError("loss in step 2")
    ratio = (logprobs - batch.old_logprobs).exp()
    return -(ratio * batch.advantages).sum() / batch.tokens, {"mine": float(len(logprobs))}


class Quoted:
    """A parser of calls: what stands in Hermes' tags, with the names in capitals."""

    def __call__(self, text, schemas):
        import json
        import re

        found = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.S)
        calls = [json.loads(one) for one in found]
        return text.partition("<tool_call>")[0].strip(), tuple(ToolCall(c["name"], c["arguments"]) for c in calls)


# What nobody can use.


def untyped(a, b):
    """Add.

    Args:
        a: the first
        b: the second
    """


def mute(a: int) -> int:
    return a


class Box:
    def add(self, a: int) -> int:
        """Add.

        Args:
            a: a number
        """


def move_far(by: int) -> int:
    """Move.

    Args:
        by: how far
    """


move_far.__name__ = "move"


class Clock:
    def reset(self, **row):
        """It says nothing."""

    def get_current_time(self, timezone: str) -> str:
        """The time.

        Args:
            timezone: where
        """


class BrokenWorld(World):
    def reset(self, **row):
        raise RuntimeError("no world")


class WantsColour(World):
    def reset(self, colour):
        """It is no column."""


class NoWorld:
    def move(self) -> str:
        """Move."""


class BrokenParser:
    def __init__(self):
        raise RuntimeError("no parser")


class NoFormat:
    def __init__(self, *settings, **more):
        self.name = "none"


class BrokenFormat(Counting):
    def __init__(self, *settings, **more):
        raise RuntimeError("no format")


class NoHeldout(Task):
    train = [Question("a", "b", 1)]


class NoReward(NoHeldout):
    heldout = [Question("c", "d", 1)]


class BrokenTask(Sums):
    def __init__(self):
        raise OSError("no disk")


def too_few(prompts, completions, **columns):
    return [1.0] * (len(completions) - 1)


def one_number(prompts, completions, **columns):
    return 1.0


def raising(question, response):
    raise KeyError("colour")


def a_text(question, response):
    return "0.5"


def not_finite(question, response):
    return float("nan")


def silent(question, response):
    return None


def strange(a, b):
    return 1.0


def wants_colour(prompts, completions, colour):
    return [1.0] * len(completions)


def parses_nothing(text, schemas):
    return text, ()


def one_argument(rewards):
    return rewards


def no_argument():
    return 0.5


number = 5
'''

OWN = [
    "model.name=qwen",
    "task.name=mine:Sums",
    "task.tools=[mine:add]",
    "task.rewards={mine:length: 1, mine:calls: 0.5, mine:judge: -0.25}",
    "task.environment=mine:World",
    "format.name=mine:Counting",
    "policy.advantage=mine:advantage",
    "policy.loss=mine:loss",
    "rollout.branch_rule=mine:rule",
]
"""Every door at once."""

FILES = ["model.name=qwen", "task.name=files", "task.train=rows.jsonl", "task.rewards=exact_match"]
"""The user's rows with a chat model."""


def write_home(home: Path) -> None:
    (home / "mine.py").write_text(MINE)
    write_rows(home / "rows.jsonl", 12)
    (home / "empty.jsonl").write_text("")
    (home / "no_prompt.jsonl").write_text('{"colour": "red", "answer": "1"}\n')
    (home / "half.jsonl").write_text(
        '{"prompt": "a", "answer": "1"}\n{"answer": "2"}\n{"prompt": "c", "answer": "3"}\n'
    )
    (home / "one.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')


def write_rows(path: Path, count: int) -> None:
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_chat_model(directory: Path, family: str | PreTrainedTokenizerFast) -> None:
    """One layer of random weights, with the tokenizer and chat template of a family, or this tokenizer."""
    tokenizer = format_templates.family(family) if isinstance(family, str) else family
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextmanager
def own_modules() -> Iterator[None]:
    """Modules of the folder are forgotten at the end, and the path that imports have is put back."""
    before, path = set(sys.modules), list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        here = os.getcwd()
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(here):
                del sys.modules[name]


@dataclass(frozen=True)
class Done:
    """A command that has ended. mine: the module of the user, as it is then; None: it was not imported."""

    code: int
    output: str
    error: BaseException | None
    mine: Any

    @property
    def failure(self) -> str:
        """The one line that it ended with."""
        assert self.code == 1, self.output
        assert isinstance(self.error, SystemExit), "".join(traceback.format_exception(self.error))
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert lines == self.output.splitlines()[-1:], self.output
        return lines[0].removeprefix("error: ")


def aepo(*arguments: str | Path) -> Done:
    """The command, in this process; the user's modules are imported anew."""
    with own_modules():
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        return Done(done.exit_code, done.output, done.exception, sys.modules.get("mine"))
