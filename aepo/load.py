"""What a configuration names becomes objects: the model, the task, and the agent that a run trains."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import torch

from aepo.agents.agent import Agent
from aepo.agents.formats.make import make_format
from aepo.agents.protocol import (
    USER_ERRORS,
    AgentError,
    RewardFunction,
    Task,
    blamed,
    dialogue,
    every_question,
    problem_of,
    question_at,
    shown,
)
from aepo.agents.rewards.builtin import BUILTIN, COMPARED
from aepo.agents.rewards.make import make_rewards
from aepo.agents.tasks.facts.warmstart import warm_started
from aepo.agents.tools.environment import EnvironmentTools
from aepo.agents.tools.make import make_tools
from aepo.agents.tools.toolbox import ToolBox
from aepo.config import Config, ModelConfig, TaskConfig, WarmStartConfig
from aepo.files.user_paths import user_path
from aepo.models.adapters import refuse_adapter_directory
from aepo.models.language_model import LanguageModel
from aepo.models.small import Progress
from aepo.models.smollm2 import model_directory
from aepo.registry import resolve
from aepo.types import Question


def load_model(
    config: ModelConfig,
    warm_start: WarmStartConfig,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LanguageModel:
    """The model by its name, in evaluation mode. The first time, `tiny` is trained and SmolLM2 converted.

    progress: of the warm start of the tiny model. ValueError, in one line: there is no model of this name, its
    directory cannot be used, or the cache directory cannot be written.
    """
    dtype, cache_dir = getattr(torch, config.dtype), user_path("model.cache_dir", config.cache_dir)
    if config.name == "tiny":
        language_model = warm_started(warm_start, cache_dir, device=device, progress=progress)
        language_model.model.to(dtype).config.dtype = dtype  # which its checkpoints will say
        return language_model
    converted = config.name == "smollm2-135m-instruct"
    directory = model_directory(cache_dir) if converted else user_path("model.name", config.name)
    refuse_adapter_directory(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"model.name = {config.name!r}: expected tiny, smollm2-135m-instruct, or a directory with a config.json"
        )
    return LanguageModel.from_directory(directory, dtype=dtype, device=device)


def load_task(settings: TaskConfig) -> Task:
    """The task by its name, with its data. ValueError, in one line: there is none, or its data cannot be used.
    AgentError: questions of the user's own class cannot be asked for, or are none."""
    if ":" in settings.name:
        task = _own_task(settings)
    elif settings.name == "facts":
        from aepo.agents.tasks.facts.task import FactsTask

        task = FactsTask(settings.seed)
    elif settings.name == "files":
        from aepo.agents.tasks.files import FilesTask

        task = FilesTask(settings.train, settings.heldout, settings.columns, seed=settings.seed)
    else:  # the settings know no other names
        from aepo.agents.tasks.reasoning_gym import ReasoningGymTask

        _check_options(ReasoningGymTask, settings.options)
        task = ReasoningGymTask(**{"seed": settings.seed, **settings.options})
    for split, words in (("train", "training"), ("heldout", "held-out")):
        if not _checked_questions(task, split):
            raise ValueError(f"task {task.name}: expected at least one {words} question, it has none")
    if settings.system is not None:
        task.system = _text_or_file(settings.system)
    return task


def load_agent(config: Config, language_model: LanguageModel, task: Task | None = None) -> Agent:
    """Task, tools, environment, format and rewards of a configuration, for a model; `close` it.

    task: in place of the one that the configuration names. ValueError or AgentError, in one line, for whatever cannot
    be used.
    """
    settings = config.task
    if task is None:
        task = load_task(settings)
    questions = {split: _checked_questions(task, split) for split in ("train", "heldout")}
    toolbox = ToolBox(make_tools([*task.tools, *settings.tools], settings.tool_timeout, "task.tools"))
    try:
        cls = task.environment if settings.environment is None else resolve(settings.environment, "task.environment")
        rewards = _rewards(settings, task, cls)
        environment = None if cls is None else EnvironmentTools(cls, toolbox, settings.tool_timeout)
        chat = language_model.tokenizer.chat_template is not None
        for split, checked in questions.items():
            if environment is not None and checked:
                environment.check(checked[0])
            for question in checked[:1]:  # the others before the first step (question_checks)
                dialogue(task, question, chat=chat, observed=environment is not None)
            for question in checked:
                _check_answer(question, rewards, f"task {task.name}: {split}")
        schemas = (environment or toolbox).schemas
        return Agent(
            task=task,
            format=make_format(config.format, language_model, schemas, tool_instructions=task.tool_instructions),
            toolbox=toolbox,
            environment=environment,
            rewards=rewards,
            chat=chat,
        )
    except BaseException:
        toolbox.close()
        raise


