"""What a user's own agent is made of: tools, environments, chat formats, rewards, tasks.

A setting names one as "package.module:Name" (`aepo.registry`), so a newcomer's own is one file of theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

from aepo.registry import error_text, place_of
from aepo.types import Message, Question, Response, Reward, TokenIds, ToolCall, ToolResult, Turn

RewardValue = float | Reward | None
"""What one path gets: a number, a `Reward`, or None, "does not apply"."""
RewardFunction = Callable[..., Any]
"""Any signature of docs/rewards.md: ours (question, response), TRL's, verl's; may be async."""


class AgentError(RuntimeError):
    """The user's own code failed: a reward, an environment, a format, a rule. It says which, where, and how."""


USER_ERRORS = (Exception, SystemExit)
"""What the user's code may end with: exit() in it is a fault like another one, and must not end the run as a success.
Ctrl-C is none."""


def problem_of(error: BaseException, function: Any) -> str:
    """What was raised, with the line of the function's file, in one line; also where its text cannot be made."""
    return f"{error_text(error)}{place_of(error, function)}"


def shown(value: Any, most: int = 80) -> str:
    """Its repr in one line of at most so many characters; also where it has none."""
    try:
        text = " ".join(repr(value).split())
    except Exception as failure:
        text = f"a value that cannot be shown ({type(failure).__name__})"
    return text if len(text) <= most else f"{text[: most - 3]}..."


@contextlib.contextmanager
def blamed(what: str, function: Any) -> Iterator[None]:
    """What the user's function raises becomes an AgentError, with the line of their file. what: how messages begin."""
    try:
        yield
    except AgentError:
        raise
    except USER_ERRORS as error:
        raise AgentError(f"{what} failed: {problem_of(error, function)}") from error


class ToolError(Exception):
    """A call that failed by the model's own fault, for example code that raised: the model reads the message."""


class Tool(Protocol):
    """Called with the arguments that the model wrote, by name, after they were checked against `parameters`; returns
    the text that the model reads next, or what has a JSON form (docs/tools.md).

    A call may block, raise, return nothing, or be a coroutine: the `ToolBox` runs calls concurrently, gives up waiting
    after `timeout` and turns every failure into a short error text. A tool that holds processes or connections has a
    method `close()`, which the `ToolBox` calls when it is closed itself. One that answers from data may have an
    `identity`, a mapping of JSON values (a hash of its documents, say): a run remembers it, and another run must agree.
    """

    name: str
    timeout: float  # seconds
    description: str
    parameters: Mapping[str, Any]  # JSON schema of type "object", as in the `parameters` of an OpenAI function

    def __call__(self, *args: Any, **arguments: Any) -> Any: ...  # to a type checker: any parameters


class Environment(Protocol):
    """State that the calls of one path change. The interface is that of TRL's environment classes.

    The class is made anew, without arguments, for every path. Every other public method is a tool, with the schema of
    its signature and docstring. Optional methods: `get_reward() -> float`, asked when the path has ended; `close()`;
    and `fork()`, another instance in the same state, which branching uses (docs/environments.md). Without `fork` a
    branch gets a new instance, reset with the same row, on which the recorded calls are repeated.
    """

    def reset(self, **row: Any) -> str | None:
        """Begin with a question's columns; what it returns is added to the question."""
        ...


class Session(Protocol):
    """What the tool calls of one path run in."""

    observation: str | None  # what the environment's reset returned: it is added to the question

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """One result per call, in order. Never raises for what a tool does."""
        ...

    async def branch(self, turns: int) -> Session | None:
        """Another session in the state after the first `turns` calls of `run`; None: it cannot be reached."""
        ...

    def forget(self, turns: int) -> None:
        """Nobody will branch after the first `turns` calls of `run` or earlier any more."""
        ...

    async def reward(self) -> float | None:
        """What the environment says about the path that has ended."""
        ...

    async def close(self) -> None: ...


class ChatFormat(Protocol):
    """The one owner of how dialogues become tokens and of what the model's tokens mean.

    Append-only and exact: what the model wrote stays as its ids, and what comes next is tokenised by itself. Text of
    users and tools never becomes control tokens.
    """

    name: str
    identity: Mapping[str, Any]  # what a run remembers: name, and what else decides what tokens mean (JSON values)
    chosen: str  # one line for people: why this format, these calls, and what of the model is not as usual
    warnings: tuple[str, ...]  # what inference will do differently from training with this template
    eos_ids: tuple[int, ...]  # tokens that end a segment, ascending
    stop_strings: tuple[str, ...]  # generation also ends with the token that completes one of these
    vocab_size: int  # of the distributions that tokens are drawn from

    def prompt_tokens(self, messages: Sequence[Message]) -> TokenIds:
        """What comes before the first generated token."""
        ...

    def read(
        self,
        token_ids: Sequence[int],
        finish_reason: Literal["stop", "eos", "length"],
        *,
        before: Sequence[int] | None = None,
    ) -> Turn:
        """What a segment says. `finish_reason`: why the engine ended it. `before`: the prompt or the results that it
        follows; a format of your own need not take it."""
        ...

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        """What the model reads after a segment with calls: the rest of its turn, the results (one per call, in order),
        and the beginning of its next turn."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, with its tags and control tokens."""
        ...


