"""Trees and a chat format whose tokens are characters: `[tool argument]` is a call, `{..}` an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from aepo.agents.protocol import RewardFunction, Task
from aepo.types import (
    FinishReason,
    Message,
    Node,
    Path,
    Question,
    Response,
    RolloutTree,
    TokenIds,
    ToolCall,
    ToolResult,
    Turn,
)


def tokens(text: str) -> TokenIds:
    return tuple(map(ord, text))


class CharacterFormat:
    identity: ClassVar[dict[str, Any]] = {"name": "characters"}
    chosen, warnings = "the only one", ()
    name, eos_ids, stop_strings, vocab_size = "characters", (0,), ("]", "}"), 0x110000

    def __init__(self) -> None:
        self.reads = 0

    def prompt_tokens(self, messages: Sequence[Message]) -> TokenIds:
        return tokens("".join(str(message["content"]) for message in messages))

    def read(
        self,
        token_ids: Sequence[int],
        finish_reason: Literal["stop", "eos", "length"],
        *,
        before: Sequence[int] | None = None,
    ) -> Turn:
        self.reads += 1
        text = self.decode(token_ids).rstrip("\0")
        calls = tuple(ToolCall(tool, {"q": q}, None) for tool, q in re.findall(r"\[(\w+) ([^\]]*)\]", text))
        answer = re.search(r"\{(.*)\}", text)
        content = re.sub(r"\[.*?\]", "", text)
        return Turn(text, content, calls, answer is not None, answer[1] if answer else None, "!" not in text)

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        return tokens("".join(f"({result.text})" for result in results))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


def model_node(index: int, parent: int, text: str, finish_reason: Literal["stop", "eos"] = "stop") -> Node:
    ids = tokens(text)
    return Node(index, parent, "model", ids, (0.0,) * len(ids), (0.0,) * len(ids), 0, finish_reason)


def tree_of(question: Question, answers: Sequence[str], ends: FinishReason = "answered") -> RolloutTree:
    """Paths that share a search and its result, and then answer."""
    call, result = ToolCall("find", {"q": "x"}, None), ToolResult("found", None, 0.1)
    nodes = [
        Node(0, None, "prompt", tokens("?")),
        model_node(1, 0, "so[find x]"),
        Node(2, 1, "tool", tokens("(found)"), calls=(call,), results=(result,)),
        *(model_node(3 + i, 2, answer + "\0", "eos") for i, answer in enumerate(answers)),
    ]
    paths = [Path(i, 3 + i, 0 if i else None, 2 if i else None, ends) for i in range(len(answers))]
    return RolloutTree(question, tuple(nodes), tuple(paths), (), None)


def response_of(text: str, ends: FinishReason = "answered", **changes: Any) -> Response:
    """Of one turn that answers."""
    turn = Turn(text, text, (), ends == "answered", text if ends == "answered" else None)
    given: dict[str, Any] = {"text": text, "turns": (turn,), "results": (), "finish_reason": ends}
    return Response(**{**given, "token_ids": tokens(text), **changes})


class ToyTask(Task):
    def __init__(self, *functions: RewardFunction, weights: Mapping[RewardFunction, float] | None = None) -> None:
        self._rewards = weights or dict.fromkeys(functions, 1.0)

    @property
    def rewards(self) -> Mapping[RewardFunction, float]:
        return self._rewards
