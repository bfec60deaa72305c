"""The O(T) part of every policy loss: loss, its two gradients and the metrics from per-token numbers.

The rules are those of reference.policy_terms. One kernel serves all objectives. A program owns a range of tokens: a
block of them, or one packed sequence where the ratio is per sequence. What crosses programs goes through a row of
partial sums each, added up in a fixed order by a last program, so that equal inputs give equal bits.

Everything is float64 inside: a few hundred operations per token are nothing beside the V logits of that token, sums of
1e5 terms keep their digits, and the mean of equal float32 entropies is exact, so their std is exactly 0.
"""

# mypy: allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aepo_kernels.kernels.clip_rule import clip_rule
from aepo_kernels.objective import ENTROPY_NOISE_ULPS, METRICS, ObjectiveNumbers

# A token per thread: 100 registers, 112 with one ratio per sequence (sm_90, Triton 3.6), and 8192 tokens keep 32
# multiprocessors busy. Four tokens per thread took up to 216 registers and kept 8.
BLOCK = 256
NUM_WARPS = 8

# Columns of a program's partial sums: first the metrics.
CLIP_HIGH = tl.constexpr(METRICS.index("clip_fraction_high"))
CLIP_LOW = tl.constexpr(METRICS.index("clip_fraction_low"))
DUAL_CLIP = tl.constexpr(METRICS.index("dual_clip_fraction"))
RATIO_MEAN = tl.constexpr(METRICS.index("ratio_mean"))
RATIO_MAX = tl.constexpr(METRICS.index("ratio_max"))
APPROX_KL = tl.constexpr(METRICS.index("approx_kl"))
ENTROPY_MEAN = tl.constexpr(METRICS.index("entropy_mean"))
ENTROPY_STD = tl.constexpr(METRICS.index("entropy_std"))
FLIPS = tl.constexpr(METRICS.index("advantage_flips"))
KL = tl.constexpr(METRICS.index("kl"))
VALID = tl.constexpr(METRICS.index("valid_tokens"))
LOSS = tl.constexpr(len(METRICS))
COLUMNS = tl.constexpr(triton.next_power_of_2(len(METRICS) + 1))
NOISE = tl.constexpr(ENTROPY_NOISE_ULPS * 2.0**-23)  # of the mean, in float32


@triton.jit
def _load(ptr, token, valid):
    """Values of the valid tokens; masked ones, which may hold NaN, are not read and count as 0."""
    return tl.load(ptr + token, mask=valid, other=0.0).to(tl.float64)


@triton.jit
def _times(weight_ptr, counts_ptr, token, end):
    """How often each token stands for itself; 0 = masked, or not in [0, end)."""
    if counts_ptr is not None:
        times = tl.load(counts_ptr + token, mask=token < end, other=0.0).to(tl.float64)
    else:
        times = (tl.load(weight_ptr + token, mask=token < end, other=0.0) != 0).to(tl.float64)
    return times


@triton.jit(do_not_specialize=["tokens"])
def moments_kernel(entropy_ptr, weight_ptr, counts_ptr, moments_ptr, tokens, BLOCK: tl.constexpr):
    """Program (block): count, mean and sum of squared deviations of its valid entropies, to moments[block]."""
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    times = _times(weight_ptr, counts_ptr, token, tokens)
    entropy = _load(entropy_ptr, token, times != 0)
    count = tl.sum(times, 0)
    mean = tl.sum(times * entropy, 0) / tl.where(count == 0, 1.0, count)
    deviation = entropy - mean
    tl.store(moments_ptr + block * 3, count)
    tl.store(moments_ptr + block * 3 + 1, mean)
    tl.store(moments_ptr + block * 3 + 2, tl.sum(tl.where(times != 0, times * deviation * deviation, 0.0), 0))


@triton.jit
def _mean_std(moments_ptr, blocks, BLOCK: tl.constexpr):
    """Mean and unbiased std of the whole from the moments of its blocks; 0 where there are too few values."""
    count = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        n = _load(moments_ptr, block * 3, block < blocks)
        count += n
        total += n * _load(moments_ptr, block * 3 + 1, block < blocks)
    num = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(num, 1)
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        n = _load(moments_ptr, block * 3, block < blocks)
        shift = _load(moments_ptr, block * 3 + 1, block < blocks) - mean
        squares += _load(moments_ptr, block * 3 + 2, block < blocks) + n * shift * shift
    return mean, tl.sqrt(tl.sum(squares, 0) / tl.maximum(num - 1, 1))


