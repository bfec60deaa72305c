"""Stop strings that span tokens, are one token or lie inside one."""

from __future__ import annotations

import pytest
import torch
from engine_toys import EOS, GLUED, TAG, VOCAB, engine, generate, model, prompts, request, tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.rollout.engines.huggingface.stopping import IS_EOS, MAY_COMPLETE, StopRules

STOP = ("</search>", "</s>")


def first_stop(tokens: list[int], stop: tuple[str, ...] = STOP) -> tuple[int, str] | None:
    """How many tokens are written, and why, if the model writes `tokens`."""
    rules = StopRules(tokenizer(), VOCAB, [EOS], torch.device("cpu"))
    flags = rules.table(stop).tolist()
    for end in range(1, len(tokens) + 1):
        flag = flags[tokens[end - 1]]
        if flag and (reason := rules.reason(flag, tokens[:end], stop)):
            return end, reason
    return None


def byte_tokens(text: str) -> list[int]:
    """Byte by byte, also where the tokenizer has a special token for it."""
    vocabulary = tokenizer().get_vocab()
    return [vocabulary[tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(c)[0][0]] for c in text]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (byte_tokens("a</search>bc"), (10, "stop")),  # one token per character
        ([*byte_tokens("a"), TAG, *byte_tokens("b")], (2, "stop")),  # a special token
        ([*byte_tokens("a"), GLUED, *byte_tokens("b")], (2, "stop")),  # inside a token
        (byte_tokens("a > b </searc> </ search>"), None),  # only the last character
        (byte_tokens("</search"), None),
        ([*byte_tokens("a</s>"), EOS], (5, "stop")),
        ([*byte_tokens("a</s"), EOS, *byte_tokens(">")], (5, "eos")),
        ([*byte_tokens("x" * 300), TAG], (301, "stop")),  # far from the start
        ([EOS], (1, "eos")),
    ],
)
def test_where_a_row_ends(tokens: list[int], expected: tuple[int, str] | None) -> None:
    assert first_stop(tokens) == expected


def test_stop_string_that_ends_with_a_character_of_several_bytes() -> None:
    """Its last byte alone is no readable text, so the table has to look at unreadable tokens too."""
    vocabulary = tokenizer().get_vocab()
    encoded = tokenizer()("né")["input_ids"]
    assert len(encoded) == 3
    assert set(encoded) <= set(vocabulary.values())
    assert first_stop([*encoded, *encoded], ("né",)) == (3, "stop")


def test_stop_string_of_characters_of_several_bytes() -> None:
    """More tokens than characters: each may hold one byte."""
    encoded = tokenizer()("né€é")["input_ids"]
    assert len(encoded) == 8
    assert first_stop([*byte_tokens("x"), *encoded], ("né€é",)) == (9, "stop")


def test_stop_string_that_begins_with_a_space_which_decoders_drop() -> None:
    """At the beginning of what they are given, as those of Llama 2 do."""
    inner = Tokenizer(models.BPE(vocab={"\u2581": 0, "a": 1, "x": 2}, merges=[]))
    inner.decoder = decoders.Metaspace()
    rules = StopRules(PreTrainedTokenizerFast(tokenizer_object=inner), 3, [], torch.device("cpu"))
    assert inner.decode([0, 1]) == "a"
    assert rules.reason(MAY_COMPLETE, [2, 0, 1], (" a",)) == "stop"


def test_every_end_of_text_counts() -> None:
    rules = StopRules(tokenizer(), VOCAB, [EOS, 65, 3], torch.device("cpu"))
    for stop in ((), STOP):
        assert [int(i) for i in (rules.table(stop) == IS_EOS).nonzero()] == [3, 65, EOS]


def test_only_tokens_that_can_complete_a_stop_string_are_looked_at() -> None:
    rules = StopRules(tokenizer(), VOCAB, [EOS], torch.device("cpu"))
    table = rules.table(STOP)
    assert table.shape == (VOCAB,)
    assert table[EOS] == IS_EOS
    assert {int(i) for i in (table == MAY_COMPLETE).nonzero()} == {byte_tokens(">")[0], TAG, GLUED}
    assert int((rules.table([]) > 0).sum()) == 1  # end of text


def words() -> PreTrainedTokenizerFast:
    """Every token is two letters, so that whatever a random model writes can be read."""
    vocabulary = {f"{chr(97 + i // 26)}{chr(97 + i % 26)}": i for i in range(VOCAB)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(("first", "last"), [(8, 15), (19, 21), (0, 5), (30, 31)])
def test_engine_stops_where_its_own_text_completes_a_string(first: int, last: int) -> None:
    """The stop string is characters first..last of what the model writes anyway; each token has two of them."""
    served = HuggingFaceEngine(model(), words(), eos_ids=[])
    (prompt,) = prompts(9)
    free = generate(served, request(prompt, 20))[0]
    text = words().decode(free.token_ids)
    assert len(text) == 40
    stop = text[first:last]
    written = -(-(text.index(stop) + len(stop)) // 2)
    stopped, other = generate(served, request(prompt, 20, stop=("no such text", stop)), request(prompt, 20))
    assert stopped.token_ids == free.token_ids[:written]
    assert (stopped.finish_reason, other.finish_reason) == ("stop", "length")
    assert other.token_ids == free.token_ids


def test_stop_strings_in_the_prefix_do_not_count() -> None:
    got = generate(engine(), request([*byte_tokens("a</s"), TAG], 5, stop=STOP))[0]
    assert len(got.token_ids) == 5
