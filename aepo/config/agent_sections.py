"""Which agent is trained, and which model it is: sections of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from aepo.config.setting_types import Section, key, suggestion

TASKS = ("facts", "files", "reasoning_gym")


@dataclass(frozen=True)
class TaskConfig(Section):
    """What is trained on (docs/own_agent.md). Names of the user's own code are package.module:name."""

    section: ClassVar[str] = "task"
    name: str = key("facts", "facts (the demo), files (your own data), reasoning_gym, or package.module:Class")
    seed: int = key(0, "of the division into training and held-out questions", low=0)
    options: dict[str, Any] = key({}, "arguments of the task's class, by name")
    train: str | list[str] | None = key(
        None, "files: questions", expected="a .jsonl or .parquet file, a `datasets` directory, or a list"
    )
    heldout: float | str | list[str] | None = key(
        None,
        "files: questions for evaluation; null: a tenth of task.train",
        expected="as task.train, or a share of it in (0, 1)",
    )
    columns: dict[str, str] = key(
        {}, "files: which columns are prompt, answer, id, kind; those not named are guessed", empty=True
    )
    system: str | None = key(
        None, "the system message, as text or as the path of a text file; null: the task's own", empty=True
    )
    tools: tuple[str, ...] = key(
        (),
        "python, search:CORPUS.jsonl, package.module:function or :Class, mcp:COMMAND, mcp+http://.., http://../retrieve",
    )
    tool_timeout: float = key(30.0, "seconds a call of your own tools may take", above=0)
    environment: str | None = key(None, "package.module:Class, a state that calls change (docs/environments.md)")
    rewards: Any = key(
        None,
        "reward functions, weighted; null: the task's own",
        expected="a list of package.module:function or built-in names, or {name: weight}",
    )
    long_prompts: Literal["refuse", "drop"] = key(
        "refuse", "questions whose prompt fills the model's context: end the start and name them, or leave them out"
    )
    success: float = key(1.0, "a path succeeds where the first reward that applies (docs/rewards.md) is at least this")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in TASKS and ":" not in self.name:
            hint = suggestion(self.name, TASKS)
            raise ValueError(f"task.name = {self.name!r}: expected {', '.join(TASKS)}, or package.module:Class{hint}")
        for setting in ("train", "heldout", "columns"):
            value = getattr(self, setting)
            if value not in (None, {}) and self.name != "files":
                raise ValueError(f"task.{setting} = {value!r}: expected task.name = files with it, got {self.name!r}")
        if self.options and self.name in ("facts", "files"):
            raise ValueError(f"task.options = {self.options!r}: expected none with task.name = {self.name}")


@dataclass(frozen=True)
class FormatConfig(Section):
    """How dialogues become tokens, and how calls and answers are written (docs/formats.md)."""

    section: ClassVar[str] = "format"
    name: str = key(
        "auto",
        "chat: the model's own template; tags: <tool>..</tool>, for any model; package.module:Class; auto: chat where "
        "the template shows tools, else tags",
    )
    calls: str = key(
        "auto",
        "chat: how calls are written: hermes, qwen3_coder, llama3_json, glm45, or package.module:Class; auto: by a "
        "round trip",
    )
    answer: Literal["auto", "tag", "boxed", "turn"] = key(
        "auto", "the answer is in <answer>, in \\boxed{}, or the last turn; auto: the first of these that is there"
    )
    chat_template_kwargs: dict[str, Any] = key(
        {}, "chat: arguments of the template's own, such as {enable_thinking: false}"
    )


@dataclass(frozen=True)
class ModelConfig(Section):
    section: ClassVar[str] = "model"
    name: str = key("tiny", "tiny (trained here from scratch), smollm2-135m-instruct, or a model directory")
    dtype: Literal["float32", "bfloat16", "float64"] = key("float32", "of the weights and activations")
    cache_dir: str = key("~/.cache/aepo", "where models are kept that were trained or converted here")


@dataclass(frozen=True)
class WarmStartConfig(Section):
    """Supervised training of the tiny model on generated demonstrations, before AEPO (docs/task.md)."""

    section: ClassVar[str] = "warm_start"
    steps: int = key(800, "optimiser steps; 0: none, the weights are random", low=0)
    batch_tokens: int = key(1024, "tokens per step, padding included", low=128)
    peak_rate: float = key(2e-3, "highest learning rate of AdamW", above=0)
    careful_share: float = key(0.7, "part of the steps with a demonstrator who makes no mistakes", low=0, high=1)
    seed: int = key(0, "of the initial weights and the demonstrations", low=0)
