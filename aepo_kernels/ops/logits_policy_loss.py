"""The policy loss straight from logits: token statistics, then the O(T) loss, in one registered operation.

The logits are read once forward; backward they are read and written once (over themselves with inplace_backward), and
only the rows of tokens that count. Saved for the backward: the logits and five numbers per token.

Registers aepo::logits_policy_loss; the backward is that of `logprobs_and_entropy`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.objective import PolicyObjective
from aepo_kernels.ops import rows
from aepo_kernels.ops.checks import check_integer, check_labels, check_like, check_logits, check_temperature
from aepo_kernels.ops.policy_arguments import ENTROPY_BONUS, MASK, POLICY_ARGS, policy_arguments
from aepo_kernels.ops.policy_loss import PolicyLoss, policy_metrics, policy_terms, policy_terms_fake
from aepo_kernels.ops.vocab_parallel import Shard, local_labels, merge_over_ranks, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

torch.library.define(
    "aepo::logits_policy_loss",
    f"(Tensor logits, Tensor labels, float temperature, str? group, int vocab_start, {POLICY_ARGS}) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_logprobs, Tensor grad_entropy, "
    "Tensor maximum, Tensor log_sum, Tensor entropy)",
)


@torch.library.impl("aepo::logits_policy_loss", "CompositeExplicitAutograd")
def _logits_policy_loss(
    logits: Tensor, labels: Tensor, temperature: float, group: str | None, vocab_start: int, *policy_args: Any
) -> tuple[Tensor, ...]:
    backend = backends.resolve(policy_args[-1], logits)
    masked = policy_args[MASK] == 0
    if labels.device.type == "cpu" and group is None:
        check_labels(labels, masked, logits.shape[-1])
    # Rows that do not count are not even read: in agent batches most tokens are prompt or tool results.
    labels = labels.masked_fill(masked, rows.NO_LABEL)
    stats = rows.token_stats(backend, logits, labels, temperature, rows.NO_LABEL, True)
    stats = merge_over_ranks(stats, labels, logits.shape[-1], temperature, Shard(group, vocab_start))
    logprobs, entropy, maximum, log_sum = stats
    loss, grad_logprobs, grad_entropy, metrics = policy_terms(logprobs, entropy, *policy_args[:-1], backend)
    return loss, metrics, grad_logprobs, grad_entropy, maximum, log_sum, entropy


@torch.library.register_fake("aepo::logits_policy_loss")
def _logits_policy_loss_fake(
    logits: Tensor, labels: Tensor, temperature: float, group: str | None, vocab_start: int, *policy_args: Any
) -> tuple[Tensor, ...]:
    stats = [logits.new_empty(labels.shape, dtype=rows.acc_dtype(logits.dtype)) for _ in range(3)]
    loss, grad_logprobs, grad_entropy, metrics = policy_terms_fake(stats[0], None, *policy_args)
    return loss, metrics, grad_logprobs, grad_entropy, *stats


def _is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(x, FunctionalTensor)


def _others_unseen() -> bool:
    """Whether tensors are being saved through hooks: then PyTorch checks no versions when they are used again, and who
    saved the logits before would silently get what an in-place backward wrote over them."""
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _LogitsPolicyLoss(torch.autograd.Function):
    """(logits, labels, temperature, shard, in place, *policy_args) -> (loss, metrics), differentiable in logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        shard: Shard,
        inplace_backward: bool,
        *policy_args: Any,
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, *saved = torch.ops.aepo.logits_policy_loss(logits, labels, temperature, *shard, *policy_args)
        ctx.save_for_backward(logits, labels, *saved)
        ctx.settings = (temperature, rows.NO_LABEL, policy_args[-1])
        if inplace_backward and _others_unseen():
            warnings.warn(
                "inplace_backward=True: saved-tensor hooks are active (activation checkpointing or offloading), under "
                "which PyTorch cannot tell who else needs the logits; their gradient gets a tensor of its own",
                stacklevel=3,
            )
            inplace_backward = False
        ctx.inplace, ctx.has_bonus, ctx.others = inplace_backward, policy_args[ENTROPY_BONUS] != 0, len(policy_args)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, grad_logprobs, grad_entropy, *stats = ctx.saved_tensors
        coefficients = (grad_loss * grad_logprobs, grad_loss * grad_entropy if ctx.has_bonus else None)
        if ctx.inplace:
            # The graph of a compiler has no version counters, so nobody would notice who else needs the logits. A copy
            # is right whoever does, and where nobody does the compiler writes it over the logits (inductor of 2.13).
            grad = logits.clone() if _is_traced(logits) else logits.detach()
            torch.ops.aepo.logits_grad_(grad, labels, *stats, *coefficients, *ctx.settings)
        else:
            grad = torch.ops.aepo.logits_grad(logits, labels, *stats, *coefficients, *ctx.settings)
        return grad, None, None, None, None, *[None] * ctx.others


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
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
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
    logits must then not be needed afterwards: whoever saved them for another backward gets PyTorch's error about an
    inplace modification, and so does a second backward through this loss. Under torch.compile others may need them, and
    where nobody does the memory is saved too, for one more pass over the logits (inductor of 2.13). Under saved-tensor
    hooks (checkpointing or offloading around the loss) the gradient gets a tensor of its own, with a warning. Hooks
    around the model alone hide from PyTorch, and from this function, who saved the logits: if an operation with saved
    result (tanh, softmax, ..) made them, leave inplace_backward off.

    `process_group` and `vocab_start` shard the vocabulary as in `logprobs_and_entropy`; all that is per token is the
    same on every rank, and so are loss and metrics.
    """
    check_logits(logits, inplace=inplace_backward)
    check_temperature(temperature)
    check_like("labels", labels, "logits without the last dimension", logits.shape[:-1], logits.device)
    check_integer("labels", labels)
    args = policy_arguments(
        labels.shape,
        logits,
        objective,
        old_logprobs,
        advantages,
        mask,
        has_entropy=True,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        cu_seqlens=cu_seqlens,
        entropy_stats=entropy_stats,
        denominator=denominator,
        backend=backend,
    )
    shard = shard_of(process_group, vocab_start)
    labels, _ = local_labels(labels.to(torch.int64), rows.NO_LABEL, shard)
    loss, metrics = _LogitsPolicyLoss.apply(logits, labels, float(temperature), shard, inplace_backward, *args)
    return PolicyLoss(loss, policy_metrics(loss, metrics, objective, True, ref_logprobs is not None))