@triton.jit
def _excess(x):
    """exp(x) - 1 - x, which is inf at inf, where the difference would be NaN."""
    return tl.where(x == float("inf"), x, tl.exp(x) - 1 - x)  # float64: exact to 2e-16 where it is about x^2 / 2


@triton.jit
def _product(a, b, c, visible):
    """a b c, where a factor of 0 makes the product 0, also beside an infinite one, except that NaN stays."""
    zero = ((a == 0) | (b == 0) | (c == 0)) & (visible == 0)
    return tl.where(zero, 0.0, a * b * c)


@triton.jit
def _kl(x, estimator):
    """The estimator k1, k2 or k3 of KL(policy || reference) and its slope in logprob; x = ref_logprob - logprob."""
    growth = tl.exp(x) - 1
    kl = tl.where(estimator == 1, -x, tl.where(estimator == 2, x * x / 2, _excess(x)))
    return kl, tl.where(estimator == 1, 1.0, tl.where(estimator == 2, -x, -growth))


@triton.jit
def entropy_factor(numbers, entropy, mean, std):
    """What the entropy-aware advantage multiplies advantages by, not yet clamped."""
    std = tl.where(std <= NOISE * tl.abs(mean), 0.0, std)
    factor = 1 + numbers.entropy_advantage * (entropy - mean) / std
    return tl.where((numbers.entropy_advantage == 0) | (std == 0), 1.0, factor)


@triton.jit
def token_terms(numbers, ratio, logprob, old_logprob, ref_logprob, rollout_logprob, advantage, factor):
    """A valid token's (policy term, its -A F, KL, the KL's slope in logprob, above, below, beyond), not yet weighted.

    The inputs are float64 of one shape; `ref_logprob` and `rollout_logprob` may be None, `factor` multiplies A.
    """
    advantage *= tl.where((factor < 0) & (numbers.clamp_factor != 0), 0.0, factor)
    value, slope, above, below, beyond = clip_rule(numbers, ratio, advantage)
    visible = (logprob != logprob) | (old_logprob != old_logprob) | ~(tl.abs(advantage) < float("inf"))
    importance = tl.full(ratio.shape, 1.0, tl.float64)
    if rollout_logprob is not None:
        importance = tl.exp(old_logprob - rollout_logprob)
        importance = tl.where(importance > numbers.importance_cap, numbers.importance_cap, importance)
        visible |= rollout_logprob != rollout_logprob
    term = _product(-advantage, value, importance, visible)
    term = tl.where(numbers.detached_ratio != 0, _product(term, logprob, 1.0, visible), term)
    grad = _product(-advantage, slope, importance, visible)
    kl, kl_slope = tl.zeros(ratio.shape, tl.float64), tl.zeros(ratio.shape, tl.float64)
    if ref_logprob is not None:
        kl, kl_slope = _kl(ref_logprob - logprob, numbers.kl_estimator)
    return term, grad, kl, kl_slope, above, below, beyond


