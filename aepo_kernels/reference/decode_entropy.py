"""Entropy, and log-prob of one token, of every row of logits at decode time, written by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.reference.token_stats import token_stats


def decode_entropy(
    logits: Tensor,  # [B, V]
    temperatures: Tensor | None,  # [B] in the accumulation dtype
    temperature: float,
    slots: Tensor | None,  # [B] integers
    tokens: Tensor | None,  # [B] integers
    entropy: Tensor,  # [N] in the accumulation dtype
    logprobs: Tensor | None,  # [N] in the accumulation dtype
) -> None:
    """Write each row's entropy to entropy[slots[b]] and the log-prob of tokens[b] to logprobs[slots[b]].

    Without slots row b's is b. A row whose slot is outside [0, N) counts for nothing. A temperature that is not > 0 and
    finite makes its row NaN. On a GPU this waits for the device; the kernels do not.
    """
    slot = torch.arange(len(logits), device=logits.device) if slots is None else slots.to(torch.int64)
    wanted = ((slot >= 0) & (slot < len(entropy))).nonzero()[:, 0]
    slot = slot[wanted]
    per_row: Tensor | float = temperature
    if temperatures is not None:
        per_row = temperatures[wanted]
        per_row = per_row.where((per_row > 0) & per_row.isfinite(), torch.nan)[:, None]
    labels = None if tokens is None else tokens[wanted].to(torch.int64)
    no_label = torch.iinfo(torch.int64).min  # ignored by token_stats; as a token it is out of range
    row_logprobs, row_entropy, _, _ = token_stats(logits[wanted], labels, per_row, no_label, False)
    entropy[slot] = row_entropy
    if logprobs is not None:
        logprobs[slot] = row_logprobs
