"""The Hugging Face engine against the model itself: exact log-probs and entropies, greedy text, independence of rows.

float64 models, so a wrong mask, position or cache cell cannot hide. What is left are transformers' own float32 steps
(rotary angles, normalisation): 2e-6 is ten times the difference that they make here.
"""

from __future__ import annotations

import asyncio

import pytest
import torch
from engine_toys import (
    EOS,
    EXACT,
    UNUSED,
    VOCAB,
    assert_is_the_models_own,
    engine,
    generate,
    model,
    own_logits,
    prompts,
    request,
    tokenizer,
)
from transformers import MistralConfig, MistralForCausalLM

from aepo.rollout.engine import Generation, GenerationRequest
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo_kernels.reference.sample_with_entropy import gumbel_noise


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 2e-5)])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_logprobs_and_entropies_are_exact(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """Prefixes of many lengths, rows that end at different steps, continued and branched segments."""
    used = model(family, dtype)
    served = engine(used)
    temperatures = [1.0, 0.6, 1.7]
    wave = [
        request(tokens, 3 + 2 * i, seed=i, temperature=temperatures[i % 3])
        for i, tokens in enumerate([*prompts(1, 7, 30, 2, 19), *prompts(30, seed=1) * 3])
    ]
    for _ in range(3):
        results = generate(served, *wave)
        for asked, got in zip(wave, results, strict=True):
            assert_is_the_models_own(used, asked, got, tolerance)
        continued = [
            request(asked.token_ids + got.token_ids + tokens, 9 - i, seed=asked.seed + 100)
            for i, (asked, got, tokens) in enumerate(zip(wave, results, prompts(5, 1, 9, 2, 3, 5, 1, 30), strict=True))
        ]
        wave = [*continued, *(request(asked.token_ids, 4, seed=asked.seed + 200) for asked in continued[:3])]
        wave = wave[:8]


def test_scores_are_scaled_as_the_model_says() -> None:
    """Not by the root of the head's size, which is what attention does when it is not told: Granite, Gemma."""
    used = model()
    for layer in used.model.layers:
        layer.self_attn.scaling = 0.9
    wave = [request(tokens, 5, seed=i) for i, tokens in enumerate(prompts(7, 30, 7))]
    for asked, got in zip(wave, generate(engine(used), *wave), strict=True):
        assert_is_the_models_own(used, asked, got)


def test_logprobs_of_a_bfloat16_model_are_those_of_its_logits_in_float32() -> None:
    """Kept in bfloat16 they would be off by up to 0.016 nats at 5."""
    used = model(dtype=torch.bfloat16)
    logits: list[torch.Tensor] = []
    used.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[0, -1].double()))
    [got] = generate(engine(used), request(prompts(7)[0], 12))
    logprobs = torch.stack(logits).log_softmax(-1)
    taken = logprobs.gather(1, torch.tensor(got.token_ids)[:, None])[:, 0]
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(torch.tensor(got.logprobs, dtype=torch.float64), taken, rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.tensor(got.entropies, dtype=torch.float64), entropies, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_greedy_is_models_generate(family: str) -> None:
    used = model(family).eval()
    asked = [request(tokens, 25, temperature=0.0) for tokens in prompts(1, 8, 20)]
    for one, got in zip(asked, generate(engine(used), *asked), strict=True):
        tokens = torch.tensor([one.token_ids])
        expected = used.generate(
            tokens, max_new_tokens=25, do_sample=False, pad_token_id=0, attention_mask=tokens * 0 + 1
        )
        assert list(got.token_ids) == expected[0, tokens.shape[1] :].tolist()
        assert_is_the_models_own(used, one, got)  # at temperature 1


def same(a: Generation, b: Generation) -> bool:
    """Rows of other shapes are summed in another order, so the last bits may differ."""
    return (
        a.token_ids == b.token_ids
        and a.finish_reason == b.finish_reason
        and bool(torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-6))
    )


