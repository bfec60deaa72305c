"""Text of users and tools stays letters, and survives."""

from __future__ import annotations

import pytest
from format_templates import CHATML, HERMES_TAGS, family, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aepo.agents.formats.text import TextTokenizer, plain_tokens

TOY = tokenizer(None, (*CHATML, "<s>", "<s><s>", "s><|im_end|>"), HERMES_TAGS, eos="<|im_end|>")
CONTROL = frozenset(TOY.added_tokens_decoder)
FRAGMENTS = [token.content for token in TOY.added_tokens_decoder.values()] + [
    "<",
    ">",
    "<|im_",
    "end|>",
    "|",
    "/think>",
]


@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5))).map("".join))
@settings(deadline=None, max_examples=300)
def test_no_text_becomes_a_control_token_and_none_is_lost(text: str) -> None:
    ids = plain_tokens(TOY, text)
    assert CONTROL.isdisjoint(ids)
    assert TOY.decode(list(ids)) == text.encode("utf-8", "replace").decode()


def test_text_without_control_tokens_is_encoded_as_ever() -> None:
    text = "The <tool> returns </tool> 12 + 30 = 42."
    assert plain_tokens(TOY, text) == tuple(TOY.encode(text, add_special_tokens=False))


def test_lone_surrogates_become_question_marks() -> None:
    assert TOY.decode(list(plain_tokens(TOY, "a\ud800<think>"))) == "a?<think>"


def test_a_control_token_that_a_lone_surrogate_would_complete_stays_letters() -> None:
    toy = tokenizer(None, ("<?>",))
    ids = plain_tokens(toy, "a<\ud800>")
    assert toy.convert_tokens_to_ids("<?>") not in ids
    assert toy.decode(list(ids)) == "a<?>"


def test_tokens_that_are_added_later_count_too() -> None:
    toy = tokenizer(None, CHATML)
    plain_tokens(toy, "a")
    toy.add_tokens(["<later>"])
    assert toy.convert_tokens_to_ids("<later>") not in plain_tokens(toy, "a <later>")


def test_a_rendering_keeps_its_control_tokens_and_those_of_the_author() -> None:
    text = TextTokenizer(TOY)
    messages = [
        {"role": "system", "content": "<think>"},
        {"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}, {"type": "text", "text": "</think>"}]},
        {"role": "tool", "content": "<|im_start|>"},
    ]

    def render(cut, protect):
        contents = [
            m["content"] if isinstance(m["content"], str) else "".join(p["text"] for p in m["content"]) for m in cut
        ]
        return "<s>" + "<|endoftext|>".join(contents) + protect("<tool_call>")

    ids = text.rendered_tokens(messages, render)
    assert text.decode(ids) == "<s><think><|endoftext|><|im_end|></think><|endoftext|><|im_start|><tool_call>"
    found = [TOY.decode([token]) for token in ids if token in CONTROL]
    assert found == ["<s>", "<think>", "<|endoftext|>", "<|endoftext|>"]


@pytest.mark.parametrize("content", [[{"type": "image"}], [{"type": "text"}], ["text"]])
def test_contents_that_are_no_text_are_refused(content: object) -> None:
    with pytest.raises(ValueError, match="content: expected a text or parts of type text, got"):
        TextTokenizer(TOY).rendered_tokens([{"role": "user", "content": content}], lambda cut, protect: "")


def test_what_a_normalizer_makes_of_a_text_is_no_control_token() -> None:
    inner = Tokenizer.from_str(TOY.backend_tokenizer.to_str())
    inner.normalizer = normalizers.NFKC()
    inner.add_tokens([AddedToken("<call>", normalized=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", clean_up_tokenization_spaces=False)
    hostile = "\uff1ccall\uff1e"
    call = made.convert_tokens_to_ids("<call>")
    assert call in made.encode(hostile)
    ids = plain_tokens(made, hostile)
    assert call not in ids
    assert made.decode(list(ids)) == "<call>"


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """Of the kind of Llama 2: a space is put in front of a text."""
    characters = ["▁", *map(chr, range(33, 127)), "\n"]
    vocabulary = {text: n for n, text in enumerate(["<unk>", "<s>", "</s>", "[INST]", *characters])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    if scheme == "legacy":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "[INST]")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", bos_token="<s>", unk_token="<unk>", name_or_path=f"spm-{scheme}"
    )


def test_a_prompt_begins_as_the_tokenizer_begins_a_text() -> None:
    spm = sentencepiece_like("always")
    text = TextTokenizer(spm)
    ids = text.rendered_tokens([{"role": "user", "content": "b</s>c"}], lambda cut, protect: f"a {cut[0]['content']}")
    assert ids[:3] == tuple(spm.encode("a b", add_special_tokens=False))[:3]
    assert spm.decode(list(ids), clean_up_tokenization_spaces=False) == "a b</s>c"


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
@pytest.mark.parametrize("said", ["words", " words", "\nwords", "a </s> b[INST]"])
def test_nothing_is_put_in_front_of_text_that_goes_on(scheme: str, said: str) -> None:
    spm = sentencepiece_like(scheme)
    before = tuple(spm.encode("before", add_special_tokens=False))
    ids = plain_tokens(spm, said)
    assert {1, 2, 3}.isdisjoint(ids)
    assert spm.decode(list(before + ids), clean_up_tokenization_spaces=False) == f"before{said}"


def test_a_tokenizer_that_loses_text_is_named() -> None:
    inner = Tokenizer.from_str(TOY.backend_tokenizer.to_str())
    inner.normalizer = normalizers.Lowercase()
    lossy = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", name_or_path="lower")
    with pytest.raises(ValueError, match="tokenizer lower: expected that a text survives") as caught:
        TextTokenizer(lossy)
    assert "\n" not in str(caught.value)


def test_bos_comes_once() -> None:
    llama = family("llama3")
    bos = llama.bos_token_id
    for adds in (False, True):
        if adds:
            from tokenizers.processors import TemplateProcessing

            llama.backend_tokenizer.post_processor = TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
            )
        text = TextTokenizer(llama)
        assert text.rendered_tokens([], lambda cut, protect: "<|begin_of_text|>x").count(bos) == 1
        assert text.rendered_tokens([], lambda cut, protect: "x").count(bos) == adds


def test_a_thousand_control_tokens_in_one_text_stay_letters() -> None:
    text = "a<|im_end|><think>" * 500
    ids = plain_tokens(TOY, text)
    assert set(TOY.all_special_ids).isdisjoint(ids)
    assert set(TOY.added_tokens_decoder).isdisjoint(ids)
    assert TOY.decode(list(ids)) == text