@triton.jit
def _sum_in(column, index, x):
    """The sum of x in one column of a row of sums, 0 in the others."""
    return tl.where(column == index, tl.sum(x.to(tl.float64), 0), 0.0)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def policy_terms_kernel(
    logprobs_ptr,  # (T,), like all the per-token tensors float32
    old_logprobs_ptr,
    advantages_ptr,
    weight_ptr,
    counts_ptr,  # or None
    entropy_ptr,  # or None
    ref_logprobs_ptr,  # or None
    rollout_logprobs_ptr,  # or None
    cu_seqlens_ptr,  # (N + 1,) int64, or None
    entropy_stats_ptr,  # (2,), or None
    moments_ptr,  # (blocks, 3) float64, None without entropy
    grad_logprobs_ptr,  # (T,)
    grad_entropy_ptr,  # (T,), None without an entropy bonus
    partials_ptr,  # (programs, COLUMNS) float64
    tokens,
    blocks,
    numbers,
    BLOCK: tl.constexpr,
):
    """Program (range of tokens): their gradients, and their sums to partials[program]."""
    program = tl.program_id(0)
    first, end = program * BLOCK, tl.minimum(program * BLOCK + BLOCK, tokens)
    if cu_seqlens_ptr is not None:
        first, end = tl.load(cu_seqlens_ptr + program), tl.load(cu_seqlens_ptr + program + 1)

    sequence_ratio = tl.full((), 1.0, tl.float64)
    num = tl.full((), 1.0, tl.float64)
    if cu_seqlens_ptr is not None:
        total = tl.zeros((BLOCK,), tl.float64)
        count = tl.zeros((BLOCK,), tl.float64)
        for block in range(first, end, BLOCK):
            token = block + tl.arange(0, BLOCK)
            times = _times(weight_ptr, counts_ptr, token, end)
            log_ratio = _load(logprobs_ptr, token, times != 0) - _load(old_logprobs_ptr, token, times != 0)
            total += tl.where(times != 0, times * log_ratio, 0.0)
            count += times
        num = tl.maximum(tl.sum(count, 0), 1)
        sequence_ratio = tl.exp(tl.sum(total, 0) / num)

    if entropy_ptr is not None:
        if entropy_stats_ptr is not None:
            mean, std = tl.load(entropy_stats_ptr).to(tl.float64), tl.load(entropy_stats_ptr + 1).to(tl.float64)
        else:
            mean, std = _mean_std(moments_ptr, blocks, BLOCK)

    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float64)
    ratio_max = tl.zeros((BLOCK,), tl.float64)
    shared = tl.zeros((BLOCK,), tl.float64)  # policy gradient that the tokens of a sequence divide among them
    for block in range(first, end, BLOCK):
        token = block + tl.arange(0, BLOCK)
        times = _times(weight_ptr, counts_ptr, token, end)
        valid = times != 0
        weight = _load(weight_ptr, token, valid)
        logprob = _load(logprobs_ptr, token, valid)
        old_logprob = _load(old_logprobs_ptr, token, valid)
        log_ratio = logprob - old_logprob
        ratio = tl.exp(log_ratio)
        if cu_seqlens_ptr is not None:
            ratio = tl.where(valid, sequence_ratio, 1.0)

        factor = tl.full((BLOCK,), 1.0, tl.float64)
        if entropy_ptr is not None:
            entropy = _load(entropy_ptr, token, valid)
            factor = entropy_factor(numbers, entropy, mean, std)
            sums += _sum_in(column, FLIPS, tl.where(factor < 0, times, 0.0))
        ref_logprob = None
        if ref_logprobs_ptr is not None:
            ref_logprob = _load(ref_logprobs_ptr, token, valid)
        rollout_logprob = None
        if rollout_logprobs_ptr is not None:
            rollout_logprob = _load(rollout_logprobs_ptr, token, valid)
        term, grad, kl, kl_slope, above, below, beyond = token_terms(
            numbers, ratio, logprob, old_logprob, ref_logprob, rollout_logprob,
            _load(advantages_ptr, token, valid), factor,
        )  # fmt: skip

        grad = tl.where(valid, weight * grad, 0.0)
        if cu_seqlens_ptr is not None:
            shared += tl.where(numbers.detached_ratio != 0, 0.0, grad)
            grad = tl.where(numbers.detached_ratio != 0, grad, 0.0)
        if ref_logprobs_ptr is not None:
            sums += _sum_in(column, KL, tl.where(valid, times * kl, 0.0))
            if numbers.kl_coef != 0:  # else a metric alone, which must not carry an inf into the loss
                term += numbers.kl_coef * kl
                grad += tl.where(valid, weight * numbers.kl_coef * kl_slope, 0.0)
        if grad_entropy_ptr is not None:
            term -= numbers.entropy_bonus * entropy
            tl.store(grad_entropy_ptr + token, tl.where(valid, -weight * numbers.entropy_bonus, 0.0), mask=token < end)
        tl.store(grad_logprobs_ptr + token, grad, mask=token < end)

        sums += _sum_in(column, LOSS, tl.where(valid, weight * term, 0.0))
        sums += _sum_in(column, CLIP_HIGH, tl.where(above, times, 0.0))
        sums += _sum_in(column, CLIP_LOW, tl.where(below, times, 0.0))
        sums += _sum_in(column, DUAL_CLIP, tl.where(beyond, times, 0.0))
        sums += _sum_in(column, RATIO_MEAN, tl.where(valid, times * ratio, 0.0))
        sums += _sum_in(column, APPROX_KL, tl.where(valid, times * _excess(log_ratio), 0.0))
        sums += _sum_in(column, VALID, times)
        ratio_max = tl.maximum(ratio_max, tl.where(valid, ratio, 0.0))
    sums += tl.where(column == RATIO_MAX, tl.max(ratio_max, 0), 0.0)
    tl.store(partials_ptr + program * COLUMNS + column, sums)

    if cu_seqlens_ptr is not None:
        tl.debug_barrier()  # the gradients stored above are read back
        share = tl.sum(shared, 0) / num
        for block in range(first, end, BLOCK):
            token = block + tl.arange(0, BLOCK)
            times = _times(weight_ptr, counts_ptr, token, end)
            grad = _load(grad_logprobs_ptr, token, times != 0) + times * share
            tl.store(grad_logprobs_ptr + token, grad, mask=times != 0)


