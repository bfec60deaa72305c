"""The arguments that the policy losses share, checked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aepo_kernels.objective import LARGEST, PolicyObjective
from aepo_kernels.ops.call import PolicyCall
from aepo_kernels.ops.checks import check_device, check_float_tensor, check_integer, check_like, check_mask_tensor
from aepo_kernels.ops.rows import acc_dtype


def policy_arguments(
    shape: torch.Size,
    like: Tensor,
    objective: PolicyObjective,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    has_entropy: bool,
    weights: Tensor | None,
    counts: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    entropy_stats: tuple[float | Tensor, float | Tensor] | None,
    denominator: float | Tensor | None,
    backend: str | None,
) -> PolicyCall:
    """The arguments of a call whose tokens have this shape and lie beside `like`."""
    if not isinstance(objective, PolicyObjective):
        raise TypeError(f"objective must be a PolicyObjective, e.g. PolicyObjective.preset('aepo'); got {objective!r}")
    advantages = _per_token(advantages, shape)
    per_token = {"old_logprobs": old_logprobs, "advantages": advantages}
    optional = {"weights": weights, "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs}
    for name, x in (per_token | {name: x for name, x in optional.items() if x is not None}).items():
        check_like(name, x, "the tokens", shape, like.device)
        check_float_tensor(name, x)
    check_mask_tensor(mask, shape, like.device)
    if counts is not None:
        check_like("counts", counts, "the tokens", shape, like.device)
        if counts.is_complex() or counts.dtype == torch.bool:
            raise TypeError(f"counts must hold whole numbers, integer or floating point; got {counts.dtype}")
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1:
            raise TypeError("cu_seqlens must be a 1-D integer tensor [N + 1]")
        check_integer("cu_seqlens", cu_seqlens)
        check_device("cu_seqlens", cu_seqlens, "the tokens", like.device)
    objective.check_inputs(
        entropy=has_entropy,
        entropy_stats=entropy_stats is not None,
        ref_logprobs=ref_logprobs is not None,
        rollout_logprobs=rollout_logprobs is not None,
        cu_seqlens=cu_seqlens is not None or len(shape) > 1,
        denominator=denominator is not None,
        weights=weights is not None,
    )
    stats = None
    if entropy_stats is not None:
        if not isinstance(entropy_stats, (tuple, list)) or len(entropy_stats) != 2:
            raise TypeError("entropy_stats must be a pair (mean, std)")
        mean, std = entropy_stats
        stats = torch.stack([_scalar("entropy_stats mean", mean, like), _scalar("entropy_stats std", std, like, 0.0)])
    share = None if denominator is None else _scalar("denominator", denominator, like, math.ulp(0.0))
    return PolicyCall(
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        weights=weights,
        counts=counts,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        cu_seqlens=cu_seqlens,
        entropy_stats=stats,
        denominator=share,
        aggregation=objective.aggregation,
        sequence_ratio=objective.ratio_level == "sequence",
        numbers=list(objective.numbers()),
        backend=backend,
    )


def _per_token(advantages: Tensor, shape: torch.Size) -> Tensor:
    """Advantages of [B, L] tokens, also where each sequence has one: [B] or [B, 1]."""
    if not isinstance(advantages, Tensor) or len(shape) < 2 or advantages.shape == shape:
        return advantages
    if advantages.shape == shape[:-1]:
        advantages = advantages[..., None]
    return advantages.expand(shape) if advantages.shape == (*shape[:-1], 1) else advantages


def _scalar(name: str, x: float | Tensor, like: Tensor, minimum: float = -math.inf) -> Tensor:
    """A number or one-element tensor as a tensor [] beside `like`; the value of a tensor is not read."""
    if isinstance(x, Tensor):
        if x.numel() != 1:
            raise ValueError(f"{name} must be one number; got a tensor of shape {tuple(x.shape)}")
        if x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number; got {x.dtype}")
        return x.detach().reshape(()).to(device=like.device, dtype=acc_dtype(like.dtype))
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or a one-element tensor; got {type(x).__name__}")
    if not minimum <= x < math.inf:
        raise ValueError(f"{name} must be finite and {'> 0' if minimum > 0 else f'>= {minimum}'}; got {x}")
    if abs(x) > LARGEST or 0 < minimum <= x < 1 / LARGEST:
        raise ValueError(f"{name} must be of a size from {1 / LARGEST:g} to {LARGEST:g}; got {x}")
    # A product and not torch.full, which would make x, new in every batch, a constant of torch.compile's graph.
    return torch.ones((), dtype=acc_dtype(like.dtype), device=like.device) * x
