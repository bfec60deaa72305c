"""Tiny random models and a byte-level tokenizer, for tests of the real engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from aepo.parallel import OneProcess, Weights
from aepo.rollout.engine import Generation, GenerationRequest
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine

VOCAB = 260  # 256 bytes, then:
EOS, TAG, GLUED = 256, 257, 258  # end of text, "</search>" as one token, a stop string with text around it
UNUSED = 259  # an embedding that the tokenizer does not know, as in padded vocabularies

# float64 models against themselves: transformers' own float32 steps (rotary angles, normalisation) differ by 2e-7.
EXACT = 2e-6


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["x</s>y"] = GLUED
    inner = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": EOS, "</search>": TAG}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<eos>", "</search>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def model(family: str = "qwen3", dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    """Three layers, grouped-query attention, weights large enough that entropies differ from token to token."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "eos_token_id": EOS,
        "bos_token_id": None,
        **changes,
    }
    made = Qwen3(Qwen3Config(**sizes)) if family == "qwen3" else LlamaForCausalLM(LlamaConfig(**sizes))
    return made.to(dtype)


def engine(of: PreTrainedModel | None = None, version: int = 0) -> HuggingFaceEngine:
    return HuggingFaceEngine(of if of is not None else model(), tokenizer(), [EOS], version)


def request(
    tokens: Sequence[int], new: int = 12, seed: int = 1, temperature: float = 1.0, stop: tuple[str, ...] = ()
) -> GenerationRequest:
    return GenerationRequest(tuple(tokens), new, temperature, seed, stop)


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 256, (length,), generator=draw).tolist()) for length in lengths]


def weights_of(model: torch.nn.Module) -> Weights:
    """As an engine may get them: each is gone when the next one comes."""
    for names, tensor in OneProcess().full_weights(model):  # type: ignore[arg-type]
        one = tensor.clone()
        yield names, one
        one.fill_(math.nan)


def generate(engine: HuggingFaceEngine, *requests: GenerationRequest) -> list[Generation]:
    return asyncio.run(engine.generate(requests))


def own_logits(made_by: PreTrainedModel, asked: GenerationRequest, got: Generation) -> Tensor:
    """float64 [generated, V] behind each token: of one uncached forward over the whole sequence."""
    tokens = torch.tensor([asked.token_ids + got.token_ids])
    with torch.no_grad():
        return made_by(input_ids=tokens, use_cache=False).logits[0, len(asked.token_ids) - 1 : -1].double()


def assert_is_the_models_own(
    made_by: PreTrainedModel, asked: GenerationRequest, got: Generation, tolerance: float = EXACT
) -> None:
    """Log-probs and entropies against the model's logits, in float64."""
    logprobs = torch.log_softmax(own_logits(made_by, asked, got) / (asked.temperature or 1.0), dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(dim=-1)
    taken = logprobs.gather(1, torch.tensor(got.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got.logprobs, dtype=torch.float64), taken, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.tensor(got.entropies, dtype=torch.float64), entropies, rtol=0, atol=tolerance)