def test_batching_prefix_sharing_and_order_do_not_change_results() -> None:
    used = model()
    first, second = prompts(17, 5)
    asked = [request(first, 15, seed=i) for i in range(4)] + [request(second, 8, seed=9), request(second, 15, seed=10)]
    together = generate(engine(used), *asked)
    backwards = generate(engine(used), *asked[::-1])[::-1]
    served = engine(used)  # one after the other: each finds the prefix that the one before has left
    alone = [generate(served, one)[0] for one in asked]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert same(one, other)
        assert same(one, third)
    assert len({got.token_ids for got in together}) == 6  # different seeds


def test_same_calls_same_bits() -> None:
    used = model(dtype=torch.float32)
    asked = [request(tokens, 15, seed=i) for i, tokens in enumerate(prompts(17, 5, 17))]
    assert generate(engine(used), *asked) == generate(engine(used), *asked)


def test_tokens_are_those_of_the_reference_rule() -> None:
    """argmax of z + Gumbel noise of (seed, output position), whatever row a request is in: rows leave at most steps,
    others move into their places, and every row has its own seed, also beyond 63 bits, and temperature."""
    used = model()
    seeds, temperatures = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0xE220A8397B1DCDAF], [1.0, 0.6, 0.0, 1.7]
    asked = [
        request(tokens, 2 + i % 9, seed=seeds[i % 6], temperature=temperatures[i % 4])
        for i, tokens in enumerate([*prompts(17, 5, 9, 30), *prompts(12) * 8])
    ]
    for one, got in zip(asked, generate(engine(used), *asked), strict=True):
        positions = torch.arange(len(got.token_ids))
        signed = one.seed - 2**64 if one.seed >= 2**63 else one.seed
        score = own_logits(used, one, got) / (one.temperature or 1.0)
        if one.temperature:
            score += gumbel_noise(torch.full_like(positions, signed), positions, VOCAB)
        assert list(got.token_ids) == score.argmax(dim=-1).tolist()


def test_tokens_follow_the_models_distribution() -> None:
    """600 draws of the first token at temperature 0.5 against its probabilities."""
    used = model()
    (prompt,) = prompts(6)
    drawn = [got.token_ids[0] for got in generate(engine(used), *(request(prompt, 1, i, 0.5) for i in range(600)))]
    with torch.no_grad():
        probabilities = torch.softmax(used(torch.tensor([prompt])).logits[0, -1].double() / 0.5, dim=-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    likely = probabilities > 5 / 600
    chi_square = ((counts - 600 * probabilities) ** 2 / (600 * probabilities))[likely].sum()
    assert likely.sum() > 10
    degrees = float(likely.sum())
    assert chi_square < degrees + 3 * (2 * degrees) ** 0.5


def test_model_is_left_as_it_was() -> None:
    used = model().train()
    before = used.config._attn_implementation
    training: list[bool] = []
    used.register_forward_hook(lambda module, *_: training.append(module.training))
    generate(engine(used), request([1, 2, 3]))
    assert set(training) == {False}, "without dropout"
    assert used.training
    assert used.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in used.parameters())
    used(torch.tensor([[1, 2, 3]])).logits.sum().backward()  # nothing of it is an inference tensor now
    with pytest.raises(ValueError, match="token_ids is empty"):
        generate(engine(used), request([]))
    assert used.training


