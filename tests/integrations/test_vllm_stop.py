"""Where a text ends if one step of speculative decoding brings several tokens: behind the token that completes the
first stop string, and nowhere later, in tokens, log-probs and entropies alike."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from aepo.rollout.engines.vllm import finish_reason, sampling_settings
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


def test_nothing_is_left_behind_a_stop_string(llm):
    read = tokenizer()
    prompt = prompts(9, seed=3)[0]

    def run(stop, eos, key):
        asked = request(prompt, 24, temperature=0.0, stop=stop)
        sampling = SamplingParams(**sampling_settings(asked, eos), extra_args={"aepo_key": key})
        return generate(llm, [prompt], [sampling])[0]

    whole = run((), (), "whole")
    entropies = fetch_entropies(llm, {"whole": 24})["whole"]
    texts = [read.decode(whole.token_ids[:length]) for length in range(25)]
    tried = 0
    for end in range(1, 25):
        character = texts[end][-1:]
        if not character.isprintable() or character == "\ufffd" or character in texts[end - 1]:
            continue
        # Another stop string comes later in the same step; the order of the two does not count.
        later = read.decode(whole.token_ids[end : end + 1])
        both = (later, character) if later.isprintable() and later != "\ufffd" else (character,)
        for stop in {(character,), both}:
            first = min(length for length in range(25) if any(one in texts[length] for one in stop))
            key = f"{end} {stop}"
            done = run(stop, (EOS,), key)
            assert list(done.token_ids) == list(whole.token_ids[:first])
            assert len(done.logprobs) == first
            assert fetch_entropies(llm, {key: first})[key] == pytest.approx(entropies[:first], abs=1e-5)
            assert finish_reason(done.finish_reason, done.stop_reason) == "stop"
            tried += first % (DRAFTED + 1) != 0
    assert tried > 3, "too few in the middle of a step"


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
