"""Calls and answers in tags, <tool>argument</tool> and <answer>answer</answer>, for any model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from aepo.agents.formats.calls import Unreadable, load_json, value_of
from aepo.agents.formats.chat_template import ChatTemplate, ToolSchema
from aepo.agents.formats.text import Protect, TextTokenizer, content_text
from aepo.types import Message, TokenIds, ToolCall, ToolResult, Turn

RESERVED_NAMES = ("answer", "result")
ANSWER_END = "</answer>"


@dataclass(frozen=True)
class TagTool:
    """A tool as its tag: what goes between <name> and </name>."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def text_parameter(self) -> str | None:
        """The parameter that gets the text: the only one, or the only required one. None: the text is a JSON object."""
        names = list(self.parameters.get("properties") or {})
        required = self._required
        if len(names) == 1:
            return names[0]
        return required[0] if len(required) == 1 else None

    @property
    def _required(self) -> list[str]:
        given = self.parameters.get("required")
        return list(given) if isinstance(given, list | tuple) else []

    @property
    def usage(self) -> str:
        """The tag as the model is shown it."""
        properties = self.parameters.get("properties") or {}
        if not properties:
            inside = ""
        elif self.text_parameter is not None:
            inside = self.text_parameter
        else:
            inside = "{" + ", ".join(f'"{name}": ..' for name in properties) + "}"
        return f"<{self.name}>{inside}</{self.name}>"

    def arguments(self, text: str) -> dict[str, Any]:
        """What the text says. Unreadable: it is not what goes there."""
        if self.text_parameter is not None:
            return {self.text_parameter: value_of(text, self.text_parameter, self.parameters)}
        if not text.strip() and not self._required:
            return {}
        names = ", ".join(self.parameters.get("properties") or {})
        if not names:
            raise Unreadable("expected nothing between the tags")
        value = load_json(text)
        if not isinstance(value, dict):
            raise Unreadable(f"expected a JSON object with {names}")
        return value


class TagsFormat:
    """A segment ends at the closing tag of a tool or of the answer; results come back in <result>.

    With a chat template, the dialogue is rendered by it and goes on inside the model's first turn. Without one, it is
    the contents, a line each. schemas: of the tools, as OpenAI functions. tool_instructions: what the system text says
    of the tools; None: their descriptions.

    Tags of users and tools are other tokens than ours, though they read the same.
    """

    name = "tags"
    warnings: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_ids: Iterable[int],
        schemas: Sequence[ToolSchema] = (),
        *,
        tool_instructions: str | None = None,
    ) -> None:
        self._tools = {tool.name: tool for tool in map(_tag_tool, schemas)}
        self._instructions = tool_instructions
        self.stop_strings = (*(f"</{name}>" for name in self._tools), ANSWER_END)
        self._tag = re.compile(f"</?(?:{'|'.join(map(re.escape, (*self._tools, *RESERVED_NAMES)))})>")
        self._end = re.compile("|".join(map(re.escape, self.stop_strings)))
        tags = [f"<{slash}{name}>" for name in (*self._tools, *RESERVED_NAMES) for slash in ("", "/")]
        self._text = TextTokenizer(tokenizer, letters=tags)
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self.vocab_size = vocab_size
        self.eos_ids = self.template.turn_ends(eos_ids) if self.template else tuple(sorted(eos_ids))

    def prompt_tokens(self, messages: Sequence[Message]) -> TokenIds:
        """What comes before the first generated token. ValueError: the chat template refuses the dialogue."""
        return self._text.rendered_tokens(messages, self._render)

    def read(
        self,
        token_ids: Sequence[int],
        finish_reason: Literal["stop", "eos", "length"],
        *,
        before: Sequence[int] | None = None,
    ) -> Turn:
        """The call or the answer that its closing tag ends. What its token holds behind the tag does not matter."""
        has_end = finish_reason == "eos" and len(token_ids) > 0 and token_ids[-1] in self.eos_ids
        text = self.decode(token_ids[:-1] if has_end else token_ids)
        closing = self._end.search(text) if finish_reason == "stop" else None
        if closing is None:
            return Turn(text, text, (_unopened(""),) if finish_reason == "stop" else (), well_formed=False)
        name = closing[0][2:-1]
        said, opening, inside = text[: closing.start()].rpartition(f"<{name}>")
        well_formed = bool(opening) and not self._tag.search(said) and not self._tag.search(inside)
        content = said if opening else text[: closing.start()]
        if closing[0] == ANSWER_END:
            return Turn(text, content, (), True, inside if opening else None, well_formed)
        call = self._call(name, inside) if opening else _unopened(name)
        return Turn(text, content, (call,), well_formed=well_formed and call.problem is None)

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        """The result of the segment's one call."""
        (result,) = results
        first, *others = self._text.cut(result.text)
        pieces = [f"<result> {first}", *others]
        pieces[-1] += "</result>\n"
        return self._text.continued(pieces)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._text.decode(token_ids)

    def _call(self, name: str, text: str) -> ToolCall:
        try:
            return ToolCall(name, self._tools[name].arguments(text))
        except Unreadable as error:
            return ToolCall(name, {}, str(error))

    def _render(self, messages: Sequence[Message], protect: Protect) -> str:
        told = self._instructions
        if told is None:
            told = instructions(list(self._tools.values()), protect)
        if told:
            messages = _with_system(messages, told)
        if self.template is not None:
            return self.template.render(messages, generate=True)
        return "".join(f"{content_text(message)}\n" for message in messages)


def instructions(tools: Sequence[TagTool], protect: Protect = str) -> str:
    """What a model is told about tools and the answer. protect: for descriptions, which may come from a server."""
    lines = [
        "You have tools. Call one by writing its tags with what it gets between them, then stop: what it returns "
        "follows between <result> and </result>.",
        *(f"{tool.usage} {protect(' '.join(tool.description.split()))}".rstrip() for tool in tools),
    ]
    answer = "Write your final answer as <answer>your answer</answer>."
    return "\n".join([*lines, answer]) if tools else answer


def _with_system(messages: Sequence[Message], told: str) -> Sequence[Message]:
    """With a text at the end of the system message, or as the system message."""
    if messages and messages[0].get("role") == "system":
        return [{**messages[0], "content": f"{content_text(messages[0])}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _tag_tool(schema: ToolSchema) -> TagTool:
    function = schema["function"]
    name = str(function["name"])
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", name) or name in RESERVED_NAMES:
        raise ValueError(
            f"tool {name!r}: expected a name of letters, digits, '_', '-' and '.' for its tag, and none of "
            f"{', '.join(RESERVED_NAMES)}"
        )
    return TagTool(name, str(function.get("description") or ""), function.get("parameters") or {})


def _unopened(name: str) -> ToolCall:
    return ToolCall(name, {}, "the closing tag has no opening tag before it")