@triton.jit(do_not_specialize=["programs", "blocks"])
def totals_kernel(
    partials_ptr, moments_ptr, loss_ptr, metrics_ptr, programs, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: loss and final metrics from the partial sums of all programs."""
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float64)
    highest = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)[:, None]
        partial = tl.load(partials_ptr + program * COLUMNS + column[None, :], mask=program < programs, other=0.0)
        sums += partial
        highest = tl.maximum(highest, partial)
    total = tl.sum(sums, 0)
    mean = total / tl.maximum(tl.sum(tl.where(column == VALID, total, 0.0), 0), 1)
    result = tl.where((column == LOSS) | (column == VALID) | (column == FLIPS), total, mean)
    ratios = tl.sum(tl.where(column == RATIO_MEAN, total, 0.0), 0)  # a maximum passes NaN by, a sum does not
    result = tl.where(column == RATIO_MAX, tl.where(ratios == ratios, tl.max(highest, 0), ratios), result)
    if moments_ptr is not None:
        entropy_mean, entropy_std = _mean_std(moments_ptr, blocks, BLOCK)
        result = tl.where(column == ENTROPY_MEAN, entropy_mean, result)
        result = tl.where(column == ENTROPY_STD, entropy_std, result)
    tl.store(metrics_ptr + column, result, mask=column < LOSS)
    tl.store(loss_ptr + column - LOSS, result, mask=column == LOSS)


def policy_terms(
    logprobs: Tensor,  # [T] float32, like all the per-token tensors
    old_logprobs: Tensor,
    advantages: Tensor,
    weight: Tensor,  # share of the token in the loss; without counts 0 = masked
    counts: Tensor | None,  # how often each token stands for itself, 0 = masked
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,  # [N + 1] int64; given = one ratio per sequence
    entropy_stats: Tensor | None,  # [2]
    numbers: ObjectiveNumbers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss [], d loss/d logprobs [T], d loss/d entropy [T] or [0] without a bonus, metrics [11]), float32.

    The meaning of every argument and output is that of reference.policy_terms. Deterministic.
    """
    tokens = logprobs.numel()
    blocks = triton.cdiv(tokens, BLOCK)
    programs = blocks if cu_seqlens is None else cu_seqlens.numel() - 1
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(len(METRICS))
    grad_logprobs = torch.empty_like(logprobs)
    grad_entropy = logprobs.new_empty(tokens if numbers.entropy_bonus != 0 else 0)
    partials = logprobs.new_empty(programs, COLUMNS.value, dtype=torch.float64)
    moments = None if entropy is None else logprobs.new_empty(blocks, 3, dtype=torch.float64)
    with torch.cuda.device_of(logprobs):
        if moments is not None:
            moments_kernel[(blocks,)](entropy, weight, counts, moments, tokens, BLOCK=BLOCK, num_warps=NUM_WARPS)
        policy_terms_kernel[(programs,)](
            logprobs, old_logprobs, advantages, weight, counts, entropy, ref_logprobs, rollout_logprobs, cu_seqlens,
            entropy_stats, moments, grad_logprobs, grad_entropy if numbers.entropy_bonus != 0 else None, partials,
            tokens, blocks, numbers, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        totals_kernel[(1,)](
            partials, moments, loss, metrics, programs, blocks, ROWS=32, BLOCK=256, num_warps=4
        )  # fmt: skip
    return loss, grad_logprobs, grad_entropy, metrics
