"""Nothing shared is computed twice: the forwards are counted."""

from __future__ import annotations

import pytest
import torch
from engine_toys import engine, generate, model, prompts, request, tokenizer

from aepo.rollout.engines.huggingface import engine as huggingface
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.rollout.engines.huggingface.kv_cache import PrefixTree


class Counted:
    """An engine whose model's forwards are counted in tokens, padding left out."""

    def __init__(self) -> None:
        used = model()
        self.engine = HuggingFaceEngine(used, tokenizer(), eos_ids=[])  # every row runs to its limit
        self.tokens = 0
        used.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs) -> None:
        valid = kwargs["past_key_values"]._valid
        self.tokens += kwargs["input_ids"].numel() if valid is None else int(valid.sum())

    def generate(self, *requests):
        before = self.tokens
        results = generate(self.engine, *requests)
        return results, self.tokens - before


def test_samples_of_one_question_compute_the_prompt_once() -> None:
    counted = Counted()
    first, second = prompts(20, 33)
    asked = [request(first, 6, seed=i) for i in range(5)] + [request(second, 6, seed=i) for i in range(3)]
    _, forwards = counted.generate(*asked)
    assert forwards == 20 + 33 + 8 * 5  # the last token of a segment is not fed
    assert counted.engine.counters.prefilled == 20 + 33
    assert counted.engine.counters.asked == 5 * 20 + 3 * 33
    assert counted.engine.counters.generated == 8 * 6


def test_what_all_questions_begin_with_is_computed_once() -> None:
    counted = Counted()
    instructions, *questions = prompts(50, 7, 12, 9)
    asked = [request(instructions + question, 1) for question in [*questions, ()]]
    results, forwards = counted.generate(*asked)
    assert forwards == 50 + 7 + 12 + 9 + 1  # the last one ends where the others begin: its last token, again
    assert counted.engine.counters.prefilled == forwards
    assert counted.engine.counters.asked == 4 * 50 + 7 + 12 + 9
    alone = [Counted().generate(one)[0][0] for one in asked]
    assert [got.token_ids for got in results] == [got.token_ids for got in alone]
    _, forwards = counted.generate(request((*instructions, 1, 2), 1), request((*instructions, 3), 1))
    assert forwards == 3


def test_continuing_computes_the_last_token_and_what_was_read() -> None:
    counted = Counted()
    (prompt,) = prompts(20)
    (got,), _ = counted.generate(request(prompt, 6))
    longer = prompt + got.token_ids + (1, 2, 3)
    _, forwards = counted.generate(request(longer, 4))
    assert forwards == 1 + 3 + 3


def test_branching_and_fresh_paths_compute_one_token_of_the_prefix() -> None:
    counted = Counted()
    (prompt,) = prompts(20)
    (got,), _ = counted.generate(request(prompt, 6))
    longer = prompt + got.token_ids + (1, 2, 3)
    counted.generate(request(longer, 4))
    # The logits after the last token are not kept, so that one is computed again, once for all that ask.
    _, forwards = counted.generate(request(longer, 4, seed=2))
    assert forwards == 1 + 3
    _, forwards = counted.generate(request(longer, 4, seed=3), request(prompt, 4, seed=4), request(prompt, 4, seed=5))
    assert forwards == 2 + 3 * 3


def test_release_and_refresh_forget() -> None:
    counted = Counted()
    (prompt,) = prompts(20)
    for forget in (counted.engine.release, lambda: counted.engine.refresh(1, iter(()))):
        counted.generate(request(prompt, 1))
        forget()
        _, forwards = counted.generate(request(prompt, 1))
        assert forwards == 20
        forget()


def test_prefixes_of_very_different_lengths_do_not_pay_for_each_other() -> None:
    """Padding is at most half of a forward: one prompt of 200 tokens among twenty of 3 must not cost 21 x 200."""
    used = model()
    computed = []
    used.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    asked = [request(tokens, 1) for tokens in prompts(200, *[3] * 20)]
    generate(engine(used), *asked)
    assert sum(computed) <= 2 * (200 + 20 * 3)


def test_a_forward_has_no_more_tokens_than_memory_was_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt that is longer goes alone."""
    monkeypatch.setattr(huggingface, "PREFILL_TOKENS", 64)
    used = model()
    computed = []
    used.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    generate(engine(used), *(request(tokens, 1) for tokens in prompts(70, *[20] * 7)))
    assert computed == [(1, 70), (3, 20), (3, 20), (1, 20)]


def test_longest_prefix_among_samples_that_begin_alike() -> None:
    """Greedy on the first match would stop at the shorter of two children that both match."""
    tree = PrefixTree()
    kv = torch.zeros(1, 2, 1, 1, 1)
    root = tree.longest_prefix([9])
    assert root.end == 0
    prompt = tree.add(root, [1, 2], kv)
    tree.add(prompt, [3], kv)
    longer = tree.add(prompt, [3, 4], kv)
    tail = tree.add(longer, [5], kv)
    assert tree.longest_prefix([1, 2, 3, 4, 5, 6]) is tail
    assert tree.longest_prefix([1, 2, 3, 4, 7]) is longer
    assert tree.longest_prefix([1, 2, 7]) is prompt
    assert tree.longest_prefix([1]) is root
    assert tree.add(prompt, [3, 4], kv) is longer  # the same tokens again: one segment
    assert tree.longest_prefix([1 + 256, 2]) is root  # whole ids are compared, not bytes at any offset
