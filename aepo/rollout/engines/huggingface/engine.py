"""Batched generation with any transformers causal language model whose layers attend to the whole past.

It runs the trainer's own module, so there are no weights to copy. One call generates one segment for every request:

1. Each distinct prefix is computed once, from the longest part of it that an earlier call of this rollout has computed.
2. All rows decode together, one token per step; rows that have ended leave the batch.

Token, log-prob and entropy come out of one read of the logits, over the whole vocabulary
(`aepo_kernels.sample_with_entropy`, its seed the request's and its offset the output position).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from aepo.models.key_values import KeyValueShape
from aepo.parallel import Weights
from aepo.rollout.engine import EngineCounters, Generation, GenerationRequest, check_request
from aepo.rollout.engines.huggingface.kv_cache import BatchCache, PrefixTree
from aepo.rollout.engines.huggingface.stopping import StopRules
from aepo.rollout.engines.huggingface.wave import Prefix, Wave
from aepo.types import TokenIds

ATTENTION = "aepo_rollout"
PREFILL_TOKENS = 8192  # per forward, padding included: bounds the memory of activations
SHARED_TOKENS = 32  # a common beginning shorter than this is not worth a forward of its own


class HuggingFaceEngine:
    """`Engine` over a transformers model that stays where it is, in the mode and with the attention it had.

    eos_ids: tokens that end a path. version: of the weights, reported with every generation.
    ValueError: the model has layers that do not attend to the whole past (sliding windows, recurrent states).
    """

    lockstep = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int], version: int = 0
    ) -> None:
        config = model.config.get_text_config()
        other = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
        if other:
            raise ValueError(f"model: layers of type {sorted(other)}; this engine serves full_attention alone")
        self.model = model
        self.version = version
        self.counters = EngineCounters()
        self._vocab_size: int = config.vocab_size
        self.max_positions: int = getattr(config, "max_position_embeddings", None) or 2**31
        self._cache_shape = asdict(KeyValueShape.of(config))
        self._rules = StopRules(tokenizer, config.vocab_size, eos_ids, model.device)
        self._prefixes = PrefixTree()

    def refresh(self, version: int, weights: Weights) -> None:
        """The weights have changed, those of the module itself: whatever was computed with the old ones is dropped."""
        self.version = version
        self.release()

    def release(self) -> None:
        self._prefixes = PrefixTree()

    def close(self) -> None:
        self.release()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One result per request, in order. Temperature 0 takes the likeliest token and reports the distribution at
        temperature 1.

        ValueError: a request that cannot be served. FloatingPointError: the model's logits are not finite.
        """
        if not requests:
            return []
        for index, request in enumerate(requests):
            check_request(index, request, self.max_positions, self._vocab_size)
        with self._serving():
            wave = self._prefill(requests)
            while not self._step(wave):
                await asyncio.sleep(0)  # tools that answer, and Ctrl-C, are noticed between tokens
        return wave.results(self.version)

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """The model in evaluation mode with this engine's attention, and afterwards as it was."""
        training, attention = self.model.training, self.model.config._attn_implementation
        self.model.eval()
        self.model.set_attn_implementation(ATTENTION)
        try:
            yield
        finally:
            self.model.set_attn_implementation(attention)
            self.model.train(training)

    @torch.inference_mode()
    def _prefill(self, requests: Sequence[GenerationRequest]) -> Wave:
        """Compute every distinct prefix, give each request a row behind one, and draw the first tokens."""
        members: dict[TokenIds, list[int]] = {}
        for index, request in enumerate(requests):
            members.setdefault(request.token_ids, []).append(index)
        prefixes = [Prefix(tokens, who, self._prefixes.longest_prefix(tokens)) for tokens, who in members.items()]
        self.counters.asked += sum(len(request.token_ids) for request in requests)
        self._share_beginning([prefix for prefix in prefixes if prefix.computed == 0])
        prefixes.sort(key=lambda prefix: prefix.missing, reverse=True)
        # The last token of a row never goes through the model, so it needs no column.
        columns = max(len(r.token_ids) for r in requests) + max(r.max_new_tokens for r in requests) - 1
        wave = Wave(requests, prefixes, self._new_cache(len(requests), columns), self._rules)
        logits = torch.cat(
            [self._compute(wave.cache, wave.start, first, prefixes[first:last]) for first, last in _chunks(prefixes)]
        )

        for row, prefix in enumerate(prefixes):
            if prefix.segment.end < prefix.length:
                tokens = prefix.token_ids[prefix.segment.end :]
                kv = wave.cache.extract(row, slice(wave.start - len(tokens), wave.start))
                prefix.segment = self._prefixes.add(prefix.segment, tokens, kv)
        leaders = [row for row, prefix in enumerate(prefixes) for _ in prefix.members[1:]]
        wave.cache.move(leaders, list(range(len(prefixes), len(requests))), slice(0, wave.start))
        wave.draw(logits[[*range(len(prefixes)), *leaders]])
        return wave

    def _share_beginning(self, prefixes: Sequence[Prefix]) -> None:
        """Compute once what new prefixes all begin with: instructions, examples."""
        common = _common_beginning([prefix.token_ids for prefix in prefixes])
        if len(prefixes) < 2 or len(common) < SHARED_TOKENS:
            return
        beginning = Prefix(common, [], prefixes[0].segment)
        cache = self._new_cache(1, len(common))
        self._compute(cache, len(common), 0, [beginning])
        segment = self._prefixes.add(beginning.segment, common, cache.extract(0, slice(None)))
        for prefix in prefixes:
            prefix.segment = segment

    def _new_cache(self, rows: int, columns: int) -> BatchCache:
        return BatchCache(
            rows=rows, columns=columns, dtype=self.model.dtype, device=self.model.device, **self._cache_shape
        )

    def _compute(self, cache: BatchCache, start: int, row: int, prefixes: Sequence[Prefix]) -> Tensor:
        """One forward over what is missing of some prefixes, rows `row`...; logits after their last tokens [n, V].

        All end before column `start`, tokens like rows of the cache. What stands before a row's first missing token is
        padding: it is not written, and nobody reads what comes out of it.
        """
        device, tokens = self.model.device, prefixes[0].missing
        self.counters.prefilled += sum(prefix.missing for prefix in prefixes)
        token_ids = torch.zeros(len(prefixes), tokens, dtype=torch.int64)
        for index, prefix in enumerate(prefixes):
            cache.fill(row + index, start - prefix.length, prefix.segment, prefix.computed)
            token_ids[index, tokens - prefix.missing :] = torch.tensor(prefix.token_ids[prefix.computed :])
        lengths = torch.tensor([prefix.length for prefix in prefixes], device=device)[:, None]
        missing = torch.tensor([prefix.missing for prefix in prefixes], device=device)[:, None]
        offsets = torch.arange(tokens, device=device)

        low = start - int(lengths.max())
        columns = torch.arange(low, start, device=device)
        query, first = (start - tokens + offsets)[:, None], (start - lengths)[:, :, None]
        # Padding before the row's first column sees what stands there, so that it has something to attend to.
        visible = (columns <= query) & ((columns >= first) | (query < first))  # [n, tokens, columns]
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=device).masked_fill_(~visible, -torch.inf)
        cache.attend(
            rows=slice(row, row + len(prefixes)),
            write=slice(start - tokens, start),
            read=slice(low, start),
            valid=(offsets >= tokens - missing)[:, None, :, None],
        )
        return self._forward(cache, token_ids.to(device), (lengths - tokens + offsets).clamp_(min=0), mask[:, None])

    @torch.inference_mode()
    def _step(self, wave: Wave) -> bool:
        """Let go of the rows that have ended and write one more token to the others; True: there are none."""
        if ended := wave.ended_rows():
            self._keep(wave, ended)
            wave.drop(ended)
        if not wave.owners:
            return True
        column = wave.start + wave.step - 1
        wave.cache.attend(
            rows=slice(len(wave.owners)), write=slice(column, column + 1), read=slice(wave.low, column + 1)
        )
        mask = wave.mask[..., wave.low : column + 1]
        logits = self._forward(wave.cache, wave.next_tokens[:, None], wave.positions, mask)
        wave.positions += 1
        wave.draw(logits)
        return False

    def _keep(self, wave: Wave, rows: Sequence[int]) -> None:
        """What rows have computed, for the requests that continue them."""
        self.counters.generated += len(rows) * wave.step
        for row in rows:
            if computed := wave.written(row)[:-1]:
                kv = wave.cache.extract(row, slice(wave.start, wave.start + len(computed)))
                self._prefixes.add(wave.prefixes[wave.owners[row]].segment, computed, kv)

    def _forward(self, cache: BatchCache, token_ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Logits [n, V] after the last column of token_ids [n, tokens]."""
        return self.model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def _common_beginning(sequences: Sequence[TokenIds]) -> TokenIds:
    if not sequences:
        return ()
    first, last = min(sequences), max(sequences)  # all others lie between them, so they begin alike too
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def _chunks(prefixes: Sequence[Prefix]) -> Iterator[tuple[int, int]]:
    """Split prefixes, sorted by falling `missing`, into [first, last) that share a forward: at most half is padding."""
    first = 0
    for last in range(1, len(prefixes) + 1):
        longest = prefixes[first].missing
        if last < len(prefixes) and (
            2 * prefixes[last].missing >= longest and (last + 1 - first) * longest <= PREFILL_TOKENS
        ):
            continue
        yield first, last
        first = last


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention without repeating keys and values for every query head.

    transformers' own function repeats them, over the whole cache at every step. Without that, generation makes 1.8 and
    2.5 times the tokens per CPU second (hidden size 128 with 64 rows, 256 with 128; `benchmarks.rollout_engine` on one
    core of a 2-core AVX-512 Xeon (Sapphire Rapids class) VM).
    """
    unsupported = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if unsupported:
        raise ValueError(f"model: attention with {unsupported}; this engine serves plain full attention alone")
    rows, heads, tokens, head_dim = query.shape
    if tokens == 1:  # query heads that share a key head become the queries of that head
        grouped = query.reshape(rows, key.shape[1], -1, head_dim)
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return output.reshape(rows, 1, heads, -1), None
    if query.device.type == "cpu":
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None
    # On CUDA, a mask together with enable_gqa leads to the kernel that materialises all scores.
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION, _attention)
