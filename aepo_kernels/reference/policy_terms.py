"""The O(T) part of every policy loss, in plain PyTorch: loss, its two gradients and the metrics from per-token numbers.

One function serves all objectives, because they differ only in numbers (see `PolicyObjective.terms`): the two clip
bounds, the factor F that multiplies the gradient beyond each bound, the dual-clip bound, and whether the ratio is
detached. With r the ratio and A the final advantage of a token,

    case                        policy term L      dL/dlogprob = -A F
    A > 0 and r > high          -A high            F = grad_high      (PPO 0, AEPO and GPPO high)
    A < 0 and r > dual_clip     -A dual_clip       F = 0
    A < 0 and r < low           -A low             F = grad_low       (PPO and AEPO 0, GPPO low)
    otherwise                   -A r               F = r
    detached ratio (CISPO)      -A clip(r) logprob F = clip(r, low, high)

A factor of 0 makes L and its gradient 0, whatever the others are: a token without advantage counts for nothing, also
where its ratio overflows (an old log-prob of -9999 or -inf), and so does one whose importance weight is 0. Only NaN in
its inputs, or an infinite advantage, still shows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from aepo_kernels.objective import ENTROPY_NOISE_ULPS

METRICS = (
    "clip_fraction_high",
    "clip_fraction_low",
    "dual_clip_fraction",
    "ratio_mean",
    "ratio_max",
    "approx_kl",
    "entropy_mean",
    "entropy_std",
    "advantage_flips",
    "kl",
    "valid_tokens",
)


def policy_terms(
    logprobs: Tensor,  # [T] acc
    old_logprobs: Tensor,  # [T] acc
    advantages: Tensor,  # [T] acc
    weight: Tensor,  # [T] acc: share of the token in the loss, 0 = masked
    entropy: Tensor | None,  # [T] acc
    ref_logprobs: Tensor | None,  # [T] acc
    rollout_logprobs: Tensor | None,  # [T] acc
    cu_seqlens: Tensor | None,  # [N + 1] int64; given = one ratio per sequence
    entropy_stats: Tensor | None,  # [2] acc: mean, std; None = those of this call's valid tokens
    low: float,
    high: float,
    grad_low: float,
    grad_high: float,
    dual_clip: float,  # inf = off
    detached_ratio: bool,
    entropy_advantage: float,  # 0 = off
    clamp_factor: bool,
    kl_coef: float,
    kl_estimator: int,  # 1, 2, 3
    entropy_bonus: float,
    importance_cap: float,  # inf = uncapped
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss [], d loss/d logprobs [T], d loss/d entropy [T] or [0] without a bonus, metrics [11] as in METRICS).

    "acc" is float32 or float64, the same for all. Fractions and means in the metrics are over the valid tokens.
    """
    valid = weight != 0
    count = valid.sum().to(weight.dtype)

    def masked(x: Tensor) -> Tensor:
        return x.where(valid, 0.0)  # a select: masked tokens may hold NaN, which a product would keep

    def mean(x: Tensor) -> Tensor:
        return masked(x).sum() / count.clamp(min=1)

    entropy_mean, entropy_std = torch.zeros_like(count), torch.zeros_like(count)
    if entropy is not None:
        entropy_mean, entropy_std = _mean_std(entropy, valid, count)
    factor = torch.ones_like(weight)
    if entropy_advantage != 0:
        assert entropy is not None, "the entropy-aware advantage needs the entropy"
        m, s = (entropy_mean, entropy_std) if entropy_stats is None else entropy_stats.unbind()
        noise = s <= ENTROPY_NOISE_ULPS * torch.finfo(s.dtype).eps * m.abs()
        factor = torch.where(noise, factor, 1 + entropy_advantage * (entropy - m) / s)
    a = advantages * (factor.clamp(min=0) if clamp_factor else factor)

    log_ratio = masked(logprobs - old_logprobs)
    visible = logprobs.isnan() | old_logprobs.isnan() | ~a.isfinite()
    segments = None if cu_seqlens is None else _Segments(cu_seqlens, valid)
    ratio = (log_ratio if segments is None else segments.mean(log_ratio)).exp()

    if detached_ratio:
        above, below, beyond = ratio > high, ratio < low, torch.zeros_like(valid)
        value = slope = _choose(ratio, (above, high), (below, low))
    else:
        above, below, beyond = (a > 0) & (ratio > high), (a < 0) & (ratio < low), (a < 0) & (ratio > dual_clip)
        slope = _choose(ratio, (above, grad_high), (beyond, 0.0), (below, grad_low))
        value = _choose(ratio, (above, high), (beyond, dual_clip), (below, low))
    importance = torch.ones_like(weight)
    if rollout_logprobs is not None:
        importance = (old_logprobs - rollout_logprobs).exp().clamp(max=importance_cap)
        visible = visible | rollout_logprobs.isnan()

    def product(*factors: Tensor) -> Tensor:
        zero = torch.stack([x == 0 for x in factors]).any(0) & ~visible
        return functools.reduce(torch.mul, factors).masked_fill(zero, 0.0)

    terms, grad = product(-a, value, importance), masked(weight * product(-a, slope, importance))
    if detached_ratio:
        terms = product(terms, logprobs)
    if segments is not None and not detached_ratio:
        grad = segments.mean(grad)  # the ratio's gradient is ratio / n for every valid token of its sequence
    kl = torch.zeros_like(weight)
    if ref_logprobs is not None:
        kl, kl_slope = _kl(ref_logprobs - logprobs, kl_estimator)
        if kl_coef != 0:
            terms, grad = terms + kl_coef * kl, grad + masked(weight * kl_coef * kl_slope)
    grad_entropy = weight.new_empty(0)
    if entropy_bonus != 0:
        assert entropy is not None, "the entropy bonus needs the entropy"
        terms, grad_entropy = terms - entropy_bonus * entropy, masked(-weight * entropy_bonus)

    metrics = {
        "clip_fraction_high": mean(above.to(weight.dtype)),
        "clip_fraction_low": mean(below.to(weight.dtype)),
        "dual_clip_fraction": mean(beyond.to(weight.dtype)),
        "ratio_mean": mean(ratio),
        "ratio_max": torch.cat((masked(ratio), ratio.new_zeros(1))).max(),  # the extra 0 serves T = 0
        "approx_kl": mean(_excess(log_ratio)),
        "entropy_mean": entropy_mean,
        "entropy_std": entropy_std,
        "advantage_flips": masked((factor < 0).to(weight.dtype)).sum(),
        "kl": mean(kl),
        "valid_tokens": count,
    }
    return masked(weight * terms).sum(), grad, grad_entropy, torch.stack([metrics[name] for name in METRICS])


