"""A scripted engine and tools, for tests of the sampler's rules. One token is one character."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from aepo.config import RolloutConfig
from aepo.rollout.engine import Generation, GenerationRequest
from aepo.rollout.tree import path_nodes
from aepo.types import Question, RolloutTree, TokenIds, ToolCall, ToolResult, Turn

SEARCH, ANSWER = "<search>x</search>", "<answer>y</answer>"

# What the model writes after `text`, with which entropy at every token, and why it stops.
Script = Callable[[str, int], tuple[str, float, str]]


def question(name: str = "q") -> Question:
    return Question(id=name, prompt=name, answer="y", kind="toy")


class Characters:
    """A format whose tokens are characters, with one call or the answer at the end of a segment."""

    vocab_size = 128
    stop_strings = ("</search>", "</answer>")

    def prompt_tokens(self, question_text: str) -> TokenIds:
        return tuple(map(ord, f"{question_text}?"))

    def read(self, token_ids: Sequence[int], finish_reason: str, *, before: Sequence[int] | None = None) -> Turn:
        text = self.decode(token_ids)
        answered = ANSWER in text
        calls = (ToolCall("search", {"query": "x"}),) * text.count(SEARCH)
        if "</search>" in text and not calls:
            calls = (ToolCall("", {}, "the closing tag has no opening tag before it"),)
        return Turn(text, text, () if answered else calls, answered, "y" if answered else None)

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        return tuple(map(ord, "".join(f"[{result.text}]" for result in results)))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


class ScriptedTools:
    """The session of all paths."""

    observation = None

    def __init__(self, result: ToolResult | None = None, seconds: float = 0.0) -> None:
        self.result = result or ToolResult("r", None, 0.0)
        self.seconds = seconds
        self.calls: list[ToolCall] = []

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        self.calls += calls
        await asyncio.sleep(self.seconds)
        return [self.result for _ in calls]


class ScriptedAgent:
    """Questions are texts, and all paths share one session."""

    def __init__(self, tools: object, text_format: object | None = None) -> None:
        self.stateless = tools
        self.format = text_format or Characters()

    def prompt_tokens(self, question: Question, observation: str | None) -> TokenIds:
        return self.format.prompt_tokens(question.text)


class ScriptedEngine:
    """Each generation is `script(prefix text, seed)`: a function of the request, like that of a real engine."""

    def __init__(self, script: Script, lockstep: bool = True, max_positions: int = 10**6) -> None:
        self.script = script
        self.lockstep = lockstep
        self.max_positions = max_positions
        self.waves: list[list[GenerationRequest]] = []
        self.releases = 0

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        self.waves.append(list(requests))
        if not self.lockstep:
            await asyncio.sleep(requests[0].seed % 5 * 1e-3)
        return [self._generate(request) for request in requests]

    def _generate(self, request: GenerationRequest) -> Generation:
        text, entropy, reason = self.script(Characters().decode(request.token_ids), request.seed)
        if len(text) > request.max_new_tokens:
            text, reason = text[: request.max_new_tokens], "length"
        return Generation(tuple(map(ord, text)), (-1.0,) * len(text), (entropy,) * len(text), reason, version=3)

    def release(self) -> None:
        self.releases += 1


def tools_then(tool_calls: int, entropy: float = 1.0) -> Script:
    """Every path calls the tool so many times and answers; the text before a call tells the paths apart."""

    def script(text: str, seed: int) -> tuple[str, float, str]:
        note = f"{seed:x} "
        return note + (SEARCH if text.count("[") < tool_calls else ANSWER), entropy, "stop"

    return script


def settings(**changes: object) -> RolloutConfig:
    """Fixed m and a constant alpha that always branches, unless changed."""
    defaults = {"paths": 4, "fresh_paths": 1, "branch_alpha": 1.0, "max_tokens": 10_000, "branch_penalty": 0.0}
    return RolloutConfig(**{**defaults, **changes})


def texts(tree: RolloutTree) -> list[str]:
    """What each path holds after the prompt."""
    return [
        "".join(Characters().decode(node.token_ids) for node in path_nodes(tree, path.id)[1:]) for path in tree.paths
    ]
