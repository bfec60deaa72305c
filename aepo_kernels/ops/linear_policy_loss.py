"""The policy loss straight from hidden states and the lm_head's weight; the [T, V] logits never exist.

Tokens that do not count take part in no product. The schedules are those of ops/linear.py. `keep` makes loss and
gradients in one pass of three products; it needs coefficients that follow from each token alone. Where they wait for
all tokens (entropy statistics of this call, one ratio per sequence), `recompute` makes the logits again: four products.

Registers aepo::linear_policy_loss, the `keep` schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.objective import METRICS, ObjectiveNumbers, PolicyObjective
from aepo_kernels.ops import linear, rows
from aepo_kernels.ops.call import POLICY_CALL, PolicyCall
from aepo_kernels.ops.checks import check_labels, check_temperature
from aepo_kernels.ops.linear_logprobs_and_entropy import (
    check_linear,
    fake_gradients,
    flat_rows,
    in_shape_of,
    linear_loss_statistics,
    of_all_tokens,
    only,
)
from aepo_kernels.ops.merge import TokenStats
from aepo_kernels.ops.policy_arguments import policy_arguments
from aepo_kernels.ops.policy_loss import PolicyLoss, loss_of_call, policy_metrics
from aepo_kernels.ops.policy_tensors import policy_tensors, run_policy_terms
from aepo_kernels.ops.vocab_parallel import Shard, local_labels, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Schedule = Literal["keep", "recompute"]

torch.library.define(
    "aepo::linear_policy_loss",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, str? group, int vocab_start, bool sequence_parallel, "
    f"bool[] wanted, float temperature, float? softcap, ScalarType? operand_dtype, {POLICY_CALL}) "
    "-> (Tensor loss, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor scale)",
)


def keeps(schedule: str | None, possible: bool, needed: str, hidden: Tensor, tokens: int) -> bool:
    """Whether the logits are kept: as asked for, else where they are few beside the [T, V] that this avoids."""
    if schedule not in (None, "keep", "recompute"):
        raise ValueError(f"schedule must be None, 'keep' or 'recompute'; got {schedule!r}")
    if schedule == "keep" and not possible:
        raise ValueError(f"schedule='keep' needs coefficients that follow from each token alone: {needed}")
    return possible and (
        schedule == "keep" or (schedule is None and tokens >= linear.TILING[linear.place(hidden)].keep_from)
    )


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
    temperature: float,
    softcap: float | None,
    operand_dtype: torch.dtype | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    call = PolicyCall(*args)
    numbers, backend = ObjectiveNumbers(*call.numbers), backends.resolve(call.backend, hidden)
    shard = Shard(group, vocab_start)
    head = linear.Head(weight, bias, temperature, softcap, backend, shard, sequence_parallel, "keep", operand_dtype)
    masked = labels == rows.NO_LABEL
    if labels.device.type == "cpu" and group is None:
        check_labels(labels, masked, len(weight))
    tensors = policy_tensors(labels.shape, head.acc, call)
    flat_hidden, flat_labels = flat_rows(hidden, labels, masked)
    used = (~masked).reshape(-1).nonzero()[:, 0]
    of_used = tensors.of_tokens(used)
    # Ratios and entropies, not known yet, will multiply these.
    typical = linear.Coefficients(
        of_used.weight * (of_used.advantages.abs() + numbers.kl_coef), of_used.weight * numbers.entropy_bonus
    )

    def coefficients(chunk: slice, stats: TokenStats) -> linear.Coefficients:
        _, grad_logprobs, grad_entropy, _ = run_policy_terms(
            backend, stats.logprobs, stats.entropy, of_used.of_tokens(chunk), numbers
        )
        return linear.Coefficients(grad_logprobs, grad_entropy if numbers.entropy_bonus != 0 else None)

    size = linear.largest(typical.sizes(temperature))
    stats, grads, scale = linear.statistics_and_gradients(
        head, flat_hidden, flat_labels, used, coefficients, size, linear.Wanted(*wanted)
    )
    logprobs, entropy, *_ = of_all_tokens(stats, used, torch.Size([labels.numel()]))
    loss, _, _, metrics = run_policy_terms(backend, logprobs, entropy, tensors, numbers)
    return loss, metrics, *in_shape_of(hidden, grads, group, sequence_parallel), scale


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
    *others: Any,
) -> tuple[Tensor, ...]:
    def acc(shape: Any) -> Tensor:
        return hidden.new_empty(shape, dtype=rows.acc_dtype(hidden.dtype))

    sums = (acc(x.shape) for x in fake_gradients(hidden, weight, group, sequence_parallel, wanted))
    return acc(()), acc(len(METRICS)), *sums, acc(())


class KeptGradients(torch.autograd.Function):
    """(hidden, weight, bias, loss, float32 sums of their gradients, scale of the weight's, backend) -> loss, whose
    gradients in the first three are these sums times its own, rounded once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        grad_hidden: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
        scale: Tensor,
        backend: str | None,
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, scale)
        ctx.dtype, ctx.backend = hidden.dtype, backend
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *sums, scale = ctx.saved_tensors
        factors = (grad_loss, grad_loss * scale, grad_loss)
        grads = tuple(
            torch.ops.aepo.scaled_cast(x, factor, ctx.dtype, ctx.backend)
            for x, factor in zip(sums, factors, strict=True)
        )
        return *only(list(ctx.needs_input_grad[:3]), grads), *[None] * 6


def wanted_gradients(*inputs: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]


def all_tokens(hidden: Tensor, shard: Shard, sequence_parallel: bool) -> Tensor:
    """The hidden states of all ranks' tokens, without a gradient."""
    hidden = hidden.detach()
    gathers = sequence_parallel and shard.group is not None
    return torch.ops.aepo.gather_tokens(hidden, shard.group) if gathers else hidden


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
    weights: Tensor | None = None,
    counts: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entropy_stats: tuple[float | Tensor, float | Tensor] | None = None,
    denominator: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    sequence_parallel: bool = False,
    schedule: Schedule | None = None,
    operand_dtype: torch.dtype | None = None,
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
    `operand_dtype` is as there too.
    """
    shard = shard_of(process_group, vocab_start)
    check_linear(hidden, weight, labels, bias, softcap, process_group, sequence_parallel, operand_dtype)
    check_temperature(temperature)
    call = policy_arguments(
        labels.shape,
        hidden,
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
    labels, _ = local_labels(labels.to(torch.int64).masked_fill(mask == 0, rows.NO_LABEL), rows.NO_LABEL, shard)
    softcap = None if softcap is None else float(softcap)
    possible = objective.follows_from_each_token(entropy_stats=entropy_stats is not None)
    needed = "entropy_stats with an entropy-aware advantage, and ratio_level='token'"
    wanted = wanted_gradients(hidden, weight, bias)
    if keeps(schedule, possible, needed, hidden, labels.numel()) and any(wanted):
        with torch.no_grad():
            tokens = all_tokens(hidden, shard, sequence_parallel)
            settings = (sequence_parallel, wanted, float(temperature), softcap, operand_dtype)
            loss, metrics, *kept = torch.ops.aepo.linear_policy_loss(
                tokens, weight, labels, bias, *shard, *settings, *call
            )
        loss = KeptGradients.apply(hidden, weight, bias, loss, *kept, backend)
    else:
        stats = linear_loss_statistics(
            hidden, weight, bias, labels, float(temperature), softcap, shard, sequence_parallel, operand_dtype, backend
        )
        loss, metrics = loss_of_call(*stats, call)
    return PolicyLoss(loss, policy_metrics(loss, metrics, objective, True, ref_logprobs is not None))
