"""An agent without a mind: a small random model over bytes that calls a tool every few tokens, for as long as it may.

No two of its segments are alike, so the text of a call stands for the path and the step that made it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from aepo.models.language_model import LanguageModel
from aepo.rollout.seeding import derive_seed, derive_uniform
from aepo.types import Message, Question, TokenIds, ToolCall, ToolResult, Turn

TAG = "</search>"
LONGEST = 10.0  # seconds after which a tool is given up on, as the toolbox does


def random_agent() -> LanguageModel:
    """Vocabulary: 256 bytes and the closing tag, whose logit varies 2.5 times as much as others, so that it is the
    likeliest token now and then, after 14 others on average."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={**{byte: i for i, byte in enumerate(alphabet)}, TAG: 256}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([TAG])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.15,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[256] *= 2.5
    return LanguageModel(model, PreTrainedTokenizerFast(tokenizer_object=inner))


def questions(count: int, series: str = "") -> list[Question]:
    """About 180 bytes each. No prefix of one series is one of another, so caches cannot pass anything on."""
    return [
        Question(f"q{i}", f"{series} Question {i} of {count}: " + "what else is there to be known? " * 5, "", "random")
        for i in range(count)
    ]


class RandomFormat:
    """A segment that ends with the closing tag is a call, all of it; nothing is an answer."""

    stop_strings = (TAG,)

    def __init__(self, language_model: LanguageModel) -> None:
        self.vocab_size = language_model.vocab_size
        self._tokenizer = language_model.tokenizer

    def prompt_tokens(self, messages: Sequence[Message]) -> TokenIds:
        return self._encode(f"{messages[-1]['content']}\n")

    def read(self, token_ids: Sequence[int], finish_reason: str, *, before: Sequence[int] | None = None) -> Turn:
        text = self._tokenizer.decode(token_ids)
        return Turn(text, text, (ToolCall("search", {"query": text}),) if TAG in text else ())

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        return self._encode(f"<result> {results[0].text}</result>\n")

    def _encode(self, text: str) -> TokenIds:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


class RandomPlayer:
    """What a sampler needs beside the engine."""

    def __init__(self, language_model: LanguageModel, tools: Search) -> None:
        self.format = RandomFormat(language_model)
        self.stateless = tools

    def prompt_tokens(self, question: Question, observation: str | None = None) -> TokenIds:
        return self.format.prompt_tokens(question.messages)

    async def open(self, question: Question) -> Search:
        return self.stateless


class Search:
    """Answers every call with 24 digits that depend on the call, after a delay that does, too: lognormal with this
    median and this 95th percentile [seconds], 0 for none. Who else calls, and when, changes nothing."""

    observation = None

    def __init__(self, median: float = 0.0, p95: float = 0.0, seed: int = 0) -> None:
        self.seconds = 0.0  # of all calls
        self._median, self._p95, self._seed = median, p95, seed

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return list(await asyncio.gather(*(self._answer(call) for call in calls)))

    async def _answer(self, call: ToolCall) -> ToolResult:
        argument = call.arguments["query"]
        delay = self.delay(argument)
        self.seconds += delay
        await asyncio.sleep(delay)
        return ToolResult(f"{derive_seed('answer', argument):024d}", None, delay)

    async def branch(self, turns: int) -> Search:
        return self

    def forget(self, turns: int) -> None:
        """There is no state."""

    async def reward(self) -> None:
        """There is none."""

    async def close(self) -> None:
        """Nothing is held."""

    def delay(self, argument: str) -> float:
        """Seconds."""
        if not self._median:
            return 0.0
        normal = NormalDist()
        sigma = math.log(self._p95 / self._median) / normal.inv_cdf(0.95)
        draw = normal.inv_cdf(max(derive_uniform(self._seed, argument), 1e-9))
        return min(self._median * math.exp(sigma * draw), LONGEST)
