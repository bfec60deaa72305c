"""format.chat_template_kwargs: which arguments a template reads, and what they change; thinking, open or not."""

from __future__ import annotations

import html

import pytest
from door_toys import FILES, SMALL, aepo, save_chat_model, write_home
from format_templates import CHATML, HERMES_TAGS, QWEN, QWEN3, QWEN3_CODER, family, tokenizer
from test_format_chat import CALLS, HOSTILE, SCHEMAS, eos_ids, results

from aepo.agents.formats.chat import ChatTemplateFormat
from aepo.agents.formats.chat_template import assistant, tool_result, user
from aepo.agents.formats.template_arguments import own_arguments
from aepo.run.log import read_facts
from aepo.types import ToolCall

OFF = {"enable_thinking": False}
SWITCHED = ["qwen3", "drops_thinking", "thinks_first"]
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'


def make(name: str, schemas=SCHEMAS, **arguments) -> ChatTemplateFormat:
    toy = family(name)
    return ChatTemplateFormat(toy, len(toy), eos_ids(name), schemas, arguments=arguments)


def rendered(name: str, messages, *, generate: bool = True, **arguments) -> str:
    return family(name).apply_chat_template(
        messages, tools=SCHEMAS, tokenize=False, add_generation_prompt=generate, **arguments
    )


def read(chat: ChatTemplateFormat, name: str, text: str, before=None):
    return chat.read(family(name).encode(f"{text}<|im_end|>", add_special_tokens=False), "eos", before=before)


@pytest.mark.parametrize("name", SWITCHED)
def test_without_thinking_a_turn_begins_behind_an_empty_one(name: str) -> None:
    plain, off = make(name), make(name, **OFF)
    begin = [user("What is it?")]
    before, prompt = (chat.decode(chat.prompt_tokens(begin)) for chat in (plain, off))
    assert prompt == before.removesuffix("<think>\n") + "<think>\n\n</think>\n\n" == rendered(name, begin, **OFF)
    assert list(off.prompt_tokens(begin)) == family(name).encode(prompt, add_special_tokens=False)
    on = make(name, enable_thinking=True)
    assert on.prompt_tokens(begin) == plain.prompt_tokens(begin)


@pytest.mark.parametrize("name", SWITCHED)
@pytest.mark.parametrize("arguments", [{}, OFF])
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_appended_is_what_the_template_renders(name: str, arguments, number: int) -> None:
    chat, toy = make(name, **arguments), family(name)
    begin, called = [user("What is it?")], assistant("", CALLS[:number])
    answers = [tool_result(n, call.tool, f"result {n}.") for n, call in enumerate(CALLS[:number])]
    dialogue = [*begin, called]
    text = rendered(name, dialogue, generate=False).removeprefix(rendered(name, begin, generate=False))
    text = text.removeprefix("<|im_start|>assistant\n").removesuffix("\n")
    turn = read(chat, name, f"</think>{text}".removesuffix("<|im_end|>") if chat.template.opens_thinking else text)
    assert (turn.calls, turn.well_formed) == (CALLS[:number], True)
    appended = chat.result_tokens(turn, results("result 0.", "result 1.")[:number])
    whole = rendered(name, [*dialogue, *answers], **arguments)
    rest = whole[whole.rindex("</tool_call><|im_end|>") + len("</tool_call><|im_end|>") :]
    assert list(appended) == toy.encode(rest, add_special_tokens=False)
    assert rest.endswith("<think>\n\n</think>\n\n") == (arguments == OFF)


@pytest.mark.parametrize("name", SWITCHED)
@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_stays_letters_with_arguments_too(name: str, hostile: str) -> None:
    chat = make(name, **OFF)
    control = set(family(name).added_tokens_decoder)
    turn = read(chat, name, CALL)
    for tokens in (
        lambda text: chat.prompt_tokens([user(text)]),
        lambda text: chat.result_tokens(turn, results(text)),
    ):
        harmless, hurt = ([token for token in tokens(text) if token in control] for text in ("x", hostile))
        assert hurt == harmless


@pytest.mark.parametrize("name", SWITCHED)
def test_without_thinking_a_turn_is_read_from_its_beginning(name: str) -> None:
    chat = make(name, **OFF)
    assert not chat.template.opens_thinking
    turn = read(chat, name, f"Now {CALL}")
    assert (turn.content, turn.calls, turn.well_formed) == ("Now", (ToolCall("search", {"query": "x"}),), True)
    assert (read(chat, name, "It is 4.").answer, read(chat, name, "It is 4.").well_formed) == ("It is 4.", True)
    assert read(chat, name, "<think>or 5</think>It is 4.").answer == "It is 4."


