"""A model's chat template with the tools of a task: how dialogues look, and what the template can do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from aepo.agents.formats.answers import THINK
from aepo.agents.formats.calls import Unreadable, load_json
from aepo.agents.formats.hermes_text import as_text
from aepo.agents.formats.template_arguments import own_arguments
from aepo.agents.formats.text import Protect, content_text, sound
from aepo.types import Message, ToolCall

ToolSchema = Mapping[str, Any]
"""{"type": "function", "function": {"name": .., "description": .., "parameters": ..}}"""
NONE: Mapping[str, Any] = MappingProxyType({})

# Words that dialogues of our own hold, to be found again in their renderings.
WORDS = ("askedprobe", "systemprobe", "saidprobe", "thoughtprobe", "valueprobe", "resultprobe")
ASKED, SYSTEM, SAID, THOUGHT, VALUE, RESULT = WORDS


class TemplateRefused(ValueError):
    """The template does not take a dialogue."""


class ChatTemplate:
    """hermes: tools are described, called and answered in text, because the template shows none. arguments: of the
    template's own (`format.chat_template_kwargs`), for every rendering.

    ValueError: there is no template, it does not read an argument, or does not even take a question.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        schemas: Sequence[ToolSchema] = (),
        *,
        hermes: bool = False,
        arguments: Mapping[str, Any] = NONE,
    ) -> None:
        self._tokenizer = tokenizer
        self._schemas = list(schemas)
        self.hermes = hermes
        self._arguments = arguments
        self.name = str(tokenizer.name_or_path or type(tokenizer).__name__)
        if used := [word for word in WORDS if word in repr(schemas)]:
            raise ValueError(f"tools: expected that no schema holds the word {used[0]!r}, which the format looks for")
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer {self.name}: expected a chat template, it has none; set format.name=tags")
        self._check_arguments()
        self.generation_prompt = self.render([user(ASKED)], generate=True)
        """Of a dialogue that is one question."""

    def _check_arguments(self) -> None:
        if not self._arguments:
            return
        source = self._tokenizer.get_chat_template(tools=[dict(schema) for schema in self._schemas] or None)
        read = own_arguments(source, self._tokenizer.special_tokens_map)
        known = ", ".join(name for name, certain in read.items() if certain)
        for name in self._arguments:
            if name not in read:
                raise ValueError(
                    f"format.chat_template_kwargs.{name}: expected an argument that the chat template of {self.name} "
                    f"reads and is not given anyway: {known or 'it has none'}"
                )

    def render(self, messages: Sequence[Message], *, generate: bool = False, protect: Protect = str) -> str:
        """generate: with the beginning of the model's next turn. protect: for the texts in the tools' schemas, which
        may come from a server. TemplateRefused: the template does not take the dialogue."""
        dialogue = [_with_objects(message) for message in messages]
        schemas = [_protected(schema, protect) for schema in self._schemas]
        if self.hermes:
            dialogue = as_text(dialogue, schemas)
        if dialogue and dialogue[0].get("role") == "system" and not self.has_system_role:
            dialogue = _system_in_front(dialogue)
        return self._apply(dialogue, generate, () if self.hermes else schemas)

    @cached_property
    def has_system_role(self) -> bool:
        """Without one, the system text goes in front of the first user's message."""
        try:
            return SYSTEM in self._apply([{"role": "system", "content": SYSTEM}, user(ASKED)], True)
        except TemplateRefused:
            return False

    @cached_property
    def shows_tools(self) -> bool:
        """Whether it describes the tools that it is given."""
        try:
            text = self._apply([user(ASKED)], True, self._schemas)
            without = self._apply([user(ASKED)], True)
        except TemplateRefused:
            return False
        return text != without and all(str(schema["function"]["name"]) in text for schema in self._schemas)

    def turn_ends(self, eos_ids: Iterable[int]) -> tuple[int, ...]:
        """The tokens that end a turn, ascending: those of the model, and the first control token behind an answer; many
        models have another one for the end of a text only. Where an answer, or a call, has none, the model stops at the
        role that is next: <|user|>, <|observation|>. (What a past answer ends with is no end: <|end|> of Harmony also
        ends the thinking of a turn, which itself ends with <|return|>.)"""
        known = set(eos_ids)
        answered = [user(ASKED), assistant(SAID)]
        own = self._controls(self.render(answered), SAID)
        if known.isdisjoint(own[:1]):
            followed = self._controls(self._render_or_without([*answered, user(ASKED)]), SAID, ASKED)
            if known.isdisjoint(followed):
                known.update(own[:1] or followed[:1])
        if self._schemas:
            name = str(self._schemas[0]["function"]["name"])
            called = [user(ASKED), calling([name])]
            own = self._controls(self.render(called), VALUE)  # </tool_call>, and perhaps the end
            followed = self._controls(self.render([*called, tool_result(0, name, RESULT)]), VALUE, RESULT)
            if known.isdisjoint(followed):
                known.update(followed[shared(own, followed) :][:1])
        return tuple(sorted(known))

    def _render_or_without(self, dialogue: Sequence[Message]) -> str:
        """Also of a template that takes no second question."""
        try:
            return self.render(dialogue)
        except TemplateRefused:
            return self.render(dialogue[:-1])

    def _controls(self, text: str, behind: str, before: str = "\0") -> list[int]:
        """The control tokens of the part of a text that is behind a word, and before another one."""
        part = text.partition(behind)[2].partition(before)[0]
        added = self._tokenizer.added_tokens_decoder
        tokens = self._tokenizer.encode(part, add_special_tokens=False)
        return [token for token in tokens if token in added and added[token].content.strip()]

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the first turn of the model begins inside <think>, which is then not part of what it writes."""
        return opens_thinking(self.generation_prompt)

    @property
    def notes(self) -> tuple[str, ...]:
        """What of it is not as with most."""
        found = {
            "the first turn begins inside <think>": self.opens_thinking,
            "tools described in the system text": self.hermes,
            "system text in front of the first user message": not self.has_system_role,
        }
        return tuple(note for note, there in found.items() if there)

    def _apply(self, dialogue: Sequence[Message], generate: bool, schemas: Sequence[ToolSchema] = ()) -> str:
        given: Any = [dict(message) for message in dialogue]
        try:
            text = self._tokenizer.apply_chat_template(
                given,
                tools=[dict(schema) for schema in schemas] or None,
                tokenize=False,
                add_generation_prompt=generate,
                **self._arguments,
            )
        except Exception as error:  # whatever a template does with what it did not expect
            problem = " ".join(str(error).split())
            raise TemplateRefused(
                f"the chat template of {self.name} refuses a dialogue of roles "
                f"{', '.join(str(message.get('role')) for message in dialogue)}: {problem}"
            ) from error
        return sound(str(text))


def opens_thinking(prompt: str) -> bool:
    return prompt.rstrip().endswith(THINK)


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, calls: Sequence[ToolCall] = ()) -> Message:
    """A turn of the model. The ids of its calls have nine letters and digits, which is what some templates ask for."""
    if not calls:
        return {"role": "assistant", "content": text}
    listed = [
        {"id": call_id(n), "type": "function", "function": {"name": call.tool, "arguments": dict(call.arguments)}}
        for n, call in enumerate(calls)
    ]
    return {"role": "assistant", "content": text, "tool_calls": listed}


def calling(names: Sequence[str], said: str = "") -> Message:
    """A turn that says something and calls tools, with the word VALUE as argument."""
    return assistant(said, [ToolCall(name, {"value": VALUE}) for name in names])


def tool_result(n: int, name: str, text: str) -> Message:
    """The result of the n-th call of the turn before."""
    return {"role": "tool", "name": name, "tool_call_id": call_id(n), "content": text}


def call_id(n: int) -> str:
    return f"call{n:05d}"


def _system_in_front(dialogue: Sequence[Message]) -> list[Message]:
    system, *others = dialogue
    for place, message in enumerate(others):
        if message.get("role") == "user":
            content = message["content"]
            text = content_text(system)
            joined: Any = f"{text}\n\n{content}"
            if not isinstance(content, str):
                joined = [{"type": "text", "text": f"{text}\n\n"}, *content]
            return [*others[:place], {**message, "content": joined}, *others[place + 1 :]]
    return [user(content_text(system)), *others]


def _protected(value: Any, protect: Protect) -> Any:
    """A schema with its texts protected."""
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, Mapping):
        return {protect(key): _protected(item, protect) for key, item in value.items()}
    return [_protected(item, protect) for item in value] if isinstance(value, list | tuple) else value


def _with_objects(message: Message) -> Message:
    """Arguments of calls as objects: data often has them as JSON texts, which templates would quote once more."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": load_json(function["arguments"])}}
    except Unreadable as error:
        raise ValueError(f"a call of {function.get('name')!r} in the dialogue: its arguments are {error}") from None
