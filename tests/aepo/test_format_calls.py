"""What the parsers read, and what they say of calls that cannot be read."""

from __future__ import annotations

import json
import time

import pytest

from aepo.agents.formats.answers import boxed, first_of_all, tagged, without_thinking
from aepo.agents.formats.calls import (
    Unreadable,
    find_parser,
    glm45,
    hermes,
    llama3_json,
    load_json,
    qwen3_coder,
    value_of,
)
from aepo.types import ToolCall

SEARCH = '{"name": "search", "arguments": {"query": "x"}}'
SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
        "kind": {"enum": [1, 2]},
        "point": {"$ref": "#/$defs/Point"},
        "anything": {},
    },
    "$defs": {"Point": {"type": "object"}},
}


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("just words", "just words", []),
        (f"First. <tool_call>\n{SEARCH}\n</tool_call>", "First.", [ToolCall("search", {"query": "x"})]),
        (
            f"<tool_call>{SEARCH}</tool_call>\n<tool_call> {SEARCH} </tool_call>",
            "",
            [ToolCall("search", {"query": "x"})] * 2,
        ),
        (f"<tool_call>{SEARCH}", "", [ToolCall("search", {"query": "x"})]),  # the last closing tag may be missing
        ('<tool_call>{"name": "a-b.c", "arguments": "{\\"n\\": 1}"}</tool_call>', "", [ToolCall("a-b.c", {"n": 1})]),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [ToolCall("now", {})]),
        (  # tags inside a string are text, and so is a line break
            '<tool_call>{"name": "run", "arguments": {"code": "a</tool_call>\n<tool_call>"}}</tool_call> done',
            "done",
            [ToolCall("run", {"code": "a</tool_call>\n<tool_call>"})],
        ),
        ('<tool_call>{"name": "f", "arguments": {"s": "\\ud83d"}}</tool_call>', "", [ToolCall("f", {"s": "?"})]),
    ],
)
def test_hermes(text: str, content: str, calls: list[ToolCall]) -> None:
    assert hermes(text, {}) == (content, tuple(calls))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>search(x)</tool_call>", "not valid JSON: Expecting value at character 1"),
        (f"<tool_call>{SEARCH}}}</tool_call>", "expected </tool_call> after the JSON object"),
        ('<tool_call>{"name": "f"}</tool_call>', 'expected "arguments" beside "name"'),
        ('<tool_call>{"arguments": {}}</tool_call>', 'expected a JSON object with "name" and "arguments"'),
        ('<tool_call>["f"]</tool_call>', 'expected a JSON object with "name" and "arguments"'),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '"arguments": expected a JSON object'),
        ('<tool_call>{"name": "f", "arguments": "1 2"}</tool_call>', '"arguments": not valid JSON: more text follows'),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "a number is too long or no number"),
        (f'<tool_call>{{"name": "f", "arguments": {{"x": {"9" * 5000}}}}}</tool_call>', "a number is too long"),
        ("<tool_call>" + "[" * 100_000, "nested too deeply"),
    ],
)
def test_hermes_says_what_is_wrong_and_reads_the_next_call(text: str, problem: str) -> None:
    closed = text if text.endswith("</tool_call>") else f"{text}</tool_call>"
    content, (bad, good) = hermes(f"{closed}<tool_call>{SEARCH}</tool_call>", {})
    assert problem in str(bad.problem)
    assert good == ToolCall("search", {"query": "x"})
    assert content == ""


def xml(name: str, **values: str) -> str:
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"


def test_qwen3_coder_reads_values_by_the_schema() -> None:
    text = "Now. " + xml(
        "a-b.c", text="5", count="3", share="2", flag="True", items="[1, 2]", maybe="None", either="7", kind="2",
        point='{"x": 1}', anything="04", unknown="1",
    )  # fmt: skip
    content, (call,) = qwen3_coder(text, {"a-b.c": SCHEMA})
    assert content == "Now."
    assert call.problem is None
    assert call.tool == "a-b.c"
    assert call.arguments == {
        "text": "5", "count": 3, "share": 2, "flag": True, "items": [1, 2], "maybe": None, "either": 7, "kind": 2,
        "point": {"x": 1}, "anything": "04", "unknown": "1",
    }  # fmt: skip
    assert json.dumps(call.arguments["flag"]) == "true"