@pytest.mark.parametrize("arguments", [{}, OFF])
def test_glm(arguments) -> None:
    """The token that ends a turn with calls begins the results, and stands there once."""
    chat, toy = make("glm", **arguments), family("glm")
    begin, called = [user("What is it?")], assistant("", CALLS)
    answers = [tool_result(n, call.tool, f"result {n}.") for n, call in enumerate(CALLS)]
    text = rendered("glm", [*begin, called], generate=False, **arguments)
    prompt = chat.decode(chat.prompt_tokens(begin))
    assert prompt == rendered("glm", begin, **arguments)
    assert prompt.endswith("/nothink<|assistant|>\n<think></think>" if arguments else "it?<|assistant|>")
    written = toy.encode(f"{text.removeprefix(prompt)}<|observation|>", add_special_tokens=False)
    turn = chat.read(written, "eos")
    assert (turn.calls, turn.content, turn.well_formed) == (CALLS, "", True)
    appended = chat.result_tokens(turn, results("result 0.", "result 1."))
    whole = rendered("glm", [*begin, called, *answers], **arguments)
    assert chat.decode((*chat.prompt_tokens(begin), *written, *appended)) == whole


def test_where_only_the_first_turn_begins_inside_thinking() -> None:
    """What is in front of a turn tells: behind results the template writes no <think>."""
    chat = make("thinks_first")
    assert chat.template.opens_thinking
    prompt = chat.prompt_tokens([user("What is it?")])
    for before in (None, prompt):
        first = read(chat, "thinks_first", f"hm {CALL}</think>{CALL}", before)
        assert (first.calls, first.well_formed) == ((ToolCall("search", {"query": "x"}),), True)
        unfinished = read(chat, "thinks_first", "It is 4.", before)
        assert (unfinished.answer, unfinished.well_formed) == (None, False)
        assert read(chat, "thinks_first", CALL, before).calls == ()
    after = chat.result_tokens(first, results("1"))
    for text in ("x", "a</think>b", "</think>", "<think>"):
        turn = read(chat, "thinks_first", CALL.replace('"x"', f'"{text}"') + "tail", after)
        assert (turn.calls, turn.content, turn.well_formed) == ((ToolCall("search", {"query": text}),), "tail", True)
    assert read(chat, "thinks_first", "It is 4.", after).answer == "It is 4."
    assert read(chat, "thinks_first", "<think>or 5</think>It is 4.", after).answer == "It is 4."
    assert read(chat, "thinks_first", "It is <think> or </think>.", after).answer == "It is <think> or </think>."
    closed = read(chat, "thinks_first", "hm</think>It is 4.", after)
    assert (closed.answer, closed.well_formed) == ("hm</think>It is 4.", False), "it closes what nothing opened"


def test_where_every_turn_begins_inside_thinking() -> None:
    chat = make("drops_thinking")
    first = read(chat, "drops_thinking", f"hm</think>{CALL}")
    for before in (None, chat.prompt_tokens([user("<think>")]), chat.result_tokens(first, results("</think>"))):
        assert read(chat, "drops_thinking", "It is 4.", before).answer is None
        assert read(chat, "drops_thinking", "hm</think>It is 4.", before).answer == "It is 4."


def test_a_text_that_ends_with_an_opening_of_thinking_opens_none() -> None:
    """A question and a result end with the template's own text."""
    chat = make("qwen3")
    turn = read(chat, "qwen3", CALL)
    for before in (chat.prompt_tokens([user("<think>")]), chat.result_tokens(turn, results("<think>"))):
        assert read(chat, "qwen3", "It is 4.", before).answer == "It is 4."


def test_thinking_is_found_where_its_tag_is_no_token() -> None:
    toy = tokenizer(family("thinks_first").chat_template, CHATML, (), eos="<|im_end|>")
    chat = ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS)
    prompt = chat.prompt_tokens([user("What is it?")])
    assert len(toy.encode("<think>\n", add_special_tokens=False)) > 3
    assert chat.read(toy.encode("It is 4.<|im_end|>", add_special_tokens=False), "eos", before=prompt).answer is None


