"""The policy loss from per-token log-probs: the O(T) part, one registered operation for every objective.

Registers aepo::policy_loss, which computes the loss and its gradients together; the backward only scales them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.objective import METRICS, ObjectiveNumbers, PolicyObjective
from aepo_kernels.ops.call import POLICY_CALL, PolicyCall
from aepo_kernels.ops.checks import check_float_tensor, check_like
from aepo_kernels.ops.policy_arguments import policy_arguments
from aepo_kernels.ops.policy_tensors import policy_tensors, run_policy_terms
from aepo_kernels.ops.rows import acc_dtype

torch.library.define(
    "aepo::policy_loss",
    f"(Tensor logprobs, Tensor? entropy, {POLICY_CALL}) "
    "-> (Tensor loss, Tensor grad_logprobs, Tensor grad_entropy, Tensor metrics)",
)


class PolicyLoss(NamedTuple):
    """What the policy losses return."""

    loss: Tensor
    """[] float32 (float64 for float64 inputs), differentiable."""
    metrics: dict[str, Tensor]
    """Detached scalars [] over the valid tokens of this call: loss, clip_fraction_high and _low (share of tokens whose
    loss is at a clip bound), dual_clip_fraction, ratio_mean, ratio_max, approx_kl (k3 estimate of KL(old || new)),
    valid_tokens; with entropies entropy_mean and entropy_std; with an entropy-aware advantage advantage_flips (number
    of tokens whose factor is negative); with ref_logprobs kl."""


@torch.library.impl("aepo::policy_loss", "CompositeExplicitAutograd")
def _policy_loss(logprobs: Tensor, entropy: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], grad_logprobs [..], grad_entropy [..] or [0] without an entropy bonus, metrics [11])."""
    call, shape = PolicyCall(*args), logprobs.shape
    loss, grad_logprobs, grad_entropy, metrics = run_policy_terms(
        backends.resolve(call.backend, logprobs),
        logprobs.reshape(-1).contiguous(),
        None if entropy is None else entropy.reshape(-1).to(logprobs.dtype).contiguous(),
        policy_tensors(shape, logprobs.dtype, call),
        ObjectiveNumbers(*call.numbers),
    )
    return loss, grad_logprobs.view(shape), grad_entropy.view(shape) if grad_entropy.numel() else grad_entropy, metrics


@torch.library.register_fake("aepo::policy_loss")
def _policy_loss_fake(logprobs: Tensor, entropy: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    has_bonus = ObjectiveNumbers(*PolicyCall(*args).numbers).entropy_bonus != 0
    grad_entropy = logprobs.new_empty(logprobs.shape if has_bonus else 0)
    return logprobs.new_empty(()), logprobs.new_empty(logprobs.shape), grad_entropy, logprobs.new_empty(len(METRICS))


class KnownGradients(torch.autograd.Function):
    """(logprobs, entropy or None, loss, grad_logprobs, grad_entropy or None) -> loss, whose gradients in the first two
    are the last two times that of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        loss: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(grad_logprobs, grad_entropy)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if x is None else grad_loss * x for x in ctx.saved_tensors)
        return *gradients, None, None, None


def loss_of_call(logprobs: Tensor, entropy: Tensor | None, call: PolicyCall) -> tuple[Tensor, Tensor]:
    """(loss [], metrics [11]) of log-probs and entropies [..] in the dtype of the accumulation."""
    with torch.no_grad():
        loss, grad_logprobs, grad_entropy, metrics = torch.ops.aepo.policy_loss(logprobs, entropy, *call)
    has_bonus = ObjectiveNumbers(*call.numbers).entropy_bonus != 0
    loss = KnownGradients.apply(logprobs, entropy, loss, grad_logprobs, grad_entropy if has_bonus else None)
    return loss, metrics


def policy_metrics(
    loss: Tensor, metrics: Tensor, objective: PolicyObjective, has_entropy: bool, has_kl: bool
) -> dict[str, Tensor]:
    """The metrics vector of the kernels as the dict of PolicyLoss."""
    hidden = set()
    if not has_entropy:
        hidden |= {"entropy_mean", "entropy_std"}
    if not has_kl:
        hidden |= {"kl"}
    if objective.entropy_advantage == 0:
        hidden |= {"advantage_flips"}
    named = {name: value for name, value in zip(METRICS, metrics.unbind(), strict=True) if name not in hidden}
    return {"loss": loss.detach().clone(), **named}  # a copy: the caller may scale the loss in place


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: PolicyObjective,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy_stats: tuple[float | Tensor, float | Tensor] | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The policy loss of `objective` from per-token log-probs (nats).

    logprobs, old_logprobs, advantages, and where given entropy, ref_logprobs and rollout_logprobs: [..] floating point;
    mask [..] bool or integer, non-zero where the token counts, or floating point with zeros and ones alone (another
    value raises on the CPU, and makes the loss NaN on other devices). advantages may also be one per sequence: [B] or
    [B, 1] beside [B, L]. Whatever the tokens that do not count hold, NaN included, they add nothing and get gradient 0;
    a token without advantage adds nothing either, whatever its ratio. Sequences are the rows of [B, L] inputs, or given
    by cu_seqlens [N + 1] (integer bounds in the flattened tokens, first 0, last T). Returns PolicyLoss(loss, metrics),
    accumulated in float32 (float64 for float64 logprobs) and differentiable once in logprobs, and in entropy if the
    objective has an entropy bonus. Everything else is a constant to it, and so is the entropy in an entropy-aware
    advantage.

    `entropy_stats` = (mean, std) are used in the entropy-aware advantage as they are; None takes those of this call.
    `denominator` replaces the count that the aggregation divides by (see `token_weights`), so that micro-batches and
    ranks add up to the loss of the whole batch; with an entropy-aware advantage they need `entropy_stats` of the whole
    batch too, else each part scales its advantages by its own. A mask without any valid token gives loss 0 with
    gradient 0. NaN on a token that counts gives a NaN loss.

    `weights` [..] floating point say each token's share themselves: loss = sum of weights_t L_t, in place of the
    objective's aggregation, and no denominator. `counts` [..], whole numbers, say how often a token stands for itself,
    as one that several trajectories of a tree share does: metrics, entropy statistics, sequence ratios and aggregations
    are those of the tokens repeated so often, and 0 is a token that does not count. Given together, `weights` are the
    whole share (nothing multiplies them by the counts), and must be 0 where the counts are. A token of a tree whose
    paths have advantages of both signs is two tokens here, because a clip looks at the sign (docs/kernels.md, "Trees").

    Raises ValueError or TypeError naming the argument: shapes, dtypes and devices that disagree; a term of the
    objective whose input is missing, or an input that no term uses; on the CPU also bounds that do not fit the tokens.
    """
    check_float_tensor("logprobs", logprobs)
    if entropy is not None:
        check_like("entropy", entropy, "logprobs", logprobs.shape, logprobs.device)
        check_float_tensor("entropy", entropy)
    call = policy_arguments(
        logprobs.shape,
        logprobs,
        objective,
        old_logprobs,
        advantages,
        mask,
        has_entropy=entropy is not None,
        weights=weights,
        counts=counts,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        cu_seqlens=cu_seqlens,
        entropy_stats=entropy_stats,
        denominator=denominator,
        backend=backend,
    )
    acc = acc_dtype(logprobs.dtype)
    loss, metrics = loss_of_call(logprobs.to(acc), None if entropy is None else entropy.to(acc), call)
    return PolicyLoss(loss, policy_metrics(loss, metrics, objective, entropy is not None, ref_logprobs is not None))
