"""The models and engines of the proofs: a wide vocabulary inside this process, an agent in processes of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from aepo.config import VLLMConfig
from aepo.models.language_model import LanguageModel
from aepo.rollout.engine import Engine, Generation, GenerationRequest
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.engines.vllm.loop_thread import LoopThread

WIDE = 151_936  # the vocabulary of Qwen3
KEPT: list[Any] = []  # an engine in this process that is collected takes process-wide groups of others with it


def wide_model(vocab: int) -> PreTrainedModel:
    """A Qwen3 that is nearly all output layer, random; logits have a standard deviation of about 3."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.35,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def in_process(model: PreTrainedModel, *, records: bool = True, **changes: Any) -> Any:
    """A vllm.LLM in this process over a copy of `model`, for token ids only; records: with EntropyProcessor."""
    import vllm

    ours: dict[str, Any] = {
        "logits_processors": ["aepo.vllm:EntropyProcessor"],
        "worker_extension_cls": "aepo.vllm.EntropyWorkerExtension",
    }
    settings = {
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_batched_tokens": 1024,  # whole prompts in one step
        "max_num_seqs": 64,
        "max_logprobs": -1,
        "kv_cache_memory_bytes": 64 << 20,
        **(ours if records else {}),
        **changes,
    }
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        KEPT.append(vllm.LLM(directory, **settings))
    return KEPT[-1]


def true_entropies(model: PreTrainedModel, tokens: Tensor, first: int, temperature: float) -> Tensor:
    """Entropy [nats] of what follows each of tokens[:, first - 1 : -1], by a float64 `model`. tokens [B, L]."""
    with torch.no_grad():
        hidden = model.get_decoder()(tokens).last_hidden_state[:, first - 1 : -1]
        rows = [entropy(model.lm_head(row) / (temperature or 1.0)) for row in hidden]  # not [B, L, V] at once
    return torch.stack(rows)


def entropy(logits: Tensor) -> Tensor:
    """[..] of [.., V], nats."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


@contextmanager
def launched(agent: LanguageModel, settings: VLLMConfig, prefix_caching: Sequence[bool]) -> Iterator[list[VLLMEngine]]:
    """One engine per entry of `prefix_caching`, each in processes of its own, started at the same time."""
    with tempfile.TemporaryDirectory() as name:
        agent.model.save_pretrained(name)
        agent.tokenizer.save_pretrained(name)
        with ThreadPoolExecutor() as pool:
            starts = [pool.submit(_launch, Path(name), agent.vocab_size, settings, caches) for caches in prefix_caching]
        engines = [start.result() for start in starts]
        try:
            yield engines
        finally:
            for engine in engines:
                engine.close()


def _launch(directory: Path, vocab_size: int, settings: VLLMConfig, prefix_caching: bool) -> VLLMEngine:
    """As aepo.rollout.engines.vllm.start.launch, which has no setting to leave the prefix cache out."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from aepo.rollout.engines.vllm.local import LocalReplica, engine_args

    arguments = dataclasses.replace(engine_args(directory, settings, 0), enable_prefix_caching=prefix_caching)
    loop = LoopThread()

    async def start() -> LocalReplica:
        llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        await llm.update_weight_version("0")
        return LocalReplica("replica 0", llm, [])

    replica = loop.run(start())
    return VLLMEngine([replica], loop, vocab_size=vocab_size, version=0, weights_dir=None)


class Watched:
    """Another engine, and how long requests were running on it. lockstep: all paths wait for the tools of all, as in
    the published code."""

    def __init__(self, engine: Engine, *, lockstep: bool) -> None:
        self.lockstep = lockstep
        self.max_positions = engine.max_positions
        self.busy_seconds = 0.0
        self._engine = engine
        self._running = 0
        self._since = 0.0

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        if self._running == 0:
            self._since = time.perf_counter()
        self._running += 1
        try:
            return await self._engine.generate(requests)
        finally:
            self._running -= 1
            if self._running == 0:
                self.busy_seconds += time.perf_counter() - self._since

    def release(self) -> None:
        self._engine.release()
