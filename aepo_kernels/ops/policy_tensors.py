"""What the stage `policy_terms` takes, from the arguments of a call: flat tensors, and the weight of every token."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo_kernels import backend as backends
from aepo_kernels.objective import LARGEST, ObjectiveNumbers
from aepo_kernels.ops.aggregation import token_weights
from aepo_kernels.ops.call import PolicyCall
from aepo_kernels.ops.checks import check_counts, check_cu_seqlens, check_mask


class PolicyTensors(NamedTuple):
    """Besides log-probs and entropies: flat, in the dtype of the accumulation."""

    old_logprobs: Tensor  # [T]
    advantages: Tensor  # [T]
    weight: Tensor  # [T]
    counts: Tensor | None  # [T]
    ref_logprobs: Tensor | None  # [T]
    rollout_logprobs: Tensor | None  # [T]
    cu_seqlens: Tensor | None  # [N + 1], given = one ratio per sequence
    entropy_stats: Tensor | None  # [2]

    def of_tokens(self, index: Tensor | slice) -> PolicyTensors:
        """Those of some tokens, whose ratios must not depend on others."""

        def part(x: Tensor | None) -> Any:
            return None if x is None else x[index]

        return PolicyTensors(
            old_logprobs=part(self.old_logprobs),
            advantages=part(self.advantages),
            weight=part(self.weight),
            counts=part(self.counts),
            ref_logprobs=part(self.ref_logprobs),
            rollout_logprobs=part(self.rollout_logprobs),
            cu_seqlens=None,
            entropy_stats=self.entropy_stats,
        )


def policy_tensors(shape: torch.Size, acc: torch.dtype, call: PolicyCall) -> PolicyTensors:
    """Check what can be checked of the values, and weigh the tokens, which have this shape."""

    def flat(x: Tensor | None) -> Any:
        return None if x is None else x.reshape(-1).to(acc).contiguous()

    cu_seqlens, mask = call.cu_seqlens, call.mask.reshape(-1)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
        if cu_seqlens.device.type == "cpu":
            check_cu_seqlens(cu_seqlens, shape.numel())
    elif len(shape) > 1:  # every row of [B, L] is a sequence
        cu_seqlens = torch.arange(shape[:-1].numel() + 1, device=mask.device) * shape[-1]
    weight, counts = _weights(call, mask != 0, cu_seqlens, acc)
    if mask.is_floating_point():  # 0.5 is neither: an error where values can be read at no cost, else a NaN loss
        if mask.device.type == "cpu":
            check_mask(mask)
        else:
            weight = weight.masked_fill((mask != 0) & (mask != 1), torch.nan)
    entropy_stats = call.entropy_stats
    if entropy_stats is not None:
        mean, std = entropy_stats.unbind()
        mean = _in_range("entropy_stats mean", mean, -LARGEST, LARGEST)
        entropy_stats = torch.stack((mean, _in_range("entropy_stats std", std, 0, LARGEST)))
    return PolicyTensors(
        old_logprobs=flat(call.old_logprobs),
        advantages=flat(call.advantages),
        weight=weight,
        counts=counts,
        ref_logprobs=flat(call.ref_logprobs),
        rollout_logprobs=flat(call.rollout_logprobs),
        cu_seqlens=cu_seqlens if call.sequence_ratio else None,
        entropy_stats=flat(entropy_stats),
    )


def _weights(
    call: PolicyCall, valid: Tensor, cu_seqlens: Tensor | None, acc: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Each token's share in the loss [T], and how often it counts [T]; None: once where its share is not 0."""
    denominator = call.denominator
    if denominator is not None:
        denominator = _in_range("denominator", denominator, 1 / LARGEST, LARGEST)
    counts = None
    if call.counts is not None:
        counts = call.counts.reshape(-1).to(acc).where(valid, 0.0)
        if counts.device.type == "cpu":
            check_counts(counts)
    if call.weights is None:
        return token_weights(valid, counts, cu_seqlens, call.aggregation, denominator, acc), counts
    weight = call.weights.reshape(-1).to(acc).where(valid, 0.0)
    if counts is None:
        return weight, valid.to(acc)  # a token of weight 0 is measured all the same
    lost = (counts == 0) & (weight != 0)
    if weight.device.type != "cpu":
        return weight.masked_fill(lost, torch.nan), torch.where(lost, 1.0, counts)
    if lost.any():
        at = int(lost.nonzero()[0])
        raise ValueError(f"weights must be 0 where counts is 0; got {weight[at].item()} at position {at}")
    return weight, counts


def run_policy_terms(
    backend: str, logprobs: Tensor, entropy: Tensor | None, tensors: PolicyTensors, numbers: ObjectiveNumbers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stage `policy_terms` for flat log-probs and entropies."""
    old_logprobs, advantages, weight, counts, *others = tensors
    return backends.stage(backend, "policy_terms")(
        logprobs, old_logprobs, advantages, weight, counts, entropy, *others, numbers
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
