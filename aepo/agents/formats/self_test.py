"""What a chat template does with calls, tried out at the start: which parser reads them, and what it rewrites later."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aepo.agents.formats.answers import END_THINK, THINK, without_thinking
from aepo.agents.formats.calls import PARSERS, CallParser, find_parser
from aepo.agents.formats.chat_template import (
    ASKED,
    RESULT,
    SAID,
    THOUGHT,
    VALUE,
    ChatTemplate,
    assistant,
    call_id,
    calling,
    shared,
    tool_result,
    user,
)
from aepo.agents.protocol import USER_ERRORS, problem_of
from aepo.types import ToolCall

KNOWN_NAME = "probe_tool"
KNOWN_CALL = ToolCall(KNOWN_NAME, {"words": f'two "quoted" words, {VALUE}', "count": 3})
KNOWN_SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["words", "count"],
}


def find_call_parser(template: ChatTemplate, turn_ends: Sequence[str], calls: str) -> tuple[str, CallParser]:
    """The parser that reads a call as the template writes it, with its name.

    calls: its name, or "auto": the one of ours that does. ValueError: none does, or more than one.
    """
    text = written_turn(template, turn_ends)
    candidates = PARSERS if calls == "auto" else {calls: find_parser(calls)}
    reading = {name: parser for name, parser in candidates.items() if _reads(name, parser, text)}
    if len(reading) == 1:
        return next(iter(reading.items()))
    found = f"{' and '.join(reading)} both read" if reading else f"{', '.join(candidates)} did not read"
    raise ValueError(
        f"format.calls = {calls!r}: {found} the call that the chat template of {template.name} wrote as {text!r}; "
        "expected a parser that does: set format.calls, to package.module:Name for your own, or format.name=tags"
    )


def written_turn(template: ChatTemplate, turn_ends: Sequence[str]) -> str:
    """The known call as the template writes it, from behind the beginning of the turn up to its end."""
    text = template.render([user(ASKED), assistant("", [KNOWN_CALL])])
    # The prompt may end with what later renderings leave out, an open <think> for example.
    start = _parting(text, template.generation_prompt)
    end = re.compile("|".join(map(re.escape, turn_ends))).search(text, max(text.find(VALUE), start))
    return text[start : end.start() if end else len(text)]


def _parting(text: str, other: str) -> int:
    """Where a text and another one of the same question part: in the first, behind a tag or line that both have, and
    behind the question."""
    if text.startswith(other):
        return len(other)
    common = text[: shared(text, other)]
    return max(*(common.rfind(end) + 1 for end in ">\n]"), text.find(ASKED) + len(ASKED))


def rewritten_history(template: ChatTemplate, name: str) -> tuple[str, ...]:
    """Where later renderings of a dialogue differ from what the model wrote and read in training, one line each.

    name: of a tool. What a chat server renders anew before every turn is then not what the model was trained on.
    """
    prompt = template.generation_prompt
    turns = [calling([name], SAID), tool_result(0, name, "first"), calling([name]), tool_result(0, name, "second")]
    once = template.render([user(ASKED), *turns[:2]], generate=True)
    twice = template.render([user(ASKED), *turns], generate=True)
    thought = calling([name], f"{THINK}\n{THOUGHT}\n{END_THINK}\n\n{SAID}")
    thinking = template.render([user(ASKED), thought, tool_result(0, name, "first")], generate=True)
    keeps_beginning = once.startswith(prompt)
    keeps_question = once.startswith(prompt.partition(ASKED)[0] + ASKED)
    left_out = prompt[_parting(prompt, once) :]
    findings = {
        "renders a question in another way once a turn follows": not keeps_question,
        f"begins a turn with {left_out!r}, which it leaves out of earlier turns": keeps_question
        and not keeps_beginning,
        "leaves out what a turn says beside its calls": SAID not in once,
        "drops the thinking of earlier turns": SAID in once and THOUGHT not in thinking,
        "renders a turn in another way once another one follows": keeps_beginning and not twice.startswith(once),
        "shows ids of calls, which the model does not write": call_id(0) in once,
    }
    return tuple(f"the chat template {finding}" for finding, there in findings.items() if there)


def written_tags(template: ChatTemplate, name: str) -> list[str]:
    """The tags that end a call of this tool, and those around its result and before the next turn."""
    text = template.render([user(ASKED), calling([name]), tool_result(0, name, RESULT)], generate=True)
    return _TAG.findall(text.partition(VALUE)[2])


_TAG = re.compile(r"</?[^<>\s]+>")


def _reads(name: str, parser: CallParser, text: str) -> bool:
    try:
        _, calls = parser(without_thinking(text), {KNOWN_NAME: KNOWN_SCHEMA})
        return tuple(calls) == (KNOWN_CALL,)
    except USER_ERRORS as error:  # of the user's own parser
        raise ValueError(
            f"format.calls = {name!r}: expected that it returns (content, calls) for {text!r}, it raised "
            f"{problem_of(error, parser)}"
        ) from error
