"""The text of every token, in linear time and as whole prefixes say it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aepo.agents.tasks.facts.warmstart import untrained
from aepo.config import WarmStartConfig
from aepo.run.saved_trees import token_texts

Decode = Callable[[Sequence[int]], str]
ALPHABET = "aé漢字🙂👩‍👩‍👧 .,'n\n ß\u0301한국어\ufffd"


def by_prefixes(token_ids: Sequence[int], decode: Decode) -> list[str]:
    pieces, done = [], ""
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[:end])
        if text.endswith("\ufffd") and end < len(token_ids):
            text = done
        pieces.append(text[len(done) :])
        done = text
    return pieces


def byte_level() -> Tokenizer:
    """A token for each byte, as GPT-2, Qwen and SmolLM2 begin, and some for several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ã", "©"), ("n", "n"), ("ð", "Ł")]
    vocabulary = {text: i for i, text in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Words with a mark for the space, and bytes for what is not known, as Llama 2 and Gemma have it."""
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"an.,é漢'", "▁a", "an"]
    vocabulary = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("a", "n")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_it_is_what_whole_prefixes_say(make: Callable[[], Tokenizer]) -> None:
    tokenizer, draw = make(), random.Random(0)
    decode: Decode = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)  # noqa: E731
    for _ in range(200):
        text = "".join(draw.choices(ALPHABET, k=draw.randint(0, 120)))
        ids = tokenizer.encode(text).ids
        pieces = token_texts(ids, decode)
        assert pieces == by_prefixes(ids, decode)
        assert "".join(pieces) == decode(ids)
        assert len(pieces) == len(ids)


def test_bytes_that_are_no_text() -> None:
    tokenizer, draw = byte_level(), random.Random(0)
    for k in range(100):
        ids = [draw.randrange(256) for _ in range(draw.randint(1, 200))]
        if k % 2:
            ids = [*ids[:50], *(tokenizer.token_to_id("Ĥ") for _ in range(draw.randint(1, 100))), *ids[50:]]
        assert token_texts(ids, tokenizer.decode) == by_prefixes(ids, tokenizer.decode)


def test_the_tiny_model() -> None:
    tokenizer = untrained(WarmStartConfig(steps=0)).tokenizer
    text = "<search> capital of Peru</search><result> Peru: Lima is the capital of Peru.</result>\n" * 5
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert token_texts(ids, tokenizer.decode) == by_prefixes(ids, tokenizer.decode)


@pytest.mark.parametrize("text", ["a漢 n.", "\x82"])
def test_time_is_linear(text: str) -> None:
    tokenizer = byte_level()
    ids = [tokenizer.token_to_id("Ĥ")] if text == "\x82" else tokenizer.encode(text).ids
    decoded = 0

    def decode(part: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(part)
        return tokenizer.decode(list(part))

    ids = (ids * 8000)[:8000]
    start = time.perf_counter()
    assert "".join(token_texts(ids, decode)) == tokenizer.decode(ids)
    assert decoded < 100 * len(ids), "whole prefixes decode 4,000 tokens for each"
    assert time.perf_counter() - start < 30