def glm(name: str, between: str = "\n", **values: str) -> str:
    inside = [f"<arg_key>{key}</arg_key>{between}<arg_value>{value}</arg_value>" for key, value in values.items()]
    return "<tool_call>" + between.join([name, *inside, "</tool_call>"])


@pytest.mark.parametrize("between", ["\n", ""])
def test_glm45_reads_values_by_the_schema(between: str) -> None:
    text = "Now. " + glm("a-b.c", between, text="5", count="3", flag="true", items='["a"]', maybe="null", unknown="1")
    content, calls = glm45(text + glm("now", between) + " Then.", {"a-b.c": SCHEMA})
    assert content == "Now.  Then."
    read = {"text": "5", "count": 3, "flag": True, "items": ["a"], "maybe": None, "unknown": "1"}
    assert calls == (ToolCall("a-b.c", read), ToolCall("now", {}))


def test_glm45_keeps_code_as_it_is() -> None:
    code = "  if x:\n    print('</arg_value>', '</tool_call>', '<tool_call>f')\n\nprint(1)"
    calls = (ToolCall("run", {"text": code}), ToolCall("run", {"text": ""}))
    assert glm45(glm("run", text=code) + "\n" + glm("run", text=""), {"run": SCHEMA}) == ("", calls)
    assert glm45(glm("run", text=code).removesuffix("\n</tool_call>"), {"run": SCHEMA}) == ("", calls[:1])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"<tool_call>{SEARCH}</tool_call>", None),  # a tool of this name is not there, which the model is told
        (glm("run", count="x"), "parameter 'count': expected integer, got 'x'"),
        (glm("", text="x"), "expected the name of a tool after <tool_call>"),
        (
            "<tool_call>run(text)\n<arg_key>text</arg_key>x</tool_call>",
            "got '<arg_key>text</arg_key>x</tool_call>'",
        ),
        (
            "<tool_call>run\nx</tool_call>",
            "expected <arg_key>key</arg_key><arg_value>value</arg_value>, then </tool_call>, got 'x</tool_call>'",
        ),
        (glm("run", text="x").replace("\n</tool_call>", " x</tool_call>"), "got '<arg_key>text</arg_key>"),
    ],
)
def test_glm45_says_what_is_wrong_and_reads_the_next_call(text: str, problem: str | None) -> None:
    content, (bad, good) = glm45(text + glm("f", text="a"), {"run": SCHEMA})
    assert problem is None or problem in str(bad.problem)
    assert (content, good) == ("", ToolCall("f", {"text": "a"}))


def test_qwen3_coder_keeps_code_as_it_is() -> None:
    code = "  if x:\n    print('</parameter>', '</function>')\n\nprint(1)"
    _, calls = qwen3_coder(xml("run", text=code) + "\n" + xml("run", text=""), {"run": SCHEMA})
    assert calls == (ToolCall("run", {"text": code}), ToolCall("run", {"text": ""}))


def test_qwen3_coder_takes_calls_without_the_outer_tags() -> None:
    inner = "<function=f>\n<parameter=text>\na\n</parameter>\n</function>"
    assert qwen3_coder(f"{inner}\n{inner}\n</tool_call>", {})[1] == (ToolCall("f", {"text": "a"}),) * 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (xml("f", count="many"), "parameter 'count': expected integer, got 'many'"),
        (xml("f", count="1.5"), "parameter 'count': expected integer, got '1.5'"),
        (xml("f", count="true"), "parameter 'count': expected integer, got 'true'"),
        (
            "<tool_call><function=f>words</function></tool_call>",
            "expected <parameter=key>value</parameter>, then </function></tool_call>, "
            "got 'words</function></tool_call>'",
        ),
        (
            "<tool_call><function=f><parameter=text>a</parameter></tool_call>",
            "expected <parameter=key>value</parameter>, then </function></tool_call>, "
            "got '<parameter=text>a</parameter></tool_call'",
        ),
        ("<tool_call>{}</tool_call>", "expected <function=name> after <tool_call>"),
    ],
)
def test_qwen3_coder_says_what_is_wrong(text: str, problem: str) -> None:
    _, (bad, good) = qwen3_coder(text + "\n" + xml("f", text="a"), {"f": SCHEMA})
    assert bad.problem == problem
    assert good == ToolCall("f", {"text": "a"})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"x": 1}}', "", [ToolCall("f", {"x": 1})]),
        (' <|python_tag|>{"name": "f", "parameters": {}} ', "", [ToolCall("f", {})]),
        ('{"name": "f", "arguments": {"x": 1}}', "", [ToolCall("f", {"x": 1})]),
        (
            '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
            "",
            [ToolCall("f", {}), ToolCall("g", {})],
        ),
        (
            '{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}',
            "",
            [ToolCall("f", {}), ToolCall("g", {})],
        ),
        ('{"name": "Paris", "people": 2}', '{"name": "Paris", "people": 2}', []),  # an answer
        ("{x}", "{x}", []),
        ("42", "42", []),
        ('Call {"name": "f", "parameters": {}}', 'Call {"name": "f", "parameters": {}}', []),
    ],
)
def test_llama3_json(text: str, content: str, calls: list[ToolCall]) -> None:
    assert llama3_json(text, {}) == (content, tuple(calls))


