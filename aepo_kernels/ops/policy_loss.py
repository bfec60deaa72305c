"""The policy loss from per-token log-probs: the O(T) part, one registered operation for every objective.

Registers aepo::policy_loss, which computes the loss and its gradients together; the backward only scales them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.objective import LARGEST, PolicyObjective
from aepo_kernels.ops.aggregation import token_weights
from aepo_kernels.ops.checks import check_cu_seqlens, check_float_tensor, check_like, check_mask
from aepo_kernels.ops.policy_arguments import ENTROPY_BONUS, POLICY_ARGS, policy_arguments
from aepo_kernels.ops.rows import acc_dtype
from aepo_kernels.reference.policy_terms import METRICS

torch.library.define(
    "aepo::policy_loss",
    f"(Tensor logprobs, Tensor? entropy, {POLICY_ARGS}) "
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


class PolicyTensors(NamedTuple):
    """What the stage `policy_terms` takes besides log-probs, entropies and the objective's numbers: flat, in the dtype
    of the accumulation."""

    old_logprobs: Tensor  # [T]
    advantages: Tensor  # [T]
    weight: Tensor  # [T]
    ref_logprobs: Tensor | None  # [T]
    rollout_logprobs: Tensor | None  # [T]
    cu_seqlens: Tensor | None  # [N + 1], given = one ratio per sequence
    entropy_stats: Tensor | None  # [2]

    def of_tokens(self, index: Tensor | slice) -> PolicyTensors:
        """Those of some tokens, whose ratios must not depend on others."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index]

        return self._replace(
            old_logprobs=self.old_logprobs[index],
            advantages=self.advantages[index],
            weight=self.weight[index],
            ref_logprobs=part(self.ref_logprobs),
            rollout_logprobs=part(self.rollout_logprobs),
            cu_seqlens=None,
        )


def policy_tensors(
    shape: torch.Size,
    acc: torch.dtype,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    entropy_stats: Tensor | None,
    denominator: Tensor | None,
    aggregation: str,
    sequence_ratio: bool,
) -> PolicyTensors:
    """Check what can be checked of the values, and weigh the tokens, which have this shape."""

    def flat(x: Tensor | None) -> Any:
        return None if x is None else x.reshape(-1).to(acc).contiguous()

    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
        if cu_seqlens.device.type == "cpu":
            check_cu_seqlens(cu_seqlens, shape.numel())
    elif len(shape) > 1:  # every row of [B, L] is a sequence
        cu_seqlens = torch.arange(shape[:-1].numel() + 1, device=mask.device) * shape[-1]
    if denominator is not None:
        denominator = _in_range("denominator", denominator, 1 / LARGEST, LARGEST)
    if entropy_stats is not None:
        mean, std = entropy_stats.unbind()
        mean = _in_range("entropy_stats mean", mean, -LARGEST, LARGEST)
        entropy_stats = torch.stack((mean, _in_range("entropy_stats std", std, 0, LARGEST)))
    weight = token_weights(mask.reshape(-1) != 0, cu_seqlens, aggregation, denominator, acc)
    if mask.is_floating_point():  # 0.5 is neither: an error where values can be read at no cost, else a NaN loss
        if mask.device.type == "cpu":
            check_mask(mask)
        else:
            weight = weight.masked_fill((mask.reshape(-1) != 0) & (mask.reshape(-1) != 1), torch.nan)
    return PolicyTensors(
        flat(old_logprobs),
        flat(advantages),
        weight,
        flat(ref_logprobs),
        flat(rollout_logprobs),
        cu_seqlens if sequence_ratio else None,
        flat(entropy_stats),
    )


