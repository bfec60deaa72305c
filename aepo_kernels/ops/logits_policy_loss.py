"""The policy loss straight from logits: token statistics, then the O(T) loss.

The logits are read once forward; backward they are read and written once (over themselves with inplace_backward), and
only the rows of tokens that count. Saved for the backward: the logits and five numbers per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aepo_kernels.objective import PolicyObjective
from aepo_kernels.ops import rows
from aepo_kernels.ops.checks import check_integer, check_like, check_logits, check_temperature
from aepo_kernels.ops.logprobs_and_entropy import loss_statistics
from aepo_kernels.ops.policy_arguments import policy_arguments
from aepo_kernels.ops.policy_loss import PolicyLoss, loss_of_call, policy_metrics
from aepo_kernels.ops.single_pass import check_single_pass, single_pass_loss
from aepo_kernels.ops.vocab_parallel import local_labels, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def logits_policy_loss(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: PolicyObjective,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    single_pass: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy_stats: tuple[float | Tensor, float | Tensor] | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The policy loss of `objective` from logits [.., V] (as `logprobs_and_entropy` takes them) and labels [..].

    Everything else is as in `policy_loss`; the entropy comes from the logits, so no objective lacks it. Rows whose mask
    is 0 are never read: their logits may be NaN and their labels anything, and their gradient is 0. A label outside
    [0, V) on a token that counts raises on the CPU, and makes the loss NaN on other devices.

    inplace_backward=True lets the backward write the gradient over the logits: no second [T, V] tensor exists. The
    logits must then not be needed afterwards (a leaf would lose its values; a parameter or a view of one is refused):
    whoever saved them for another backward gets PyTorch's error about an
    inplace modification, and so does a second backward through this loss. Under torch.compile others may need them, and
    where nobody does the memory is saved too, for one more pass over the logits (inductor of 2.13). Under saved-tensor
    hooks (checkpointing or offloading around the loss) the gradient gets a tensor of its own, with a warning. Hooks
    around the model alone hide from PyTorch, and from this function, who saved the logits: if an operation with saved
    result (tanh, softmax, ..) made them, leave inplace_backward off.

    single_pass=True goes further: the forward writes the gradient over the logits while each row is in cache, so that
    they cross memory twice instead of three times (4 bytes per 16-bit logit, not 6); the backward only scales it, where
    the upstream gradient is not 1. A token's gradient must follow from its own row: one ratio per token,
    `entropy_stats` given if the advantage is entropy-aware, and the whole vocabulary here; else ValueError. From the
    call on the logits hold their gradient: whoever saved them for a backward gets PyTorch's error about an inplace
    modification, and a later differentiable use one in its backward. A later look (an argmax, for a log) cannot get
    one, and finds gradients: look before the call, or into the metrics. `torch.autograd.grad(loss, logits)` and
    retain_grad() do not find the logits that were, and of a leaf no later use is noticed. float16 is refused: the
    gradient is rounded before its loss scale is known. Where nothing requires a gradient, nothing is written. For
    torch.compile and saved-tensor hooks the same holds as with inplace_backward.

    `process_group` and `vocab_start` shard the vocabulary as in `logprobs_and_entropy`; all that is per token is the
    same on every rank, and so are loss and metrics.
    """
    if not isinstance(single_pass, bool):
        raise TypeError(f"single_pass must be a bool; got {type(single_pass).__name__}")
    check_logits(logits, inplace="single_pass" if single_pass else "inplace_backward" if inplace_backward else None)
    check_temperature(temperature)
    check_like("labels", labels, "logits without the last dimension", logits.shape[:-1], logits.device)
    check_integer("labels", labels)
    call = policy_arguments(
        labels.shape,
        logits,
        objective,
        old_logprobs,
        advantages,
        mask,
        has_entropy=True,
        weights=weights,
        counts=counts,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        cu_seqlens=cu_seqlens,
        entropy_stats=entropy_stats,
        denominator=denominator,
        backend=backend,
    )
    shard = shard_of(process_group, vocab_start)
    labels, _ = local_labels(labels.to(torch.int64).masked_fill(mask == 0, rows.NO_LABEL), rows.NO_LABEL, shard)
    if single_pass:
        check_single_pass(logits, objective, entropy_stats is not None, shard)
    if single_pass and torch.is_grad_enabled() and logits.requires_grad:
        loss, metrics = single_pass_loss(logits, labels, float(temperature), call)
    else:
        stats = loss_statistics(logits, labels, float(temperature), shard, inplace_backward, backend)
        loss, metrics = loss_of_call(*stats, call)
    return PolicyLoss(loss, policy_metrics(loss, metrics, objective, True, ref_logprobs is not None))
