"""The policy loss straight from hidden states and the lm_head's weight; the [T, V] logits never exist.

Tokens that do not count take part in no product. The schedules are those of ops/linear.py. `keep` makes loss and
gradients in one pass of three products; it needs coefficients that follow from each token alone. Where they wait for
all tokens (entropy statistics of this call, one ratio per sequence), `recompute` makes the logits again: four products.

Registers aepo::linear_policy_loss; the backward of the second schedule is aepo::linear_grad.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.objective import PolicyObjective, Terms
from aepo_kernels.ops import linear, rows
from aepo_kernels.ops.checks import check_labels, check_temperature
from aepo_kernels.ops.linear_logprobs_and_entropy import check_linear, fake_gradients, flat_rows, own_shape
from aepo_kernels.ops.merge import TokenStats
from aepo_kernels.ops.policy_arguments import ENTROPY_BONUS, MASK, POLICY_ARGS, policy_arguments
from aepo_kernels.ops.policy_loss import (
    NUM_TENSORS,
    PolicyLoss,
    policy_metrics,
    policy_tensors,
    policy_terms_fake,
    run_policy_terms,
)
from aepo_kernels.ops.vocab_parallel import Shard, local_labels, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Positions in POLICY_ARGS of what decides the schedule.
ENTROPY_STATS, SEQUENCE_RATIO, ENTROPY_ADVANTAGE = 6, 9, 16
# `keep` chooses the scale of the weight's gradient before it knows the ratios and entropies that multiply advantages.
# With float16 operands (CUDA) they may make a coefficient 2^12 times larger before the gradient becomes inf.
HEADROOM = 2.0**10

torch.library.define(
    "aepo::linear_policy_loss",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, str? group, int vocab_start, bool sequence_parallel, "
    f"bool[] wanted, bool keep, float temperature, float? softcap, {POLICY_ARGS}) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_logprobs, Tensor grad_entropy, "
    "Tensor maximum, Tensor log_sum, Tensor entropy, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor scale)",
)


def _keeps(schedule: str | None, tokens: int, place: str, policy_args: tuple[Any, ...]) -> bool:
    """Whether the logits are kept: as asked for, else where they are few beside the [T, V] that this avoids."""
    if schedule not in (None, "keep", "recompute"):
        raise ValueError(f"schedule must be None, 'keep' or 'recompute'; got {schedule!r}")
    known = policy_args[ENTROPY_STATS] is not None or policy_args[ENTROPY_ADVANTAGE] == 0
    possible = known and not policy_args[SEQUENCE_RATIO]
    if schedule == "keep" and not possible:
        raise ValueError(
            "schedule='keep' needs coefficients that follow from each token alone: entropy_stats with an entropy-aware "
            "advantage, and ratio_level='token'"
        )
    return possible and (schedule == "keep" or (schedule is None and tokens >= linear.TILING[place].keep_from))


@torch.library.impl("aepo::linear_policy_loss", "CompositeExplicitAutograd")
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: str | None,
    vocab_start: int,
    sequence_parallel: bool,
    wanted: list[bool],
    keep: bool,
    temperature: float,
    softcap: float | None,
    *policy_args: Any,
) -> tuple[Tensor, ...]:
    *numbers, backend = policy_args[NUM_TENSORS:]
    backend = backends.resolve(backend, hidden)
    shard = Shard(group, vocab_start)
    schedule: Literal["keep", "recompute"] = "keep" if keep else "recompute"
    head = linear.Head(weight, bias, temperature, softcap, backend, shard, sequence_parallel, schedule)
    masked = policy_args[MASK] == 0
    if labels.device.type == "cpu" and group is None:
        check_labels(labels, masked, len(weight))
    tensors = policy_tensors(labels.shape, head.acc, *policy_args[:NUM_TENSORS])
    flat_hidden, flat_labels = flat_rows(hidden, labels, masked)
    used = (~masked).reshape(-1).nonzero()[:, 0]

    grads, scale = [head.empty(0) for _ in range(3)], head.empty(0)
    if keep:
        of_used = tensors.of_tokens(used)
        terms = Terms(*numbers)
        typical = linear.Coefficients(
            of_used.weight * (of_used.advantages.abs() + terms.kl_coef), of_used.weight * terms.entropy_bonus
        )
        size = linear.largest(typical.sizes(temperature)) * HEADROOM

        def coefficients(chunk: slice, stats: TokenStats) -> linear.Coefficients:
            _, grad_logprobs, grad_entropy, _ = run_policy_terms(
                backend, stats.logprobs, stats.entropy, of_used.of_tokens(chunk), numbers
            )
            return linear.Coefficients(grad_logprobs, grad_entropy if policy_args[ENTROPY_BONUS] != 0 else None)

        stats, found, scale = linear.statistics_and_gradients(
            head, flat_hidden, flat_labels, used, coefficients, size, linear.Wanted(*wanted)
        )
        grads = list(found)
        if wanted[0]:
            grads[0] = found.hidden.view(own_shape(hidden, group, sequence_parallel))
    else:
        stats = linear.statistics(head, flat_hidden[used], flat_labels[used])
    logprobs, entropy, maximum, log_sum = (x.new_zeros(labels.numel()).index_copy_(0, used, x) for x in stats)
    loss, grad_logprobs, grad_entropy, metrics = run_policy_terms(backend, logprobs, entropy, tensors, numbers)
    return loss, metrics, grad_logprobs, grad_entropy, maximum, log_sum, entropy, *grads, scale


@torch.library.register_fake("aepo::linear_policy_loss")
def _linear_policy_loss_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: str | None,
    vocab_start: int,
    sequence_parallel: bool,
    wanted: list[bool],
    keep: bool,
    temperature: float,
    softcap: float | None,
    *policy_args: Any,
) -> tuple[Tensor, ...]:
    stats = [hidden.new_empty(labels.numel(), dtype=rows.acc_dtype(hidden.dtype)) for _ in range(3)]
    loss, grad_logprobs, grad_entropy, metrics = policy_terms_fake(stats[0], None, *policy_args)
    grads = fake_gradients(hidden, weight, group, sequence_parallel, wanted if keep else [False] * 3)
    sums = (x.to(stats[0].dtype) for x in grads)
    return loss, metrics, grad_logprobs, grad_entropy, *stats, *sums, stats[0].new_empty(() if keep else 0)


class _LinearPolicyLoss(torch.autograd.Function):
    """(hidden, weight, labels, bias, shard, sequence_parallel, wanted, keep, temperature, softcap, *policy_args) ->
    (loss, metrics), differentiable once in hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        shard: Shard,
        sequence_parallel: bool,
        wanted: list[bool],
        keep: bool,
        temperature: float,
        softcap: float | None,
        *policy_args: Any,
    ) -> tuple[Tensor, Tensor]:
        if sequence_parallel and shard.group is not None:
            hidden = torch.ops.aepo.gather_tokens(hidden, shard.group)
        loss, metrics, *others = torch.ops.aepo.linear_policy_loss(
            hidden, weight, labels, bias, *shard, sequence_parallel, wanted, keep, temperature, softcap, *policy_args
        )
        *coefficients_and_stats, grad_hidden, grad_weight, grad_bias, scale = others
        ctx.keep, ctx.wanted, ctx.others = keep, wanted, len(policy_args)
        if keep:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, scale)
            ctx.dtype, ctx.backend = hidden.dtype, policy_args[-1]
        else:
            ctx.save_for_backward(hidden, weight, labels, bias, *coefficients_and_stats)
            ctx.where = (shard.group, sequence_parallel, wanted)
            ctx.settings = (temperature, softcap, rows.NO_LABEL, policy_args[-1])
            ctx.has_bonus = policy_args[ENTROPY_BONUS] != 0
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.keep:
            *sums, scale = ctx.saved_tensors
            factors = (grad_loss, grad_loss * scale, grad_loss)
            grads = tuple(
                torch.ops.aepo.scaled_cast(x, factor, ctx.dtype, ctx.backend)
                for x, factor in zip(sums, factors, strict=True)
            )
        else:
            hidden, weight, labels, bias, grad_logprobs, grad_entropy, *stats = ctx.saved_tensors
            # Masked tokens have coefficient 0, and with it no part in anything: their labels may be anything.
            grads = torch.ops.aepo.linear_grad(
                hidden, weight, labels, bias, *stats, grad_loss * grad_logprobs,
                grad_loss * grad_entropy if ctx.has_bonus else None, *ctx.where, *ctx.settings,
            )  # fmt: skip
        hidden_grad, weight_grad, bias_grad = (
            grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True)
        )
        return hidden_grad, weight_grad, None, bias_grad, *[None] * (6 + ctx.others)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: PolicyObjective,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy_stats: tuple[float | Tensor, float | Tensor] | None = None,
    denominator: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    sequence_parallel: bool = False,
    schedule: Literal["keep", "recompute"] | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The policy loss of `objective` from hidden states [.., D] and the lm_head (as in `linear_logprobs_and_entropy`).

    Everything else is as in `logits_policy_loss`: tokens whose mask is 0 cost nothing, their hidden states may be NaN
    and their labels anything. Differentiable once in hidden, weight and bias; only the gradients that somebody needs
    are computed, so a frozen weight costs no product and no memory.

    schedule="recompute": the forward takes one product and holds per-token numbers; the backward takes three more, for
    the tokens that have a gradient (not those clipped without one), and holds one tile. schedule="keep": the forward
    takes three products in all, holds the float32 logits of 512 tokens meanwhile (CUDA: of 4096, and their 16-bit
    gradient), and leaves the gradients' float32 sums, [V, D] for the weight, to the backward, which scales and rounds
    them. That needs a gradient that follows from each token alone: one ratio per token, and `entropy_stats` given (say,
    of the old policy's entropies over the batch) if the advantage is entropy-aware; else ValueError. None takes "keep"
    where it can, from 2048 tokens on (CUDA: 8192). On CUDA counting tokens synchronises.

    However the loss is scaled, 16-bit gradients are rounded once and last, so a float16 gradient is 0 or inf only where
    its scaled value is beyond float16. One exception: on CUDA, "keep" in float16 gives inf where ratios and entropies
    make a token's coefficient 4096 times the largest one that advantages and weights alone would.

    `process_group`, `vocab_start` and `sequence_parallel` are as in `linear_logprobs_and_entropy`; all that is per
    token is given for all tokens and the same on every rank, and so are loss and metrics. schedule="keep" makes all its
    collectives in the forward: an all-gather per chunk of kept tokens, and the sum of the hidden states' gradient.
    """
    shard = shard_of(process_group, vocab_start)
    check_linear(hidden, weight, labels, bias, softcap, process_group, sequence_parallel)
    check_temperature(temperature)
    labels, _ = local_labels(labels.to(torch.int64), rows.NO_LABEL, shard)
    args = policy_arguments(
        labels.shape,
        hidden,
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
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    keep = _keeps(schedule, labels.numel(), linear.place(hidden), args) and any(wanted)
    softcap = None if softcap is None else float(softcap)
    loss, metrics = _LinearPolicyLoss.apply(
        hidden, weight, labels, bias, shard, sequence_parallel, wanted, keep, float(temperature), softcap, *args
    )
    return PolicyLoss(loss, policy_metrics(loss, metrics, objective, True, ref_logprobs is not None))
