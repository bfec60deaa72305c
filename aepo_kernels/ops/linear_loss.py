"""Any loss of per-token log-probs and entropies, straight from hidden states: the caller's function, and no logits."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aepo_kernels import backend as backends
from aepo_kernels.ops import linear, rows
from aepo_kernels.ops.checks import check_labels, check_temperature
from aepo_kernels.ops.linear_logprobs_and_entropy import check_linear, flat_rows, in_shape_of, linear_loss_statistics
from aepo_kernels.ops.linear_policy_loss import (
    KeptGradients,
    Schedule,
    all_tokens,
    keeps,
    wanted_gradients,
)
from aepo_kernels.ops.loss_function import (
    LossFunction,
    TokenLoss,
    check_loss_function,
    differentiate,
    finite,
    loss_of_function,
    masked_labels,
    name_of,
)
from aepo_kernels.ops.merge import TokenStats
from aepo_kernels.ops.policy_loss import PolicyLoss
from aepo_kernels.ops.vocab_parallel import Shard, local_labels, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAME = 1e-4
"""Relative difference of a coefficient up to which it is the same in two calls of a loss function."""


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    loss_fn: LossFunction,
    *,
    per_token: bool = False,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    sequence_parallel: bool = False,
    schedule: Schedule | None = None,
    operand_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The loss that `loss_fn` makes of log-probs and entropies, from hidden states [.., D] and the lm_head's weight.

    `loss_fn`, `mask`, what comes back and what is raised are as in `logits_loss`; all else is as in
    `linear_policy_loss`. The gradient takes `schedule="recompute"`, four products, unless per_token=True promises that
    `loss_fn` acts on each token alone: a token's gradient must not depend on the log-probs and entropies of others, as
    it does in a ratio per sequence, a ranking, or a normalisation over the batch (captured numbers may be anything).
    Then `schedule="keep"`, three products, is possible, and taken where `linear_policy_loss` would. It calls `loss_fn`
    once per chunk of kept tokens, with log-probs and entropies of 0 for those that come later, and once at the end. A
    promise that does not hold raises ValueError on the CPU, and makes the loss NaN elsewhere.

    Under torch.compile "recompute" is traced into one graph; "keep" runs the function while the logits are made, which
    no graph can hold: it is taken only where asked for, and breaks the graph.
    """
    shard = shard_of(process_group, vocab_start)
    check_linear(hidden, weight, labels, bias, softcap, process_group, sequence_parallel, operand_dtype)
    check_temperature(temperature)
    check_loss_function(loss_fn, mask, labels.shape, hidden.device)
    if not isinstance(per_token, bool):
        raise TypeError(f"per_token must be a bool; got {type(per_token).__name__}")
    labels, _ = local_labels(masked_labels(labels, mask), rows.NO_LABEL, shard)
    temperature, softcap = float(temperature), None if softcap is None else float(softcap)
    keep = keeps(schedule, per_token, "per_token=True promises that of loss_fn", hidden, labels.numel())
    if schedule is None and torch.compiler.is_compiling():
        keep = False
    wanted = wanted_gradients(hidden, weight, bias)
    if keep and any(wanted):
        head = (hidden, weight, bias, labels, mask != 0, loss_fn, wanted)
        return _keep(*head, temperature, softcap, shard, sequence_parallel, operand_dtype, backend)
    stats = linear_loss_statistics(
        hidden, weight, bias, labels, temperature, softcap, shard, sequence_parallel, operand_dtype, backend
    )
    return loss_of_function(loss_fn, *stats, mask != 0)


def _keep(*arguments: Any) -> PolicyLoss:
    """`_kept`, which no graph can hold."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return _kept(*arguments)
    return torch.compiler.disable(_kept)(*arguments)


_keep._torchdynamo_disable = True  # type: ignore[attr-defined]  # as torch.compiler.disable does, without that import


def _kept(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    counted: Tensor,
    loss_fn: LossFunction,
    wanted: list[bool],
    temperature: float,
    softcap: float | None,
    shard: Shard,
    sequence_parallel: bool,
    operand_dtype: torch.dtype | None,
    backend: str | None,
) -> PolicyLoss:
    """Three products: the function gives the coefficients of a chunk of tokens while their logits are kept."""
    with torch.no_grad():
        served = backends.resolve(backend, hidden)
        head = linear.Head(weight, bias, temperature, softcap, served, shard, sequence_parallel, "keep", operand_dtype)
        if labels.device.type == "cpu" and shard.group is None:
            check_labels(labels, labels == rows.NO_LABEL, len(weight))
        tokens = all_tokens(hidden, shard, sequence_parallel)
        flat_hidden, flat_labels = flat_rows(tokens, labels, labels == rows.NO_LABEL)
        used = (flat_labels != rows.NO_LABEL).nonzero()[:, 0]
        # [2, T] for log-probs and entropies: what is known so far, and the coefficients that followed from it.
        known, taken = (flat_hidden.new_zeros(2, labels.numel(), dtype=head.acc) for _ in range(2))
        logprobs, entropy = known.view(2, *labels.shape).unbind()

        def coefficients(chunk: slice, stats: TokenStats) -> linear.Coefficients:
            now = used[chunk]
            known[:, now] = torch.stack((stats.logprobs, stats.entropy))
            found = differentiate(loss_fn, logprobs, entropy, counted)
            taken[:, now] = _stacked(found).flatten(1)[:, now]
            return linear.Coefficients(taken[0, now], None if found.grad_entropy is None else taken[1, now])

        _, grads, scale = linear.statistics_and_gradients(
            head, flat_hidden, flat_labels, used, coefficients, None, linear.Wanted(*wanted)
        )
        result = finite(loss_fn, differentiate(loss_fn, logprobs, entropy, counted), logprobs, entropy, counted)
        loss = _promise_kept(loss_fn, result, taken.view(2, *labels.shape))
    kept = in_shape_of(tokens, grads, shard.group, sequence_parallel)
    connected = KeptGradients.apply(hidden, weight, bias, loss, *kept, scale, backend)
    return PolicyLoss(connected, {"loss": loss, **result.metrics})


def _stacked(found: TokenLoss) -> Tensor:
    """The coefficients [2, ..] of log-probs and entropies."""
    grad_entropy = torch.zeros_like(found.grad_logprobs) if found.grad_entropy is None else found.grad_entropy
    return torch.stack((found.grad_logprobs, grad_entropy))


def _promise_kept(loss_fn: LossFunction, result: TokenLoss, taken: Tensor) -> Tensor:
    """The loss, where the coefficients [2, ..] that were taken chunk by chunk are those of all tokens together."""
    final = _stacked(result)
    differs = (final - taken).abs() > SAME * final.abs().clamp(min=SAME * final.abs().amax() if final.numel() else 0)
    if final.device.type != "cpu":
        return torch.where(differs.any(), torch.nan, result.loss)
    if differs.any():
        at = differs.nonzero()[0].tolist()
        before, after = (x[tuple(at)].item() for x in (taken, final))
        raise ValueError(
            f"{name_of(loss_fn)} must act on each token alone, as per_token=True promises: the gradient of token "
            f"{at[1:]} is {before:.6g} before later tokens are known and {after:.6g} after; leave per_token off"
        )
    return result.loss
