"""Logits of any leading shape as the [T, V] blocks that the backends take, without copying them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aepo_kernels import backend as backends
from aepo_kernels.objective import ObjectiveNumbers
from aepo_kernels.ops.merge import TokenStats
from aepo_kernels.ops.policy_tensors import PolicyTensors

NO_LABEL = torch.iinfo(torch.int64).min
"""An ignore_index that no caller's label is by accident: -100 on a token that counts must be an error."""


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in and per-token results come in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(logits: Tensor) -> list[Tensor]:
    """[.., V] as views [T_i, V] in row order: a single one wherever strides allow it.

    A slice such as logits[:, :-1] has no single row stride; it becomes one block per sequence, because a copy would
    cost more than all the rest of the operation.
    """
    if logits.dim() == 2:
        return [logits]
    try:
        return [logits.view(-1, logits.shape[-1])]
    except RuntimeError:
        return [block for part in logits.unbind(0) for block in row_blocks(part)]


def _per_block(x: Tensor | None, blocks: list[Tensor]) -> Sequence[Tensor | None]:
    """A tensor of one entry per row of the logits, flat, contiguous and cut like the blocks."""
    if x is None:
        return [None] * len(blocks)
    return x.reshape(-1).contiguous().split([len(block) for block in blocks])


def token_stats(
    backend: str, logits: Tensor, labels: Tensor | None, temperature: float, ignore_index: int, skip_ignored: bool
) -> TokenStats:
    """The stage `token_stats` for logits [.., V] and labels [..]; every field is [..]."""
    blocks = row_blocks(logits)
    stage = backends.stage(backend, "token_stats")
    parts = [
        stage(block, block_labels, temperature, ignore_index, skip_ignored)
        for block, block_labels in zip(blocks, _per_block(labels, blocks), strict=True)
    ]
    merged = parts[0] if len(parts) == 1 else tuple(torch.cat(stat) for stat in zip(*parts, strict=True))
    logprobs, *others = merged
    shape = logits.shape[:-1]
    return TokenStats(logprobs if labels is None else logprobs.view(shape), *(x.view(shape) for x in others))


def single_pass(
    backend: str,
    logits: Tensor,
    out: Tensor,
    labels: Tensor,
    temperature: float,
    tensors: PolicyTensors,
    numbers: ObjectiveNumbers,
) -> tuple[Tensor, Tensor]:
    """The stage `single_pass` for logits [.., V]; (logprobs, entropy), both flat. `out` is as in logits_grad."""
    blocks = row_blocks(logits)
    old, advantages, weight, counts, ref, rollout, _, stats = tensors
    per_row = [_per_block(x, blocks) for x in (labels, old, advantages, weight, counts, ref, rollout)]
    stage = backends.stage(backend, "single_pass")
    parts = [
        stage(block, block_labels, temperature, NO_LABEL, *per_token, stats, numbers, target)
        for block, target, block_labels, *per_token in zip(blocks, _targets(logits, out, blocks), *per_row, strict=True)
    ]
    logprobs, entropy = (torch.cat(x) for x in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
    return logprobs, entropy


def _targets(logits: Tensor, out: Tensor, blocks: list[Tensor]) -> Sequence[Tensor]:
    """Where the gradients of the blocks go: `out`, contiguous and of the logits' shape, or the logits themselves."""
    return blocks if out is logits else out.view(-1, logits.shape[-1]).split([len(block) for block in blocks])


def logits_grad(
    backend: str,
    logits: Tensor,
    out: Tensor,
    labels: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """The stage `logits_grad` for logits [.., V]; `out` is contiguous and of their shape, or the logits themselves."""
    blocks = row_blocks(logits)
    per_row = [_per_block(x, blocks) for x in (labels, maximum, log_sum, entropy, grad_logprobs, grad_entropy)]
    stage = backends.stage(backend, "logits_grad")
    for block, target, *rows in zip(blocks, _targets(logits, out, blocks), *per_row, strict=True):
        stage(block, *rows, temperature, ignore_index, target)
