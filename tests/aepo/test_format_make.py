"""Which format a run gets, and what it remembers of it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from format_templates import CHATML, QWEN, QWEN3, family, tokenizer

from aepo.agents.formats.make import make_format
from aepo.agents.protocol import AgentError
from aepo.agents.tools.toolbox import schema_of_tool
from aepo.config import FormatConfig


@dataclass
class Model:
    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer) + 7

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_token_id,)


class Search:
    name = "search"
    timeout = 1.0
    description = "Finds."
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}  # noqa: RUF012

    def __call__(self, query: str) -> str:
        return query


OF_GEMMA = "system text in front of the first user message; turns also end with <end_of_turn>"
BARE = tokenizer(None, CHATML, eos="<|im_end|>", name="bare")


TOOLLESS = tokenizer(QWEN3.replace("if tools", "if false"), CHATML, eos="<|im_end|>")
SEARCH = (Search(),)
ARGUMENTS = {"chat_template_kwargs": {"enable_thinking": False}}
REFUSED = "format.chat_template_kwargs = {'enable_thinking': False}: expected none with the format"


def make(toy, tools=SEARCH, tool_instructions=None, **settings):
    schemas = list(map(schema_of_tool, tools))
    return make_format(FormatConfig(**settings), Model(toy), schemas, tool_instructions=tool_instructions)


@pytest.mark.parametrize(
    ("toy", "tools", "settings", "chosen"),
    [
        (family("qwen"), (Search(),), {}, "format chat, calls as hermes: the model's chat template shows tools"),
        (
            family("qwen3"),
            (Search(),),
            {"chat_template_kwargs": {"enable_thinking": False}},
            "format chat with enable_thinking=False, calls as hermes: the model's chat template shows tools",
        ),
        (
            family("drops_thinking"),
            (),
            {"chat_template_kwargs": {"enable_thinking": True}},
            "format chat with enable_thinking=True: the model has a chat template, and there are no tools; the first "
            "turn begins inside <think>",
        ),
        (family("gemma"), (Search(),), {}, f"format tags: the model's chat template does not show tools; {OF_GEMMA}"),
        (family("gemma"), (), {}, f"format chat: the model has a chat template, and there are no tools; {OF_GEMMA}"),
        (
            family("glm"),
            (Search(),),
            {},
            "format chat, calls as glm45: the model's chat template shows tools; turns also end with <|user|>; turns "
            "also end with <|observation|>",
        ),
        (BARE, (Search(),), {}, "format tags: the model has no chat template"),
        (BARE, (), {}, "format tags: the model has no chat template"),
        (
            family("gemma"),
            (Search(),),
            {"calls": "hermes"},
            f"format chat, calls as hermes: format.calls = hermes; tools described in the system text; {OF_GEMMA}",
        ),
        (family("qwen"), (Search(),), {"name": "tags"}, "format tags: format.name"),
        (family("gemma"), (), {"name": "chat"}, f"format chat: format.name; {OF_GEMMA}"),
    ],
)
def test_the_format_that_fits_and_why(toy, tools, settings, chosen: str) -> None:
    made = make(toy, tools, **settings)
    assert made.chosen == chosen
    assert made.name == made.identity["name"] == chosen.split()[1].strip(":,")
    assert made.identity["notes"] == (chosen.split("; ")[1:] or None)
    assert made.vocab_size == len(toy) + 7


def test_what_a_run_remembers() -> None:
    assert make(family("qwen"), answer="boxed").identity == {
        "name": "chat",
        "calls": "hermes",
        "answer": "boxed",
        "chat_template": hashlib.sha256(QWEN.encode()).hexdigest(),
        "chat_template_kwargs": None,
        "notes": None,
        "warnings": None,
    }
    assert make(BARE).identity == dict.fromkeys(make(family("qwen")).identity) | {"name": "tags", "answer": "tag"}
    off = make(family("qwen3"), **ARGUMENTS)
    assert off.decode(off.prompt_tokens([{"role": "user", "content": "Q"}])).endswith("<think>\n\n</think>\n\n")
    found = make(family("drops_thinking"), chat_template_kwargs={"enable_thinking": True}).identity
    assert json.loads(json.dumps(found)) == found
    assert found["chat_template_kwargs"] == {"enable_thinking": True}
    assert found["notes"] == ["the first turn begins inside <think>"]
    assert found["warnings"][1:] == ["the chat template drops the thinking of earlier turns"]


def test_the_tasks_instructions_reach_the_tags() -> None:
    made = make(BARE, tool_instructions="Use it.")
    assert made.decode(made.prompt_tokens([{"role": "user", "content": "Q"}])) == "Use it.\nQ\n"


@pytest.mark.parametrize(
    ("toy", "settings", "message"),
    [
        (BARE, {"name": "chat"}, "tokenizer bare: expected a chat template, it has none; set format.name=tags"),
        (BARE, {"calls": "hermes"}, "format.calls = 'hermes': expected auto with format.name = tags"),
        (BARE, {"answer": "boxed"}, "format.answer = 'boxed': expected auto or tag"),
        (BARE, {"name": "tag"}, "format.name = 'tag': expected auto, chat, tags, or package.module:Class"),
        (BARE, {"name": "nowhere_at_all:Own"}, "format.name = 'nowhere_at_all:Own': no module 'nowhere_at_all'"),
        (family("gemma"), {"name": "chat"}, "does not show tools (search)"),
        (BARE, ARGUMENTS, f"{REFUSED} tags (the model has no chat template), only chat"),
        (family("gemma"), ARGUMENTS, "format.chat_template_kwargs.enable_thinking: expected an argument that the chat"),
        (TOOLLESS, ARGUMENTS, f"{REFUSED} tags (the model's chat template does not show tools), only chat"),
        (family("qwen3"), {"name": "tags", **ARGUMENTS}, f"{REFUSED} tags (format.name), only chat"),
        (family("qwen3"), {"name": "own:Format", **ARGUMENTS}, f"{REFUSED} own:Format (format.name), only chat"),
    ],
)
def test_bad_settings_are_one_line(toy, settings, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make(toy, **settings)
    assert "\n" not in str(caught.value)


def test_a_format_of_ones_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_format_here.py").write_text(
        "from aepo.agents.formats.tags import TagsFormat\n\n\n"
        "class Loud(TagsFormat):\n    def __init__(self, settings, language_model, schemas, *, tool_instructions):\n"
        "        super().__init__(language_model.tokenizer, language_model.vocab_size, language_model.eos_ids,\n"
        "                         schemas, tool_instructions=f'{settings.answer} {len(schemas)}')\n\n\n"
        "class Half:\n    name = 'half'\n\n    def __init__(self, *arguments, **named): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    made = make(BARE, name="own_format_here:Loud")
    assert made.chosen == "format own_format_here:Loud: format.name"
    assert made.decode(made.prompt_tokens([{"role": "user", "content": "Q"}])) == "auto 1\nQ\n"
    with pytest.raises(ValueError, match="expected a ChatFormat, Half has no eos_ids, stop_strings, vocab_size"):
        make(BARE, name="own_format_here:Half")


def test_the_format_of_the_guide(tmp_path, monkeypatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n([^`]*class Format\(TagsFormat\)[^`]*)```", page)
    (tmp_path / "format_of_the_guide.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    made = make(BARE, name="format_of_the_guide:Format")
    told = made.decode(made.prompt_tokens([{"role": "user", "content": "Q"}]))
    assert told == "Call <search>words</search>, and end with <answer>ANSWER IN CAPITALS</answer>.\nQ\n"
    assert made.stop_strings == ("</search>", "</answer>")


@pytest.mark.parametrize(
    ("takes", "seen"), [("", "nothing"), (", *, before=None", "(7,)"), (", *, before", "(7,)"), (", **_", "nothing")]
)
def test_a_format_of_ones_own_is_told_what_a_turn_follows_where_it_asks(tmp_path, monkeypatch, takes, seen) -> None:
    (tmp_path / "format_that_asks.py").write_text(
        "from aepo.agents.formats.tags import TagsFormat\nfrom aepo.types import Turn\n\n\n"
        "class Own(TagsFormat):\n    def __init__(self, settings, language_model, schemas, *, tool_instructions):\n"
        "        super().__init__(language_model.tokenizer, language_model.vocab_size, language_model.eos_ids)\n\n"
        f"    def read(self, token_ids, finish_reason{takes}):\n"
        "        text = str(locals().get('before', 'nothing'))\n        return Turn(text, text)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "format_that_asks", raising=False)
    assert make(BARE, name="format_that_asks:Own").read([1], "eos", before=(7,)).text == seen


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ("Turn('a', None)", "read returned None as the content, expected a text"),
        ("Turn(1, 'a')", "read returned 1 as the text, expected a text"),
        ("Turn('a', 'a', (), True, 4)", "read returned 4 as the answer, expected a text"),
        ("Turn('a', 'a', [{}])", "read returned {} as a call, expected ToolCall"),
        ("'a'", "read returned 'a', expected a Turn"),
        ("exit(0)", "read failed: SystemExit: 0"),
    ],
)
def test_what_a_format_of_ones_own_reads_is_checked(tmp_path, monkeypatch, turn: str, problem: str) -> None:
    (tmp_path / "format_that_reads.py").write_text(
        "from aepo.agents.formats.tags import TagsFormat\nfrom aepo.types import Turn\n\n\n"
        "class Own(TagsFormat):\n    def __init__(self, settings, language_model, schemas, *, tool_instructions):\n"
        "        super().__init__(language_model.tokenizer, language_model.vocab_size, language_model.eos_ids)\n\n"
        f"    def read(self, token_ids, finish_reason):\n        return {turn}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "format_that_reads", raising=False)
    with pytest.raises(AgentError, match=re.escape(problem)) as caught:
        make(BARE, name="format_that_reads:Own").read([1], "eos")
    assert str(caught.value).startswith("format.name = 'format_that_reads:Own': read")