def _rewards(settings: TaskConfig, task: Task, environment: type | None) -> Mapping[RewardFunction, float]:
    """Those of the settings, else the task's, else what the environment says."""
    if settings.rewards is not None:
        named = make_rewards(settings.rewards)
        if BUILTIN["environment"] in named and not hasattr(environment, "get_reward"):
            raise ValueError(
                f"task.rewards = {settings.rewards!r}: expected an environment with a method get_reward() for the "
                f"reward environment, got {'none' if environment is None else environment.__name__}"
            )
        return named
    found = task.rewards or (make_rewards("environment") if hasattr(environment, "get_reward") else {})
    if not found:
        raise ValueError(
            f"task.rewards = null: expected reward functions (docs/rewards.md), task {task.name} has none of its own"
        )
    return found


def _own_task(settings: TaskConfig) -> Task:
    cls = resolve(settings.name, "task.name")
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise ValueError(f"task.name = {settings.name!r}: expected a class derived from aepo.agents.protocol.Task")
    _check_options(cls, settings.options)
    try:
        return cls(**settings.options)
    except USER_ERRORS as error:  # whatever the user's code does
        raise ValueError(f"task.name = {settings.name!r}: making it failed: {problem_of(error, cls)}") from error


def _checked_questions(task: Task, split: str) -> list[Question]:
    """All questions of a list or tuple; of another sequence, which may make them when they are asked for, the first
    and the last. AgentError: it is no sequence, has fewer than its len() says, or what is in it are no questions."""
    whose = f"task {task.name}: {split}"
    with blamed(whose, type(task)):
        questions = getattr(task, split)
        kind = type(questions)
        if isinstance(questions, (str, bytes, Mapping)) or not (
            hasattr(kind, "__len__") and hasattr(kind, "__getitem__")
        ):
            raise AgentError(
                f"{whose}: expected a list of questions, or what has len() and [index], got {kind.__name__}"
            )
    with blamed(f"{whose}: len()", kind.__len__):
        count = len(questions)
    if not isinstance(questions, (list, tuple)):
        return [question_at(questions, index, whose) for index in sorted({0, count - 1}) if count]
    found = list(every_question(questions, whose))
    if len(found) < count:
        raise AgentError(f"{whose}: expected the {count} questions that its len() says, got {len(found)}")
    return found


def _check_answer(question: Question, rewards: Mapping[RewardFunction, float], whose: str) -> None:
    """AgentError: a built-in reward would compare how Python prints it."""
    answer = question.answer
    if all(
        one is None or isinstance(one, (str, Number))
        for one in (answer if isinstance(answer, (list, tuple)) else (answer,))
    ):
        return
    if function := next((function for function in rewards if function in COMPARED), None):
        raise AgentError(
            f"{whose}: answer of question {question.id!r}: expected text, a number or a list of these for the reward "
            f"{function.__name__}, got {type(answer).__name__} {shown(answer)}"
        )


def _check_options(cls: type[Task], options: Mapping[str, Any]) -> None:
    """ValueError: they are no arguments of the class."""
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        signature = f"{cls.__name__}{inspect.signature(cls)}"
        raise ValueError(f"task.options = {options!r}: expected arguments of {signature}: {error}") from None


def _text_or_file(text: str) -> str:
    """A path of a text file stands for what is in it."""
    path = Path(os.path.expanduser(text))  # not `user_path`: a text may begin with ~, too
    try:
        if "\n" not in text and path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task.system = {text!r}: the file cannot be read: {error}") from None
    if path.suffix in (".txt", ".md") and not any(map(str.isspace, text)):  # nobody tells a model only that
        raise ValueError(f"task.system = {text!r}: there is no such file, in {Path.cwd()}")
    return text