def _choose(otherwise: Tensor, *cases: tuple[Tensor, float]) -> Tensor:
    """The value of the first case that holds, per token. A NaN ratio holds no case, so it stays visible."""
    for condition, value in reversed(cases):
        otherwise = otherwise.masked_fill(condition, value)
    return otherwise


def _kl(x: Tensor, estimator: int) -> tuple[Tensor, Tensor]:
    """The estimator k1, k2 or k3 of KL(policy || reference) and its slope in logprob; x = ref_logprobs - logprobs."""
    if estimator == 1:
        return -x, torch.ones_like(x)
    if estimator == 2:
        return x * x / 2, -x
    return _excess(x), -x.expm1()


def _excess(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, which grows beyond all bounds on either side: inf at inf, where the difference would be NaN."""
    return torch.where(x == torch.inf, torch.inf, x.expm1() - x)


def _mean_std(x: Tensor, valid: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std of the valid entries; both 0 without any, std 0 below two.

    Two passes about one of the values: E[x^2] - E[x]^2 cancels, and equal values must give a std of exactly 0, or the
    rounding noise of the mean would be divided by itself.
    """
    pivot = torch.cat((x.where(valid, -torch.inf), x.new_full((1,), -torch.inf))).max()
    shifted = (x - pivot).where(valid, 0.0)
    mean = shifted.sum() / count.clamp(min=1)
    m2 = (shifted - mean).where(valid, 0.0).square().sum()
    return (pivot + mean).where(count > 0, 0.0), (m2 / (count - 1).clamp(min=1)).sqrt()


class _Segments:
    """Means over the valid tokens of packed sequences, handed back to each valid token (0 on masked ones)."""

    def __init__(self, cu_seqlens: Tensor, valid: Tensor) -> None:
        self.offsets, self.valid = cu_seqlens, valid
        lengths = cu_seqlens.diff()
        self.index = torch.arange(len(lengths), device=valid.device).repeat_interleave(lengths)

    def mean(self, x: Tensor) -> Tensor:
        count = self._sum(self.valid.to(x.dtype)).clamp(min=1)
        return (self._sum(x) / count)[self.index].where(self.valid, 0.0)

    def _sum(self, x: Tensor) -> Tensor:  # x is 0 on masked tokens
        # Not index_add: on CUDA its atomics add in any order, and equal inputs must give equal bits.
        return torch.segment_reduce(x, "sum", offsets=self.offsets, initial=0.0)