@pytest.mark.parametrize(
    "text", ['{"name": "f", "parameters": {"x": }}', "<|python_tag|>print(1)", "<|python_tag|>[1]"]
)
def test_llama3_json_says_what_is_wrong(text: str) -> None:
    content, (call,) = llama3_json(text, {})
    assert content == ""
    assert call.problem is not None


def test_a_second_object_that_is_no_call_is_a_problem() -> None:
    _, calls = llama3_json('{"name": "f", "parameters": {}} {"x": 1}', {})
    assert [call.problem is None for call in calls] == [True, False]


def test_a_value_that_may_be_a_text_is_one_where_nothing_else_fits() -> None:
    assert value_of("x1", "either", SCHEMA) == "x1"
    assert value_of("5", "maybe", SCHEMA) == "5"
    assert value_of("3.0", "count", SCHEMA) == 3
    either = {"properties": {"n": {"type": ["number", "integer"]}}}
    assert [type(value_of(text, "n", either)) for text in ("2.0", "2")] == [float, int]
    with pytest.raises(Unreadable):
        value_of("5", "items", SCHEMA)


@pytest.mark.parametrize("parser", [hermes, qwen3_coder, llama3_json, glm45])
def test_parsing_hostile_text_is_linear(parser) -> None:
    pieces = (
        "<tool_call>",
        "<tool_call><function=f>",
        "<function=f><parameter=x>",
        "</parameter>",
        "<tool_call>f<arg_key>x</arg_key><arg_value>",
        "<tool_call>f<arg_key>x</arg_key><arg_value></arg_value> ",
        "<function=f><parameter=x></parameter></function></tool_call>",
        "</parameter></function></tool_call>",
        "</arg_value></tool_call>",
        " ",
        "</arg_value>",
        '{"name": "f",',
        "{",
    )
    for piece in pieces:
        start = time.process_time()
        parser(piece * 5_000, {})
        assert time.process_time() - start < 1.0, piece


GOOD = ToolCall("g", {"text": "a"})
CONVENTIONS = {
    hermes: lambda name, **values: f"<tool_call>\n{json.dumps({'name': name, 'arguments': values})}\n</tool_call>",
    glm45: glm,
    qwen3_coder: xml,
}


@pytest.mark.parametrize(("parser", "write"), CONVENTIONS.items())
def test_a_call_without_its_closing_tag_leaves_the_next_one(parser, write) -> None:
    """What it says is complete, so that it is run itself."""
    text = write("f", text="1").removesuffix("</tool_call>") + write("g", text="a")
    assert parser(f"Both. {text}", {}) == ("Both.", (ToolCall("f", {"text": "1"}), GOOD))


@pytest.mark.parametrize(("parser", "write"), CONVENTIONS.items())
@pytest.mark.parametrize("cut", [3, 12, 40])
def test_a_call_that_breaks_off_leaves_the_next_one(parser, write, cut: int) -> None:
    text = write("f", text="1", more="2").removesuffix("</tool_call>").removesuffix("</function>\n")[:-cut]
    content, (bad, good) = parser(f"{text}\n{write('g', text='a')}", {})
    assert (content, good) == ("", GOOD)
    assert bad.problem is not None


def test_a_call_without_outer_tags_that_breaks_off_leaves_the_next_one() -> None:
    _, (bad, good) = qwen3_coder(f"<function=f>words\n{xml('g', text='a').removeprefix('<tool_call>')}", {})
    assert (bad.tool, bad.problem is None, good) == ("f", False, GOOD)


