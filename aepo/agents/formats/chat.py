"""The model's own chat template as the format: tools, calls and results look as they did when the model was made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from aepo.agents.formats.answers import END_THINK, STYLES, THINK, thinking_ends, without_thinking
from aepo.agents.formats.calls import Parsed, find_parser
from aepo.agents.formats.chat_template import NONE, ChatTemplate, ToolSchema, opens_thinking
from aepo.agents.formats.continuation import Continuation
from aepo.agents.formats.own import checked_calls
from aepo.agents.formats.self_test import find_call_parser, rewritten_history, written_tags
from aepo.agents.formats.text import Protect, TextTokenizer
from aepo.agents.protocol import AgentError, blamed, shown
from aepo.types import Message, TokenIds, ToolResult, Turn

SHOWN_CHARS = 80  # of a text that a parser failed on
OPENING_TOKENS = 16  # <think> and a line break are at most 9, where each byte is one


class ChatTemplateFormat:
    """The dialogue is rendered once, for the question; whatever follows is appended to it.

    vocab_size, eos_ids: of the model. schemas: of the tools, as OpenAI functions. calls: a parser (`calls.PARSERS`,
    or package.module:Name), or "auto", the one that reads what the template writes. answer: a style (`answers.STYLES`).
    arguments: of the template's own, by name.

    A segment that ends with an end-of-turn token either calls tools or answers. One that was cut off at a length limit
    does neither: calls in it are not run.

    warnings: what a chat server that renders the dialogue anew before every turn will show in another way.
    ValueError, in one line: the template shows no tools, no parser reads its calls, or text does not survive.
    """

    name = "chat"
    stop_strings: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_ids: Iterable[int],
        schemas: Sequence[ToolSchema] = (),
        *,
        calls: str = "auto",
        answer: str = "auto",
        arguments: Mapping[str, Any] = NONE,
    ) -> None:
        if answer not in STYLES:
            raise ValueError(f"format.answer = {answer!r}: expected one of {', '.join(STYLES)}")
        self._find_answer = STYLES[answer]
        self._text = TextTokenizer(tokenizer)
        self.template = _template(tokenizer, schemas, calls, arguments)
        self._schemas = {str(s["function"]["name"]): s["function"].get("parameters") or {} for s in schemas}
        self.vocab_size = vocab_size
        self.eos_ids = self.template.turn_ends(eos_ids)
        if not self.eos_ids:
            raise ValueError(
                f"the chat template of {self.template.name} ends no turn with a token, and the model has "
                "no end-of-text token; set format.name=tags"
            )
        self.calls: str | None = None  # the name of the parser
        self.warnings: tuple[str, ...] = ()
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        marks = {THINK, END_THINK, *(text for text in special if text.strip())}
        if schemas:
            marks.update(written_tags(self.template, next(iter(self._schemas))))
        self._says_nothing = re.compile(f"(?:\\s|{'|'.join(map(re.escape, sorted(marks)))})*")
        if schemas:
            self._prepare_calls(calls)
        elif calls != "auto":
            raise ValueError(f"format.calls = {calls!r}: expected auto, there are no tools to call")
        if self._text.bos and not self.template.generation_prompt.startswith(self._text.decode(self._text.bos)):
            self.warnings += ("the chat template writes no BOS; it is put in front here",)

    def _prepare_calls(self, calls: str) -> None:
        turn_ends = [text for text in (self._text.decode([token]) for token in self.eos_ids) if text]
        name = next(iter(self._schemas))
        self.calls, self._parse = find_call_parser(self.template, turn_ends, calls)
        self._continuation = Continuation(self.template, self._text, turn_ends, name)
        self.warnings = rewritten_history(self.template, name)

    def prompt_tokens(self, messages: Sequence[Message]) -> TokenIds:
        """The dialogue with the tools and the beginning of the model's turn. ValueError: the template refuses it."""
        return self._text.rendered_tokens(messages, self._render)

    def _render(self, messages: Sequence[Message], protect: Protect) -> str:
        return self.template.render(messages, generate=True, protect=protect)

    def read(
        self,
        token_ids: Sequence[int],
        finish_reason: Literal["stop", "eos", "length"],
        *,
        before: Sequence[int] | None = None,
    ) -> Turn:
        """Calls, or the answer: a turn that ends without a call has answered. Thinking counts as neither.

        before: the tokens in front of the turn tell whether it began inside <think>. None: those of a question.
        """
        ended = finish_reason == "eos"
        has_end = ended and len(token_ids) > 0 and token_ids[-1] in self.eos_ids
        text = self.decode(token_ids[:-1] if has_end else token_ids)
        whole = THINK + text if self._began_inside_thinking(before) else text
        outside = without_thinking(whole)
        if not ended:
            return Turn(text, outside.strip(), well_formed=False)
        content, calls = self._said(outside) if self.calls else (outside.strip(), ())
        stray = THINK in content or END_THINK in content
        well_formed = thinking_ends(whole) and not stray and all(call.problem is None for call in calls)
        if calls:
            return Turn(text, content, calls, well_formed=well_formed)
        answer = self._find_answer(content)
        says_something = answer is not None and not self._says_nothing.fullmatch(content)
        return Turn(text, content, (), True, answer, well_formed and says_something)

    def _began_inside_thinking(self, before: Sequence[int] | None) -> bool:
        """Templates that begin only some turns inside <think> are there, DeepSeek V3.1 among them."""
        if before is None:
            return self.template.opens_thinking
        return opens_thinking(self.decode(before[-OPENING_TOKENS:]))

    def _said(self, text: str) -> Parsed:
        """What is said, and the calls. AgentError: a parser of the user's own failed."""
        with blamed(f"format.calls: {self.calls}, for {text[:SHOWN_CHARS]!r},", self._parse):
            content, calls = self._parse(text, self._schemas)
        what = f"format.calls: {self.calls}, for {text[:SHOWN_CHARS]!r},"
        if not isinstance(content, str):
            raise AgentError(f"{what} returned {shown(content)} as the content, expected a text")
        return content, checked_calls(calls, what)

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        """What comes behind the end-of-turn token, which the model wrote: only such a turn has calls."""
        known = [call.tool if call.tool in self._schemas else "unknown" for call in turn.calls]
        return self._continuation.tokens(known, [result.text for result in results])

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._text.decode(token_ids)


def _template(
    tokenizer: PreTrainedTokenizerBase, schemas: Sequence[ToolSchema], calls: str, arguments: Mapping[str, Any]
) -> ChatTemplate:
    """The template; where it shows no tools, with the Hermes convention if `calls` asks for that."""
    template = ChatTemplate(tokenizer, schemas, arguments=arguments)
    if calls != "auto":
        find_parser(calls)  # first of all, whether there is one
    if not schemas or template.shows_tools:
        return template
    if calls != "hermes":
        names = ", ".join(str(schema["function"]["name"]) for schema in schemas)
        raise ValueError(
            f"format.calls = {calls!r}: the chat template of {template.name} does not show tools ({names}); set "
            "format.name=tags, or format.calls=hermes, which describes them in the system message"
        )
    return ChatTemplate(tokenizer, schemas, hermes=True, arguments=arguments)