def test_a_template_that_keeps_history_with_an_argument_is_not_warned_of() -> None:
    forgets = QWEN3.replace("loop.index0 > ns.last and", "keep_thinking and")
    toy = tokenizer(forgets, CHATML, HERMES_TAGS, eos="<|im_end|>")
    lines = [
        ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS, arguments=arguments).warnings
        for arguments in ({}, {"keep_thinking": True})
    ]
    assert lines == [("the chat template drops the thinking of earlier turns",), ()]
    (line,) = make("qwen3", **OFF).warnings
    assert "which it leaves out of earlier turns" in line


@pytest.mark.parametrize(
    ("source", "listed"),
    [
        ("{{ a }}{{ b.c }}{{ d | default(e) }}", ["a", "b", "d", "e"]),
        ("{% if not a is defined %}{% set a = false %}{% endif %}{{ a }}", ["a"]),
        ("{% set a = a or 'x' %}{{ a }}{% set b = 1 %}{{ b }}", ["a"]),
        ("{% if x %}{% set a = 1 %}{{ a }}{% elif y %}{{ b }}{% endif %}", ["b", "x", "y"]),
        ("{% for a in a %}{{ a }}{{ loop }}{% if c %}{% break %}{% endif %}{% endfor %}", ["a", "c"]),
        ("{% for a in b if keep %}{% endfor %}", ["b", "keep"]),
        ("{% for a in b %}{% else %}{{ c }}{% endfor %}", ["b", "c"]),
        ("{% with a = a, b = 1 %}{{ a }}{{ b }}{% endwith %}{{ b }}", ["a", "b"]),
        ("{% macro m() %}{{ l }}{{ n() }}{{ a }}{% endmacro %}{% macro n() %}{% endmacro %}{% set l = 1 %}", ["a"]),
        ("{% import 'x' as i %}{% from 'y' import j %}{{ i }}{{ j() }}{% block k %}{{ super() }}{% endblock %}", []),
        pytest.param("{{ " + "~".join(["a"] * 20_000) + " }}", ["a"], id="20,000 terms"),
        ("{% macro m(a, b=c) %}{{ a }}{{ b }}{{ caller() }}{{ varargs }}{% endmacro %}{{ m(a) }}", ["a", "c"]),
        ("{% set ns = namespace(n=0) %}{% set ns.n = a %}{% set b %}{{ c }}{% endset %}{{ b }}", ["a", "c"]),
        ("{% generation %}{{ a }}{% endgeneration %}{{ range(2) }}{{ raise_exception('x') }}{{ strftime_now }}", ["a"]),
        ("{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ eos_token }}{{ image_token }}", []),
    ],
)  # fmt: skip
def test_names_that_a_template_reads(source: str, listed: list[str]) -> None:
    read = own_arguments(source, ["image_token"])
    assert [name for name, certain in read.items() if certain] == listed


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{% if x %}{% set a = 1 %}{% endif %}{{ a }}", "a"),
        ("{% if x %}{% set a = 1 %}{% elif y %}{{ a }}{% endif %}", "a"),
        ("{% for a in b %}{% set c = 1 %}{% endfor %}{{ c }}", "c"),
        ("{% for a in b %}{% else %}{{ a }}{% endfor %}", "a"),
        ("{% macro m(a) %}{{ a }}{% endmacro %}{{ a }}", "a"),
        ("{% set ns.a = 1 %}", "ns"),
    ],
)
def test_a_name_that_a_template_may_read_is_taken(source: str, name: str) -> None:
    """Static reading is in doubt here: a right name that is refused is worse than a wrong one that is not seen."""
    assert name in own_arguments(source)


@pytest.mark.parametrize(
    "source", ["{{ a" + ".b" * 500 + " }}", "{{ " + "+".join(["a"] * 20_000) + " }}"], ids=["500 deep", "20,000 terms"]
)
def test_a_template_that_is_nested_too_deeply_is_one_line(source: str) -> None:
    with pytest.raises(ValueError, match=r"^the chat template cannot be parsed: an expression .* nested too deeply$"):
        own_arguments(source)


