"""The O(T) part of every policy loss, in plain PyTorch: loss, its two gradients and the metrics from per-token numbers.

The clip rule has a room of its own, clip_rule.py. Around it stand the entropy-aware advantage, the ratio (per token or
per sequence), the importance weight, KL, entropy bonus and metrics.

A factor of 0 makes L and its gradient 0, whatever the others are: a token without advantage counts for nothing, also
where its ratio overflows (an old log-prob of -9999 or -inf), and so does one whose importance weight is 0. Only NaN in
its inputs, or an infinite advantage, still shows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from aepo_kernels.objective import ENTROPY_NOISE_ULPS, METRICS, ObjectiveNumbers
from aepo_kernels.reference.clip_rule import clip_rule


def policy_terms(
    logprobs: Tensor,  # [T] acc
    old_logprobs: Tensor,  # [T] acc
    advantages: Tensor,  # [T] acc
    weight: Tensor,  # [T] acc: share of the token in the loss; without counts 0 = masked
    counts: Tensor | None,  # [T] acc: how often each token stands for itself, 0 = masked; None: once
    entropy: Tensor | None,  # [T] acc
    ref_logprobs: Tensor | None,  # [T] acc
    rollout_logprobs: Tensor | None,  # [T] acc
    cu_seqlens: Tensor | None,  # [N + 1] int64; given = one ratio per sequence
    entropy_stats: Tensor | None,  # [2] acc: mean, std; None = those of this call's valid tokens
    numbers: ObjectiveNumbers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss [], d loss/d logprobs [T], d loss/d entropy [T] or [0] without a bonus, metrics [11] as in METRICS).

    "acc" is float32 or float64, the same for all. Metrics, entropy statistics and the mean log-ratio of a sequence
    count a token `counts` times; the loss does not, its weight says all.
    """
    valid = (weight if counts is None else counts) != 0
    times = valid.to(weight.dtype) if counts is None else counts
    count = times.sum()

    def masked(x: Tensor) -> Tensor:
        return x.where(valid, 0.0)  # a select: masked tokens may hold NaN, which a product would keep

    def mean(x: Tensor) -> Tensor:
        return (times * masked(x)).sum() / count.clamp(min=1)

    entropy_mean, entropy_std = torch.zeros_like(count), torch.zeros_like(count)
    if entropy is not None:
        entropy_mean, entropy_std = _mean_std(entropy, times)
    factor = torch.ones_like(weight)
    if numbers.entropy_advantage != 0:
        assert entropy is not None, "the entropy-aware advantage needs the entropy"
        m, s = (entropy_mean, entropy_std) if entropy_stats is None else entropy_stats.unbind()
        noise = s <= ENTROPY_NOISE_ULPS * torch.finfo(s.dtype).eps * m.abs()
        factor = torch.where(noise, factor, 1 + numbers.entropy_advantage * (entropy - m) / s)
    a = advantages * (factor.clamp(min=0) if numbers.clamp_factor else factor)

    log_ratio = masked(logprobs - old_logprobs)
    visible = logprobs.isnan() | old_logprobs.isnan() | ~a.isfinite()
    segments = None if cu_seqlens is None else _Segments(cu_seqlens, times)
    ratio = (log_ratio if segments is None else segments.mean(times * log_ratio)).exp()

    clipped = clip_rule(numbers, ratio, a)
    importance = torch.ones_like(weight)
    if rollout_logprobs is not None:
        importance = (old_logprobs - rollout_logprobs).exp().clamp(max=numbers.importance_cap)
        visible = visible | rollout_logprobs.isnan()

    def product(*factors: Tensor) -> Tensor:
        zero = torch.stack([x == 0 for x in factors]).any(0) & ~visible
        return functools.reduce(torch.mul, factors).masked_fill(zero, 0.0)

    terms, grad = product(-a, clipped.value, importance), masked(weight * product(-a, clipped.slope, importance))
    if numbers.detached_ratio:
        terms = product(terms, logprobs)
    elif segments is not None:
        # The ratio's gradient is ratio / n for each of the n tokens of its sequence, so they share the sum of theirs.
        grad = times * segments.mean(grad)
    kl = torch.zeros_like(weight)
    if ref_logprobs is not None:
        kl, kl_slope = _kl(ref_logprobs - logprobs, numbers.kl_estimator)
        if numbers.kl_coef != 0:
            terms, grad = terms + numbers.kl_coef * kl, grad + masked(weight * numbers.kl_coef * kl_slope)
    grad_entropy = weight.new_empty(0)
    if numbers.entropy_bonus != 0:
        assert entropy is not None, "the entropy bonus needs the entropy"
        terms, grad_entropy = terms - numbers.entropy_bonus * entropy, masked(-weight * numbers.entropy_bonus)

    metrics = {
        "clip_fraction_high": mean(clipped.above.to(weight.dtype)),
        "clip_fraction_low": mean(clipped.below.to(weight.dtype)),
        "dual_clip_fraction": mean(clipped.beyond.to(weight.dtype)),
        "ratio_mean": mean(ratio),
        "ratio_max": torch.cat((masked(ratio), ratio.new_zeros(1))).max(),  # the extra 0 serves T = 0
        "approx_kl": mean(_excess(log_ratio)),
        "entropy_mean": entropy_mean,
        "entropy_std": entropy_std,
        "advantage_flips": (times * (factor < 0)).sum(),
        "kl": mean(kl),
        "valid_tokens": count,
    }
    return masked(weight * terms).sum(), grad, grad_entropy, torch.stack([metrics[name] for name in METRICS])


def _kl(x: Tensor, estimator: float) -> tuple[Tensor, Tensor]:
    """The estimator k1, k2 or k3 of KL(policy || reference) and its slope in logprob; x = ref_logprobs - logprobs."""
    if estimator == 1:
        return -x, torch.ones_like(x)
    if estimator == 2:
        return x * x / 2, -x
    return _excess(x), -x.expm1()


def _excess(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, which grows beyond all bounds on either side: inf at inf, where the difference would be NaN."""
    return torch.where(x == torch.inf, torch.inf, x.expm1() - x)


def _mean_std(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std of the entries, each taken `times` times; both 0 without any, std 0 below two.

    Two passes about one of the values: E[x^2] - E[x]^2 cancels, and equal values must give a std of exactly 0, or the
    rounding noise of the mean would be divided by itself.
    """
    valid, count = times != 0, times.sum()
    pivot = torch.cat((x.where(valid, -torch.inf), x.new_full((1,), -torch.inf))).max()
    shifted = (x - pivot).where(valid, 0.0)
    mean = (times * shifted).sum() / count.clamp(min=1)
    m2 = (times * (shifted - mean).square()).sum()
    return (pivot + mean).where(count > 0, 0.0), (m2 / (count - 1).clamp(min=1)).sqrt()


class _Segments:
    """Sums over the tokens of packed sequences divided by how many these are, handed back to each valid token."""

    def __init__(self, cu_seqlens: Tensor, times: Tensor) -> None:
        self.offsets, self.times = cu_seqlens, times
        lengths = cu_seqlens.diff()
        self.index = torch.arange(len(lengths), device=times.device).repeat_interleave(lengths)

    def mean(self, x: Tensor) -> Tensor:  # x is 0 on masked tokens
        count = self._sum(self.times).clamp(min=1)
        return (self._sum(x) / count)[self.index].where(self.times != 0, 0.0)

    def _sum(self, x: Tensor) -> Tensor:
        # Not index_add: on CUDA its atomics add in any order, and equal inputs must give equal bits.
        return torch.segment_reduce(x, "sum", offsets=self.offsets, initial=0.0)
