"""Where a text ends if one step of speculative decoding brings several tokens: behind the token that completes the
first stop string, and nowhere later, in tokens, log-probs and entropies alike."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from aepo.rollout.engines.vllm.replica import finish_reason, sampling_settings
from aepo.vllm import fetch_entropies
from tests.aepo.engine_toys import EOS, prompts, request, tokenizer
from tests.integrations.conftest import make_llm
from tests.integrations.toys import generate

DRAFTED = 3


@pytest.fixture(scope="module")
def llm(model_dir):
    """The draft is the model itself: greedy, every step brings all of its tokens."""
    speculation = {"method": "draft_model", "model": model_dir, "num_speculative_tokens": DRAFTED}
    return make_llm(model_dir, "v2", speculative_config=speculation)


def run(llm, prompt, key, stop=(), eos=(EOS,)):
    asked = request(prompt, 24, temperature=0.0, stop=stop)
    sampling = SamplingParams(**sampling_settings(asked, eos), extra_args={"aepo_key": key})
    done = generate(llm, [prompt], [sampling])[0]
    return done, fetch_entropies(llm, {key: len(done.token_ids)})[key]


def test_nothing_is_left_behind_a_stop_string(llm):
    read, in_the_middle = tokenizer(), 0
    for prompt in prompts(*range(3, 15), seed=3):
        whole, entropies = run(llm, prompt, "whole", eos=())
        texts = [read.decode(whole.token_ids[:length]) for length in range(25)]
        for end in range(1, 25):
            character, later = texts[end][-1:], read.decode(whole.token_ids[end : end + 1])
            if not character.isascii() or not character.isprintable() or character in texts[end - 1]:
                continue
            # The other stop string comes later, in the same step as a rule; the order of the two does not count.
            stop = (later, character) if later.isascii() and later.isprintable() and later else (character,)
            first = next(length for length in range(25) if any(one in texts[length] for one in stop))
            done, cut = run(llm, prompt, "cut", stop)
            assert list(done.token_ids) == list(whole.token_ids[:first])
            assert len(done.logprobs) == first
            assert cut == pytest.approx(entropies[:first], abs=1e-5)
            assert finish_reason(done.finish_reason, done.stop_reason) == "stop"
            in_the_middle += first % (DRAFTED + 1) != 1  # the first step brings one token
    assert in_the_middle > 3


def test_a_token_that_ends_the_text_is_the_last(llm):
    prompt = prompts(9, seed=3)[0]
    asked = request(prompt, 24, temperature=0.0)
    whole = generate(llm, [prompt], [SamplingParams(**sampling_settings(asked, ()))])[0].token_ids
    for end in range(1, 12):
        token = whole[end - 1]
        first = list(whole).index(token) + 1
        done = generate(llm, [prompt], [SamplingParams(**sampling_settings(asked, (token,)))])[0]
        assert list(done.token_ids) == list(whole[:first])
        assert len(done.logprobs) == first
        assert finish_reason(done.finish_reason, done.stop_reason) == "eos"