@pytest.mark.parametrize(
    ("parser", "text", "problem"),
    [
        (hermes, '{"name": "f", "arguments": {"x": 1, "x": 2}}', "not valid JSON: 'x' stands twice in one object"),
        (hermes, '{"name": "f", "name": "g", "arguments": {}}', "not valid JSON: 'name' stands twice in one object"),
        (
            glm45,
            "f<arg_key>x</arg_key><arg_value>1</arg_value><arg_key>x</arg_key><arg_value>2</arg_value>",
            "parameter 'x': expected one value, got two",
        ),
        (
            qwen3_coder,
            "<function=f><parameter=x>1</parameter><parameter=x>2</parameter></function>",
            "parameter 'x': expected one value, got two",
        ),
    ],
)
def test_an_argument_that_is_given_twice_is_a_problem(parser, text: str, problem: str) -> None:
    _, (call,) = parser(f"<tool_call>{text}</tool_call>", {})
    assert call.problem == problem


@pytest.mark.parametrize(
    ("parser", "write", "closing"),
    [(glm45, glm, "</arg_value>\n</tool_call>"), (qwen3_coder, xml, "</parameter>\n</function>\n</tool_call>")],
)
@pytest.mark.parametrize("quoted", ["{closing}", "see {call} there"])
def test_a_value_that_holds_the_end_of_a_call_is_not_run_in_part(parser, write, closing: str, quoted: str) -> None:
    value = f"one {quoted.format(closing=closing, call=write('rm', text='x'))} two"
    content, (*bad, good) = parser(write("f", text=value) + write("g", text="a") + " Then.", {})
    assert bad
    assert all(call.problem for call in bad)
    assert (content, good) == ("Then.", GOOD)


def test_own_parsers_are_found_by_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_parser_here.py").write_text(
        "class Own:\n    def __call__(self, text, schemas):\n        return text, ()\n\n\ndef own(text, schemas):\n"
        "    return text, ()\n\n\nnumber = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    assert find_parser("own_parser_here:Own")("a", {}) == ("a", ())
    assert find_parser("own_parser_here:own")("a", {}) == ("a", ())
    with pytest.raises(ValueError, match="expected a parser"):
        find_parser("own_parser_here:number")
    with pytest.raises(
        ValueError, match=r"expected auto, hermes, qwen3_coder, llama3_json, glm45, or package\.module:Name"
    ):
        find_parser("hermse")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\fbox{1} \boxed {2}", "2"),
        ("{1}", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


def test_answers_in_tags_and_the_first_style_that_finds_one() -> None:
    assert tagged("<answer>1</answer> no, <answer> 2 <answer>3</answer>.") == "3"
    assert first_of_all(r"<answer>a</answer> \boxed{b}") == "a"
    assert first_of_all(r"it is \boxed{b}") == "b"
    assert first_of_all(" b ") == "b"
    assert first_of_all(" ") is None


def test_thinking_is_left_out_also_where_it_does_not_end() -> None:
    assert without_thinking("<think>a</think>b") == "b"
    assert without_thinking("\n<think>a</think>\n<think>b</think>c") == "c"
    assert without_thinking("<think>a</think><think>b") == ""
    assert without_thinking("a<think>b</think>c") == "a<think>b</think>c"


def test_a_million_openings_of_thinking_are_read_at_once() -> None:
    start = time.process_time()
    without_thinking("<think>" * 1_000_000)
    without_thinking("<think></think>" * 500_000 + "<think>")
    assert time.process_time() - start < 2


BAD_SCHEMAS = [
    5,
    None,
    True,
    {"type": None},
    {"type": [{}]},
    {"enum": 5},
    {"anyOf": 5},
    {"anyOf": [5]},
    {"$ref": "#/a"},
]


@pytest.mark.parametrize("schema", [{"properties": {"x": each}} for each in BAD_SCHEMAS] + [{"properties": None}])
def test_where_a_schema_cannot_be_read_a_value_is_a_text(schema) -> None:
    assert value_of("1", "x", schema) == "1"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_are_not_finite_are_no_json(number: str) -> None:
    with pytest.raises(Unreadable, match="a number is too long or no number"):
        load_json(f'{{"x": [{number}]}}')
    with pytest.raises(Unreadable, match="parameter 'x': expected number"):
        value_of(number, "x", {"properties": {"x": {"type": "number"}}})