class Task:
    """Questions, what the agent may use, and how it is scored. Derive from it, and give at least `train`, `heldout`
    and one of `reward` and `rewards`.

    `task.name=package.module:Class` makes one, with the arguments of `task.options`.
    """

    name: str = ""  # of a derived class that gives none: that of the class
    train: Sequence[Question] = ()
    heldout: Sequence[Question] = ()
    """Shares no answer path with `train`."""
    tools: Sequence[Tool | Callable[..., Any]] = ()
    """Tools, or typed Python functions with a docstring, which become tools."""
    environment: type[Environment] | None = None
    system: str | None = None
    """The system message, where a question brings none."""
    tool_instructions: str | None = None
    """What a model is told about its tools where its chat template cannot show them. None: their descriptions."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__dict__.get("name") or cls.__name__  # not that of a class between

    def reward(self, question: Question, response: Response) -> RewardValue | Awaitable[RewardValue]:
        """Score one path."""
        raise NotImplementedError(f"{type(self).__name__} has neither reward() nor rewards")

    @property
    def rewards(self) -> Mapping[RewardFunction, float]:
        """Reward functions with their weights; the total is the weighted sum. Empty: the task has none of its own."""
        return {} if type(self).reward is Task.reward else {self.reward: 1.0}

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a run remembers of the data, and another run of the same task must agree with: JSON values."""
        splits = {"train": self.train, "heldout": self.heldout}
        every = {split: f"task {self.name}: {split}" for split in splits}
        return {
            **{split: content_hash(every_question(splits[split], whose)) for split, whose in every.items()},
            **{f"{split}_data": data_hash(every_question(splits[split], whose)) for split, whose in every.items()},
        }

    def messages(self, question: Question, *, chat: bool) -> tuple[Message, ...]:
        """The dialogue that a question begins with. chat: whether the model has a chat template."""
        begins = question.messages
        if self.system is None or (begins and begins[0].get("role") == "system"):
            return begins
        return ({"role": "system", "content": self.system}, *begins)


@runtime_checkable
class Closable(Protocol):
    """Holds something that ends with it."""

    def close(self) -> None: ...


def every_question(questions: Sequence[Question], whose: str) -> Iterator[Question]:
    """All of a sequence that the user may have written, as many as its `len` says. AgentError: asking for one fails,
    or it is no usable question. whose: how messages begin, "task Sums: train"."""
    with blamed(whose, getattr(type(questions), "__getitem__", type(questions))):
        for index, found in enumerate(islice(questions, len(questions))):  # a __getitem__ may know no end
            yield _usable(found, f"{whose}[{index}]")


def question_at(questions: Sequence[Question], index: int, whose: str) -> Question:
    """One of them. AgentError as above."""
    with blamed(f"{whose}[{index}]", type(questions).__getitem__):
        return _usable(questions[index], f"{whose}[{index}]")


def _usable(found: Any, place: str) -> Question:
    if not isinstance(found, Question):
        raise AgentError(f"{place}: expected a Question, got {type(found).__name__} {shown(found)}")
    if not isinstance(found.id, str):
        problem = f"id = {shown(found.id)}: expected text, got {type(found.id).__name__}"
    elif not isinstance(found.prompt, str) and not _is_dialogue(found.prompt):
        problem = f"prompt = {shown(found.prompt)}: expected text or messages, got {type(found.prompt).__name__}"
    elif not isinstance(found.data, Mapping):
        problem = f"data = {shown(found.data)}: expected columns by name, got {type(found.data).__name__}"
    else:
        return found
    raise AgentError(f"{place}, question {shown(found.id)}: {problem}")


def dialogue(task: Task, question: Question, *, chat: bool, observed: bool) -> tuple[Message, ...]:
    """What the task's `messages` returns. observed: an environment adds to the last one, which may be empty.

    AgentError: it fails, or returns something else than messages that say something.
    """
    what = f"task {task.name}: messages of question {question.id!r}"
    with blamed(what, task.messages):
        messages = task.messages(question, chat=chat)
    if not _is_dialogue(messages) or len(messages) == 0:
        raise AgentError(f"{what}: expected one message or more, got {type(messages).__name__} {shown(messages)}")
    for index, message in enumerate(messages, start=1):
        content = message.get("content")
        if content is None:  # a call of a tool needs none
            says = any(value is not None for name, value in message.items() if name != "role")
            right = says or (observed and index == len(messages))
        else:
            right = isinstance(content, Collection)
        if not right:
            raise AgentError(f"{what}: expected content in message {index} of {len(messages)}, got {shown(message)}")
    return messages


def _is_dialogue(value: Any) -> bool:
    """Messages, or none: a list, a tuple, an array."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        return False
    return all(isinstance(message, Mapping) for message in value)


def content_hash(questions: Iterable[Question]) -> str:
    """SHA-256 of ids, prompts and answers."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.id, question.prompt, question.answer], default=str).encode())
    return digest.hexdigest()


def data_hash(questions: Iterable[Question]) -> str | None:
    """SHA-256 of kinds and data, which rewards and environments read; None: some of it has no JSON form."""
    digest = hashlib.sha256()
    try:
        for question in questions:
            digest.update(json.dumps([question.kind, dict(question.data)]).encode())
    except (TypeError, ValueError, RecursionError):
        return None
    return digest.hexdigest()