def run_policy_terms(
    backend: str, logprobs: Tensor, entropy: Tensor | None, tensors: PolicyTensors, numbers: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stage `policy_terms` for flat log-probs and entropies."""
    old_logprobs, advantages, weight, *others = tensors
    return backends.stage(backend, "policy_terms")(
        logprobs, old_logprobs, advantages, weight, entropy, *others, *numbers
    )


def _in_range(name: str, x: Tensor, low: float, high: float) -> Tensor:
    """A number [], given as a tensor perhaps. Out of range it raises on the CPU; elsewhere, where reading it would
    wait, it becomes NaN, so that the loss shows it."""
    if x.device.type == "cpu":
        if low > 0 and not 0 < x.item() < math.inf:
            raise ValueError(f"{name} must be > 0 and finite; got {x.item()}")
        if not low <= x.item() <= high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {x.item()}")
        return x
    return x.where(x == x.clamp(low, high), torch.nan)


NUM_TENSORS = 10
"""Of POLICY_ARGS, those that `policy_tensors` takes; the objective's numbers and the backend follow."""


def policy_terms(logprobs: Tensor, entropy: Tensor | None, *policy_args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weigh the tokens and run the stage `policy_terms`: (loss [], grad_logprobs [..], grad_entropy, metrics [11])."""
    *numbers, backend = policy_args[NUM_TENSORS:]
    shape = logprobs.shape
    tensors = policy_tensors(shape, logprobs.dtype, *policy_args[:NUM_TENSORS])
    flat_entropy = None if entropy is None else entropy.reshape(-1).to(logprobs.dtype).contiguous()
    flat_logprobs = logprobs.reshape(-1).contiguous()
    outputs = run_policy_terms(backends.resolve(backend, logprobs), flat_logprobs, flat_entropy, tensors, numbers)
    loss, grad_logprobs, grad_entropy, metrics = outputs
    return loss, grad_logprobs.view(shape), grad_entropy.view(shape) if grad_entropy.numel() else grad_entropy, metrics


torch.library.impl("aepo::policy_loss", "CompositeExplicitAutograd")(policy_terms)


@torch.library.register_fake("aepo::policy_loss")
def policy_terms_fake(logprobs: Tensor, entropy: Tensor | None, *policy_args: Any) -> tuple[Tensor, ...]:
    grad_entropy = logprobs.new_empty(logprobs.shape if policy_args[ENTROPY_BONUS] != 0 else 0)
    return logprobs.new_empty(()), logprobs.new_empty(logprobs.shape), grad_entropy, logprobs.new_empty(len(METRICS))


class _PolicyLoss(torch.autograd.Function):
    """(logprobs, entropy or None, *policy_args) -> (loss, metrics), differentiable once in the first two."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, *policy_args: Any) -> tuple[Tensor, Tensor]:
        loss, grad_logprobs, grad_entropy, metrics = torch.ops.aepo.policy_loss(logprobs, entropy, *policy_args)
        ctx.save_for_backward(grad_logprobs, grad_entropy)
        ctx.has_bonus, ctx.others = policy_args[ENTROPY_BONUS] != 0, len(policy_args)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = ctx.saved_tensors
        return grad_loss * grad_logprobs, grad_loss * grad_entropy if ctx.has_bonus else None, *[None] * ctx.others


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
    return {"loss": loss.detach(), **named}


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: PolicyObjective,
    entropy: Tensor | None = None,
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

    Raises ValueError or TypeError naming the argument: shapes, dtypes and devices that disagree; a term of the
    objective whose input is missing, or an input that no term uses; on the CPU also bounds that do not fit the tokens.
    """
    check_float_tensor("logprobs", logprobs)
    if entropy is not None:
        check_like("entropy", entropy, "logprobs", logprobs.shape, logprobs.device)
        check_float_tensor("entropy", entropy)
    args = policy_arguments(
        logprobs.shape,
        logprobs,
        objective,
        old_logprobs,
        advantages,
        mask,
        has_entropy=entropy is not None,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        cu_seqlens=cu_seqlens,
        entropy_stats=entropy_stats,
        denominator=denominator,
        backend=backend,
    )
    acc = acc_dtype(logprobs.dtype)
    loss, metrics = _PolicyLoss.apply(logprobs.to(acc), None if entropy is None else entropy.to(acc), *args)
    return PolicyLoss(loss, policy_metrics(loss, metrics, objective, entropy is not None, ref_logprobs is not None))
