"""A chat format of the user's own: what it raises, or returns that is none of what it should, is named as theirs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aepo.agents.protocol import AgentError, ChatFormat, blamed, shown
from aepo.types import Message, TokenIds, ToolCall, ToolResult, Turn

NEEDED = ("name", "eos_ids", "stop_strings", "vocab_size", "prompt_tokens", "read", "result_tokens", "decode")


def checked_calls(calls: Any, what: str) -> tuple[ToolCall, ...]:
    """The calls that the user's own parser or format returned. AgentError: they are none. what: who did."""
    if not isinstance(calls, (list, tuple)):
        raise AgentError(f"{what} returned {shown(calls)} as the calls, expected a list of ToolCall")
    for call in calls:
        if not (isinstance(call, ToolCall) and isinstance(call.tool, str) and isinstance(call.arguments, Mapping)):
            raise AgentError(f"{what} returned {shown(call)} as a call, expected ToolCall(tool, arguments by name)")
    return tuple(calls)


class OwnFormat:
    """Implements `ChatFormat` with the methods of `made`. ValueError, in one line: it lacks some."""

    identity: Mapping[str, Any]  # these two are set by who makes the format
    chosen: str

    def __init__(self, made: Any, setting: str) -> None:
        missing = [attribute for attribute in NEEDED if not hasattr(made, attribute)]
        if missing:
            raise ValueError(f"{setting}: expected a ChatFormat, {type(made).__name__} has no {', '.join(missing)}")
        self._made: ChatFormat = made
        self._setting = setting
        # It need not take the tokens before a turn: most formats read a turn by itself.
        self._takes_before = _takes(made.read, "before")
        self.name = made.name
        self.eos_ids = tuple(made.eos_ids)
        self.stop_strings = tuple(made.stop_strings)
        self.vocab_size = made.vocab_size
        self.calls = getattr(made, "calls", None)
        self.warnings = tuple(getattr(made, "warnings", ()))  # it need not have any

    def prompt_tokens(self, messages: Sequence[Message]) -> TokenIds:
        return self._tokens("prompt_tokens", messages)

    def read(
        self,
        token_ids: Sequence[int],
        finish_reason: Literal["stop", "eos", "length"],
        *,
        before: Sequence[int] | None = None,
    ) -> Turn:
        context = {"before": before} if self._takes_before else {}
        turn = self._call("read", token_ids, finish_reason, **context)
        if not isinstance(turn, Turn):
            raise AgentError(f"{self._setting}: read returned {shown(turn)}, expected a Turn")
        texts = {"text": turn.text, "content": turn.content, "answer": turn.answer or ""}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise AgentError(f"{self._setting}: read returned {shown(text)} as the {name}, expected a text")
        checked_calls(turn.calls, f"{self._setting}: read")
        return turn

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        return self._tokens("result_tokens", turn, results)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._call("decode", token_ids))

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        function = getattr(self._made, method)  # it may be a partial, or an object
        with blamed(f"{self._setting}: {method}", function):
            return function(*arguments, **named)

    def _tokens(self, method: str, *arguments: Any) -> TokenIds:
        found = self._call(method, *arguments)
        try:
            tokens = tuple(map(int, found))
        except (TypeError, ValueError):
            tokens = ()
        if not tokens or min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise AgentError(
                f"{self._setting}: {method} returned {shown(found)}, expected one or more tokens from 0 to "
                f"{self.vocab_size - 1}"
            )
        return tokens


def _takes(function: Any, name: str) -> bool:
    """Whether it can be called with that argument by name, also among others: **named."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(
        one.kind is one.VAR_KEYWORD or (one.name == name and one.kind is not one.POSITIONAL_ONLY) for one in parameters
    )