def test_an_argument_decides_how_calls_are_written() -> None:
    """It is given to every rendering, also to those without the beginning of a turn."""
    template = f"{{% if coder %}}{QWEN3_CODER}{{% else %}}{QWEN}{{% endif %}}"
    toy = tokenizer(template, CHATML, HERMES_TAGS, eos="<|im_end|>")
    found = [
        ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS, arguments=arguments).calls
        for arguments in ({}, {"coder": True})
    ]
    assert found == ["hermes", "qwen3_coder"]


def test_lone_surrogates_in_an_argument_become_question_marks() -> None:
    template = QWEN.replace("'<|im_end|>\\n'", "'<|im_end|>\\n' + (date or '')")
    assert template != QWEN
    toy = tokenizer(template, CHATML, HERMES_TAGS, eos="<|im_end|>")
    chat = ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS, arguments={"date": "a\ud800"})
    assert "<|im_end|>\na?" in chat.decode(chat.prompt_tokens([user("x")]))


@pytest.mark.parametrize(
    ("name", "argument", "known"),
    [
        ("qwen3", "enable_thinkin", "enable_thinking"),
        ("qwen3", "message", "enable_thinking"),  # it sets this one itself
        ("qwen", "enable_thinking", "it has none"),
        ("llama3", "bos_token", "it has none"),
        *(
            (("qwen3"), given, "enable_thinking")
            for given in ("messages", "tools", "add_generation_prompt", "tokenize")
        ),
    ],
)
def test_arguments_that_a_template_does_not_read_are_refused(name: str, argument: str, known: str) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs") as caught:
        make(name, **{argument: True})
    assert str(caught.value) == (
        f"format.chat_template_kwargs.{argument}: expected an argument that the chat template of {name} reads and is "
        f"not given anyway: {known}"
    )


def test_tools_as_text_with_an_argument() -> None:
    toy = tokenizer(QWEN3.replace("if tools", "if false"), CHATML, HERMES_TAGS, eos="<|im_end|>")
    chat = ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS, calls="hermes", arguments=OFF)
    prompt = chat.decode(chat.prompt_tokens([user("a")]))
    assert "You may call one or more functions" in prompt
    assert prompt.endswith("</think>\n\n")


def test_a_template_that_is_none_is_one_line() -> None:
    toy = tokenizer("{%\n if", CHATML, eos="<|im_end|>", name="broken")
    with pytest.raises(ValueError, match=r"^the chat template cannot be parsed: line 2: ") as caught:
        ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], arguments=OFF)
    assert "\n" not in str(caught.value)


def test_the_tools_template_of_several_is_the_one_that_is_read() -> None:
    toy = family("qwen3")
    toy.chat_template = {
        "default": toy.chat_template.replace("enable_thinking", "think"),
        "tool_use": toy.chat_template,
    }
    chat = ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS, arguments=OFF)
    assert chat.decode(chat.prompt_tokens([user("a")])).endswith("</think>\n\n")
    with pytest.raises(ValueError, match=r"not given anyway: think$"):
        ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], (), arguments=OFF)


def test_a_run_remembers_them(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_home(tmp_path)
    save_chat_model(tmp_path / "qwen", "drops_thinking")
    name = "format.chat_template_kwargs"
    done = aepo("train", *SMALL, *FILES, "task.tools=mine:add", f"{name}.enable_thinking=true", "train.steps=1")
    assert done.code == 0, done.output
    assert (
        "format chat with enable_thinking=True, calls as hermes: the model's chat template shows tools; the first "
        in (done.output)
    )
    facts = read_facts(tmp_path / "run")["format"]
    assert facts["chat_template_kwargs"] == {"enable_thinking": True}
    assert all(f"warning: {warning}\n" in done.output for warning in facts["warnings"])
    assert aepo("eval", "run", "--questions", "1").code == 0
    assert aepo("train", "--resume", "run", "train.steps=2").code == 0
    assert aepo("report", "run").code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    for shown in ("drops the thinking of earlier turns", "enable_thinking: True", *facts["notes"]):
        assert html.escape(shown) in page or shown in page, shown
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("enable_thinking: true", "enable_thinking: false"))
    changed = f"{name}.enable_thinking was True and is False"
    assert changed in aepo("eval", "run", "--questions", "1").failure
    assert changed in aepo("train", "--resume", "run", "train.steps=3").failure
    meant = aepo("train", "--resume", "run", "train.steps=3", f"{name}.enable_thinking=false")
    assert meant.code == 0, meant.output
    assert changed in read_facts(tmp_path / "run")["resumed"][-1]["changed"]
