"""The loss of one micro-batch of TRL's: an objective's, or that of a function of the user's own."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo.integrations.trl.objective import ObjectiveSettings
from aepo.own_loss import ARGUMENTS, LossBatch, OwnLoss, checked_call
from aepo.registry import check_function, plain, resolve_function
from aepo_kernels import PolicyObjective, policy_loss
from aepo_kernels.ops.loss_function import loss_of_function

OF_ANY_LOSS = ("ratio_mean", "ratio_max", "approx_kl")
"""The kernels' metrics that do not depend on how a loss treats its tokens, and that TRL has no name for."""
OF_AN_OBJECTIVE = {
    **{name: name for name in OF_ANY_LOSS},
    "clip_fraction_high": "clip_high",
    "clip_fraction_low": "clip_low",
    "dual_clip_fraction": "dual_clip",
}
"""Those of an objective, and what aepo's own trainer calls them."""


class MicroLoss(NamedTuple):
    """The part of one micro-batch: the parts of a step add up to its loss."""

    loss: Tensor
    tokens: Tensor
    """[] that count."""
    metrics: dict[str, Tensor]
    """Means over these tokens (ratio_max: their largest), for policy/<name>."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """B completions of at most T tokens. Log-probs and entropies in nats, of the policy that is being changed."""

    logprobs: Tensor
    """[B, T]"""
    entropy: Tensor
    """[B, T]"""
    mask: Tensor
    """[B, T] not 0 where the model wrote the token."""
    old_logprobs: Tensor
    """[B, T] of the policy that sampled, by the trainer's model."""
    advantages: Tensor
    """[B, T], with every factor that TRL's settings put on the policy term."""
    ref_logprobs: Tensor | None
    """[B, T] with a KL term."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """What the losses of one optimiser step are divided by. Gradients are averaged over the ranks, so the first two are
    those of one rank on average."""

    tokens: Tensor
    """[] that count, of all its micro-batches."""
    rows: float
    """Completions of all its micro-batches, those without a token included."""
    max_tokens: int
    """Of a completion."""
    ranks: int


def objective_loss(objective: PolicyObjective, rows: Rows, sizes: StepSizes) -> MicroLoss:
    """The loss of `objective`, whose entropy factor is in the advantages already; micro-batches add up."""
    divisors: dict[str, float | Tensor] = {"token-mean": sizes.tokens, "constant": sizes.rows * sizes.max_tokens}
    loss, metrics = policy_loss(
        rows.logprobs,
        rows.old_logprobs,
        rows.advantages,
        rows.mask,
        objective=dataclasses.replace(objective, entropy_advantage=0.0, clamp_entropy_factor=False),
        entropy=rows.entropy,
        ref_logprobs=rows.ref_logprobs,
        denominator=divisors.get(objective.aggregation, sizes.rows),
    )
    shown = {name: metrics[kernel_name] for kernel_name, name in OF_AN_OBJECTIVE.items()}
    return MicroLoss(loss, metrics["valid_tokens"], shown)


def function_loss(
    function: OwnLoss, kl_coef: float, rows: Rows, sizes: StepSizes, given: dict[str, Any], temperature: float
) -> MicroLoss:
    """The loss that `function` makes of the tokens that count, plus kl_coef times the KL to the reference per token.

    `given`: rollout_logprobs and old_entropy [B, T], entropy_stats (mean, std). Its metrics have the function's own,
    and those that any loss has. OwnLossError says what the function did wrong.
    """
    valid = rows.mask != 0
    kl_loss, measured = policy_loss(
        rows.logprobs,
        rows.old_logprobs,
        torch.zeros_like(rows.logprobs),  # nothing but the KL term is left
        rows.mask,
        objective=PolicyObjective(kl_coef=kl_coef),
        ref_logprobs=rows.ref_logprobs,
        denominator=sizes.tokens,
    )
    metrics = {name: measured[name] for name in OF_ANY_LOSS}
    tokens = measured["valid_tokens"]
    if not valid.any():  # a function may divide by its tokens
        return MicroLoss(kl_loss, tokens, metrics)
    batch = LossBatch(
        old_logprobs=rows.old_logprobs[valid].clone(),
        old_entropy=given["old_entropy"][valid].clone(),
        advantages=rows.advantages[valid].clone(),
        rollout_logprobs=given["rollout_logprobs"][valid].clone(),
        ref_logprobs=None if rows.ref_logprobs is None else rows.ref_logprobs[valid].clone(),
        cu_seqlens=torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)),
        tokens=round(sizes.tokens.item() * sizes.ranks),
        paths=round(sizes.rows * sizes.ranks),
        max_tokens=sizes.max_tokens,
        entropy_stats=given["entropy_stats"],
        temperature=temperature,
    )

    def loss_fn(logprobs: Tensor, entropy: Tensor) -> Any:
        return checked_call(function, logprobs, entropy, batch, setting="loss", reference="beta")

    functools.update_wrapper(loss_fn, plain(function))  # errors name the user's function
    counted = torch.ones(len(batch.advantages), dtype=torch.bool, device=valid.device)
    loss, own = loss_of_function(loss_fn, rows.logprobs[valid], rows.entropy[valid], counted)
    own.pop("loss")
    # The function divides by the tokens of all ranks, whose gradients are averaged.
    return MicroLoss(loss * sizes.ranks + kl_loss, tokens, metrics | own)


def chosen_function(config: ObjectiveSettings, function: OwnLoss | None) -> OwnLoss | None:
    """The loss of the user's own, given by config.loss or as loss_fn=`function`; None: neither."""
    if function is None:
        return None if config.loss is None else resolve_function(config.loss, "loss", ARGUMENTS)
    if config.loss is not None:
        raise ValueError(f"loss_fn and args.loss={config.loss!r} are both given: leave one out")
    check_function(function, "loss_fn", ARGUMENTS)
    config.refuse_objective()
    return function
