"""Which tokens end a turn of the model's own template, and turns that end before anything is said."""

from __future__ import annotations

import pytest
from format_templates import CHATML, FAMILIES, HERMES_TAGS, QWEN, family, tokenizer
from test_format_chat import SCHEMAS, make, read

from aepo.agents.formats.chat import ChatTemplateFormat
from aepo.agents.formats.chat_template import ChatTemplate, assistant, user


def test_the_end_of_turn_ends_segments_too() -> None:
    toy = family("gemma")
    end_of_turn, eos = toy.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    chat = ChatTemplateFormat(toy, len(toy), [eos], ())
    assert chat.eos_ids == tuple(sorted((end_of_turn, eos)))
    assert chat.stop_strings == ()
    assert read(chat, toy, "4<end_of_turn>").text == "4"


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_has_other_ends_than_those_of_its_turns(name: str) -> None:
    """Whatever the model's configuration knows; a turn of GLM has no end, its model stops at the role that is next."""
    ends = {"glm": ["<|user|>", "<|observation|>"], "llama3": ["<|eot_id|>"], "gemma": ["<end_of_turn>"]}
    toy, expected = family(name), ends.get(name) or ["</s>" if name == "mistral" else "<|im_end|>"]
    template = ChatTemplate(toy, SCHEMAS, hermes=name == "gemma")
    for known in ([], toy.convert_tokens_to_ids(expected[:1]), toy.convert_tokens_to_ids(expected)):
        assert template.turn_ends(known) == tuple(sorted(toy.convert_tokens_to_ids(expected)))
    other = toy.convert_tokens_to_ids("A")
    assert template.turn_ends([other]) == tuple(sorted([other, *toy.convert_tokens_to_ids(expected)]))


def test_an_end_of_the_whole_dialogue_is_none_of_a_turn() -> None:
    """As that of Phi 3 writes it."""
    whole = QWEN + "{%- if not add_generation_prompt %}{{- '<|endoftext|>' }}{%- endif %}"
    toy = tokenizer(whole, CHATML, HERMES_TAGS, eos="<|endoftext|>")
    chat = ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS)
    assert chat.eos_ids == tuple(sorted(toy.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])))


def test_what_a_past_answer_ends_with_is_no_end() -> None:
    """As in Harmony: <|end|> also ends the thinking of a turn, which itself ends with <|return|>."""
    template = (
        "{%- for m in messages %}{{- '<|start|>' + m.role + '<|message|>' + m.content }}"
        "{{- '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
    )
    marks = ("<|start|>", "<|message|>", "<|end|>", "<|return|>")
    toy = tokenizer(template, marks, (), eos="<|return|>")
    assert ChatTemplate(toy).turn_ends([toy.eos_token_id]) == (toy.eos_token_id,)


def test_an_end_that_the_last_turn_lacks_is_found() -> None:
    toy = tokenizer(
        QWEN.replace(
            "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == 'tool'",
            "        {%- if not loop.last %}{{- '<|im_end|>\\n' }}{%- endif %}\n    {%- elif message.role == 'tool'",
        ),
        CHATML, HERMES_TAGS, eos="<|endoftext|>",
    )  # fmt: skip
    assert ChatTemplate(toy).render([user("a"), assistant("b")]).endswith("b")
    chat = ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS)
    assert chat.eos_ids == tuple(sorted(toy.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])))


def test_a_template_of_one_question() -> None:
    toy = family("qwen")
    toy.chat_template = (
        "{%- if messages|selectattr('role', 'equalto', 'user')|list|length > 1 %}{{- raise_exception('one') }}"
        "{%- endif %}" + QWEN
    )
    chat = ChatTemplateFormat(toy, len(toy), [toy.convert_tokens_to_ids("A")], SCHEMAS)
    assert toy.convert_tokens_to_ids("<|im_end|>") in chat.eos_ids


def test_a_turn_that_ends_with_the_models_own_token_needs_no_other() -> None:
    toy = tokenizer(
        QWEN.replace("'<|im_end|>\\n'", "'<|endoftext|><|im_end|>\\n'"), CHATML, HERMES_TAGS, eos="<|im_end|>"
    )
    chat = ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS)
    assert chat.eos_ids == (toy.eos_token_id,)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"mistral"}))
def test_a_turn_of_nothing_but_control_tokens_and_tags_is_not_well_formed(name: str) -> None:
    toy = family(name)
    chat = make(name, **({"calls": "hermes"} if name == "gemma" else {}))
    header = next(token for token in ("<|im_start|>", "<|start_header_id|>", "<|system|>", "<start_of_turn>")
                  if token in toy.get_vocab())  # fmt: skip
    tags = ["</think>"] if name == "llama3" else ["</think>", "</tool_call>", "</tool_response>"]
    if name == "qwen3_coder":
        tags += ["</function>", "</parameter></function>\n</tool_call>"]
    thought = "</think>" if chat.template.opens_thinking else ""
    end = toy.convert_ids_to_tokens(chat.eos_ids[0])
    for text in ("", header, *tags, f"{tags[-1]}\n{header}", tags[-1] * 2):
        turn = read(chat, toy, f"{thought}{text}{end}")
        assert (turn.calls, turn.answered, turn.well_formed) == ((), True, False), text
    for text in ("4", "</div>", *(f"4{tag}" for tag in tags[1:])):
        assert read(chat, toy, f"{thought}{text}{end}").well_formed, text
    without = make(name, ())
    assert not read(without, toy, f"{thought}{header}{end}").well_formed
    assert read(without, toy, f"{thought}4{end}").well_formed


def test_special_tokens_of_spaces_cost_no_time() -> None:
    """120 spaces are ones and pairs in 10^24 ways: an expression that tries them all does not end."""
    toy = tokenizer(QWEN, (*CHATML, "  "), HERMES_TAGS, eos="<|im_end|>")
    chat = ChatTemplateFormat(toy, len(toy), [toy.eos_token_id], SCHEMAS)
    assert read(chat, toy, f"<|im_start|>{'  ' * 60}4<|im_end|>").well_formed
