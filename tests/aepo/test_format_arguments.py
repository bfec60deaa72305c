"""format.chat_template_kwargs: which arguments a template reads, and what they change; thinking, open or not."""

from __future__ import annotations

import html

import pytest
from door_toys import FILES, SMALL, aepo, save_chat_model, write_home
from format_templates import CHATML, HERMES_TAGS, QWEN3, family, tokenizer
from test_format_chat import CALLS, HOSTILE, SCHEMAS, eos_ids, results

from aepo.agents.formats.chat import ChatTemplateFormat
from aepo.agents.formats.chat_template import assistant, tool_result, user
from aepo.agents.formats.template_arguments import own_arguments
from aepo.run_log import read_facts
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


def read(chat: ChatTemplateFormat, name: str, text: str):
    return chat.read(family(name).encode(f"{text}<|im_end|>", add_special_tokens=False), "eos")


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
    """The end of the thinking tells: behind results the template writes no <think>, so that an answer has no end."""
    chat = make("thinks_first")
    assert chat.template.opens_thinking
    turn = read(chat, "thinks_first", f"hm {CALL}</think>{CALL}")
    assert (turn.calls, turn.well_formed) == ((ToolCall("search", {"query": "x"}),), True)
    turn = read(chat, "thinks_first", CALL)
    assert (turn.calls, turn.well_formed) == ((ToolCall("search", {"query": "x"}),), True)
    assert read(chat, "thinks_first", "It is 4.").answer == "It is 4."
    assert read(chat, "thinks_first", "<think>or 5</think>It is 4.").answer == "It is 4."
    assert read(chat, "thinks_first", "It is <think> or </think>.").answer == "It is <think> or </think>."
    assert read(make("drops_thinking"), "drops_thinking", "It is 4.").answer is None, "every turn begins inside"
    assert read(make("thinks_first", ()), "thinks_first", "It is 4.").answer is None, "there is no other turn"


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
    ("source", "read"),
    [
        ("{{ a }}{{ b.c }}{{ d | default(e) }}", ["a", "b", "d", "e"]),
        ("{% if not a is defined %}{% set a = false %}{% endif %}{{ a }}", ["a"]),
        ("{% set a = a or 'x' %}{{ a }}{% set b = 1 %}{{ b }}", ["a"]),
        ("{% if x %}{% set a = 1 %}{{ a }}{% elif y %}{{ a }}{% endif %}", ["x", "y"]),
        ("{% for a in a %}{{ a }}{{ loop }}{% if c %}{% break %}{% endif %}{% endfor %}", ["a", "c"]),
        ("{% for a in b if keep %}{% set c = 1 %}{% endfor %}{{ c }}", ["b", "c", "keep"]),
        ("{% macro m(a, b=c) %}{{ a }}{{ b }}{{ caller() }}{{ varargs }}{% endmacro %}{{ m(a) }}", ["a", "c"]),
        ("{% set ns = namespace(n=0) %}{% set ns.n = a %}{% set b %}{{ c }}{% endset %}{{ b }}", ["a", "c"]),
        ("{% generation %}{{ a }}{% endgeneration %}{{ range(2) }}{{ raise_exception('x') }}{{ strftime_now }}", ["a"]),
        ("{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ eos_token }}{{ image_token }}", []),
    ],
)  # fmt: skip
def test_names_that_a_template_reads(source: str, read: list[str]) -> None:
    assert own_arguments(source, ["image_token"]) == read


@pytest.mark.parametrize(
    ("name", "argument", "known"),
    [
        ("qwen3", "enable_thinkin", "enable_thinking"),
        ("qwen3", "content", "enable_thinking"),  # it sets this one itself
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