def test_version_is_reported_and_refresh_drops_what_old_weights_computed() -> None:
    used = model()
    served = engine(used, version=4)
    asked = request(prompts(20)[0])
    assert generate(served, asked)[0].version == 4
    with torch.no_grad():
        for parameter in used.parameters():
            parameter.mul_(1.1)
    served.refresh(5, iter(()))
    got = generate(served, asked)[0]
    assert got.version == 5
    assert_is_the_models_own(used, asked, got)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request([]), "token_ids is empty"),
        (request([1], new=0), "max_new_tokens = 0"),
        (request([1], temperature=-1.0), "temperature = -1.0"),
        (request([1], temperature=float("nan")), "temperature = nan"),
        (request([1], temperature=float("inf")), "temperature = inf, expected >= 0 and finite"),
        (request([1], seed=-1), "seed = -1, expected an unsigned 64-bit integer"),
        (request([1], seed=2**64), "seed = 18446744073709551616"),
        (request([1], stop=("",)), "empty stop string"),
        (request([1] * 250, new=7), "250 tokens . 7 new ones, but the model has 256 positions"),
        (request([VOCAB]), "token ids 260..260, expected 0..259"),
        (request([-1]), "token ids -1..-1"),
    ],
)
def test_bad_requests_are_named(bad: GenerationRequest, message: str) -> None:
    with pytest.raises(ValueError, match=rf"requests\[1\]: .*{message}"):
        generate(engine(), request([1]), bad)


def test_no_requests() -> None:
    assert generate(engine()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_reported(value: float) -> None:
    used = model()
    with torch.no_grad():
        used.lm_head.weight[3] = value
    with pytest.raises(FloatingPointError, match=r"output position 0 of requests\[0\] .weights version 7."):
        generate(engine(used, version=7), request([1, 2]))


def test_a_row_that_breaks_on_the_way_is_named_and_goes_on_with_a_token() -> None:
    """A token that one request writes has an embedding of NaN. Nothing after it is an index below 0: the model would
    raise another error, and the stop table would take the row for ended, because its last token is end of text."""
    used, limits = model(), [3, 9, 9, 6]
    served = HuggingFaceEngine(used, tokenizer(), eos_ids=[UNUSED])
    asked = [request(*each) for each in zip(prompts(5, 8, 13, 3), limits, range(4), strict=True)]
    written = [got.token_ids for got in generate(served, *asked)]
    everything = [token for tokens in [*written, *(one.token_ids for one in asked)] for token in tokens]
    position, poison = next((i, t) for i, t in enumerate(written[2][1:], 1) if everything.count(t) == 1)
    assert position < 7
    with torch.no_grad():
        used.model.embed_tokens.weight[poison] = torch.nan
    served.refresh(3, iter(()))
    rows = []
    used.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    with pytest.raises(
        FloatingPointError, match=rf"output position {position + 1} of requests\[2\] .weights version 3."
    ):
        generate(served, *asked)
    assert rows[-8:] == [sum(new > step for new in limits) for step in range(1, 9)]


def test_models_that_do_not_attend_to_the_whole_past_are_refused() -> None:
    sliding = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding_attention"):
        engine(model(layer_types=sliding, use_sliding_window=True, sliding_window=4))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    mistral = MistralForCausalLM(MistralConfig(vocab_size=VOCAB, sliding_window=4, num_key_value_heads=2, **sizes))
    with pytest.raises(ValueError, match="sliding_window"):
        generate(engine(mistral), request([1, 2]))


def test_cancelling_takes_effect_between_tokens() -> None:
    used = model().train()

    async def cancelled() -> None:
        work = asyncio.ensure_future(engine(used).generate([request([1], new=250)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cancelled())
    assert used.training


def test_padded_vocabulary_and_end_of_text() -> None:
    """A token beyond the tokenizer ends nothing; an end-of-text token is kept and ends the row."""
    used = model()
    with torch.no_grad():
        used.lm_head.weight[UNUSED] *= 3.0
        used.lm_head.weight[EOS] *= 3.0
    results = generate(engine(used), *(request([5], 40, seed, stop=("no such text>",)) for seed in range(30)))
    assert any(UNUSED in got.token_ids for got in results)
    ended = [got for got in results if got.finish_reason == "eos"]
    assert ended
    for got in results:
        assert got.token_ids.count(EOS) == (got.finish_reason == "eos")
        assert got.finish_reason == "length" or got.token_ids[-1] == EOS
