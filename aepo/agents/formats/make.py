"""The format of a run: by its name, or the one that fits the model and the tools."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from aepo.agents.formats.chat import ChatTemplateFormat
from aepo.agents.formats.chat_template import ChatTemplate, ToolSchema
from aepo.agents.formats.own import OwnFormat
from aepo.agents.formats.tags import TagsFormat
from aepo.agents.protocol import USER_ERRORS, ChatFormat, problem_of
from aepo.config import FormatConfig
from aepo.registry import resolve


class TokenModel(Protocol):
    """What a format needs of a `LanguageModel`."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...


def make_format(
    settings: FormatConfig,
    language_model: TokenModel,
    schemas: Sequence[ToolSchema],
    *,
    tool_instructions: str | None = None,
) -> ChatFormat:
    """The format that the settings name, for tools with these schemas (OpenAI functions).

    tool_instructions: what a model is told about them where its template does not show them; None: their descriptions.
    A class of your own, package.module:Class, is called with the same arguments. ValueError: a setting does not fit
    the model or the tools, in one line.
    """
    name, reason = (
        (settings.name, "format.name") if settings.name != "auto" else _choose(settings, language_model, schemas)
    )
    if settings.chat_template_kwargs and name != "chat":
        raise ValueError(
            f"format.chat_template_kwargs = {settings.chat_template_kwargs!r}: expected none with the format {name} "
            f"({reason}), only chat has its dialogues from the template"
        )
    made: Any
    if name == "tags":
        made = _tags(settings, language_model, schemas, tool_instructions)
    elif name == "chat":
        made = ChatTemplateFormat(
            language_model.tokenizer,
            language_model.vocab_size,
            language_model.eos_ids,
            schemas,
            calls=settings.calls,
            answer=settings.answer,
            arguments=settings.chat_template_kwargs,
        )
    else:
        made = _own(settings, language_model, schemas, tool_instructions)
    calls = getattr(made, "calls", None)
    given = ", ".join(f"{argument}={value!r}" for argument, value in settings.chat_template_kwargs.items())
    notes = _notes(made, language_model)
    made.chosen = (
        f"format {name}{given and f' with {given}'}{f', calls as {calls}' if calls else ''}: "
        f"{'; '.join([reason, *notes])}"
    )
    made.identity = {
        "name": name,
        "calls": calls,
        "answer": "tag" if name == "tags" else settings.answer,
        "chat_template": _digest(language_model.tokenizer, schemas),
        "chat_template_kwargs": dict(settings.chat_template_kwargs) or None,
        "notes": notes or None,
        "warnings": list(made.warnings) or None,
    }
    return made


def _notes(made: Any, language_model: TokenModel) -> list[str]:
    """What was found out of the model that is not as usual."""
    template: ChatTemplate | None = getattr(made, "template", None)
    ends = sorted(set(made.eos_ids).difference(language_model.eos_ids))
    return [
        *(template.notes if template is not None else ()),
        *(f"turns also end with {made.decode([token])}" for token in ends),
    ]


def _choose(settings: FormatConfig, language_model: TokenModel, schemas: Sequence[ToolSchema]) -> tuple[str, str]:
    """chat where the template shows the tools (or is asked to have them in its text), else tags."""
    if not language_model.tokenizer.chat_template:
        return "tags", "the model has no chat template"
    if not schemas:
        return "chat", "the model has a chat template, and there are no tools"
    if settings.calls != "auto":
        return "chat", f"format.calls = {settings.calls}"
    if ChatTemplate(language_model.tokenizer, schemas, arguments=settings.chat_template_kwargs).shows_tools:
        return "chat", "the model's chat template shows tools"
    return "tags", "the model's chat template does not show tools"


def _tags(
    settings: FormatConfig, language_model: TokenModel, schemas: Sequence[ToolSchema], tool_instructions: str | None
) -> TagsFormat:
    if settings.calls != "auto":
        raise ValueError(
            f"format.calls = {settings.calls!r}: expected auto with format.name = tags, or no chat template"
        )
    if settings.answer not in ("auto", "tag"):
        raise ValueError(
            f"format.answer = {settings.answer!r}: expected auto or tag, the format tags has its answers in <answer>"
        )
    return TagsFormat(
        language_model.tokenizer,
        language_model.vocab_size,
        language_model.eos_ids,
        schemas,
        tool_instructions=tool_instructions,
    )


def _own(
    settings: FormatConfig, language_model: TokenModel, schemas: Sequence[ToolSchema], tool_instructions: str | None
) -> ChatFormat:
    if ":" not in settings.name:
        raise ValueError(f"format.name = {settings.name!r}: expected auto, chat, tags, or package.module:Class")
    cls = resolve(settings.name, "format.name")
    if not callable(cls):
        raise ValueError(f"format.name = {settings.name!r}: expected a class; it is of type {type(cls).__name__}")
    try:
        made = cls(settings, language_model, schemas, tool_instructions=tool_instructions)
    except USER_ERRORS as error:  # whatever the user's code does
        raise ValueError(f"format.name = {settings.name!r}: making it failed: {problem_of(error, cls)}") from error
    return OwnFormat(made, f"format.name = {settings.name!r}")


def _digest(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[ToolSchema]) -> str | None:
    """SHA-256 of the chat template; None: there is none."""
    if not tokenizer.chat_template:
        return None
    template = tokenizer.get_chat_template(tools=[dict(schema) for schema in schemas] or None)
    return hashlib.sha256(template.encode()).hexdigest()
