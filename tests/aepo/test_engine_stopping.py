"""Stop strings that span tokens, are one token or lie inside one; and the noise that tokens are drawn with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engine_toys import EOS, GLUED, TAG, VOCAB, engine, generate, model, prompts, request, tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from aepo.rollout.engines.huggingface import HuggingFaceEngine
from aepo.rollout.engines.sampling import draw, uniform_noise
from aepo.rollout.engines.stopping import IS_EOS, MAY_COMPLETE, StopRules

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


def test_noise_is_splitmix64_at_any_index() -> None:
    """The first outputs for seeds 0 and 1234567, as published with the generator."""
    published = np.array(
        [[0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], [6457827717110365317, 3203168211198807973]], dtype=np.uint64
    )
    expected = (published >> np.uint64(12)).astype(np.float64) / 2.0**52
    assert uniform_noise([0, 1234567], 2).tolist() == expected.tolist()
    assert torch.equal(uniform_noise([7, 2**64 - 1], 50)[:, :9], uniform_noise([7, 2**64 - 1], 9))


def test_noise_is_uniform_and_unrelated_between_seeds_and_positions() -> None:
    noise = uniform_noise(range(400), 400)
    assert 0 <= float(noise.min()) <= float(noise.max()) < 1
    centred = noise - 0.5
    # Means and lag products of n independent draws: standard errors sqrt(1 / 12 n) and sqrt(1 / 144 n); 4 of them.
    n = noise.numel()
    assert abs(float(centred.mean())) < 4 / math.sqrt(12 * n)
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 4 / math.sqrt(144 * n)
    assert abs(float((centred[:, 1:] * centred[:, :-1]).mean())) < 4 / math.sqrt(144 * n)


def test_draw_inverts_the_distribution_function() -> None:
    """N evenly spaced uniforms give every token N p times, up to the one at each edge."""
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -3.0])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(draw(logits.expand(10_000, 5), uniforms), minlength=5)
    expected = 10_000 * torch.softmax(logits, dim=0)
    assert (counts - expected).abs().max() <= 1
    assert counts[1] == 0


def test_draw_reaches_both_ends() -> None:
    last, top = 1 - 2.0**-52, torch.tensor([[0.0] * 1000 + [-torch.inf]])
    assert draw(top, torch.tensor([0.0], dtype=torch.float64)).item() == 0
    assert draw(top, torch.tensor([last], dtype=torch.float64)).item() == 999  # never the token of weight 0,
    assert draw(top.flip(1), torch.tensor([0.0], dtype=torch.float64)).item() == 1  # at neither end
    # A token with p = 2e-9 behind 150,000 others: in float32 their sum rounds to 1 and it is never drawn.
    logits = torch.zeros(1, 150_001)
    logits[0, -1] = math.log(150_000 * 2e-9)
    assert draw(logits, torch.tensor([1 - 1e-9], dtype=torch.float64)).item() == 150_000
