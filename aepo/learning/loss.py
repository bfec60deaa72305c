"""The policy loss of a micro-batch: an objective's, or that of a function of the user's own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aepo.config import OBJECTIVE_KEYS, PolicyConfig
from aepo.learning.batch import LossRows
from aepo.learning.forward import row_logits
from aepo.own_loss import SETTING, LossBatch, OwnLoss, OwnLossError, checked_call
from aepo.registry import plain
from aepo_kernels import PolicyLoss, PolicyObjective, logits_loss, logits_policy_loss, policy_loss

MEASURED_OF_ANY_LOSS = ("ratio_mean", "ratio_max", "approx_kl", "entropy_mean", "entropy_std", "kl", "valid_tokens")
"""The kernels' metrics that do not depend on how a loss treats its tokens."""


def policy_objective(policy: PolicyConfig) -> PolicyObjective:
    """The preset's objective with the configured fields in their place."""
    chosen = {name: getattr(policy, name) for name in OBJECTIVE_KEYS}
    return PolicyObjective.preset(policy.preset, **{name: value for name, value in chosen.items() if value is not None})


def loss_denominator(objective: PolicyObjective, trained_tokens: int, paths: int, max_tokens: int) -> float:
    """What the loss of one optimiser step is divided by, so that its micro-batches add up to the whole."""
    return {"token-mean": trained_tokens, "constant": paths * max_tokens}.get(objective.aggregation, paths)


def microbatch_loss(
    model: PreTrainedModel,
    batch: LossRows,
    objective: PolicyObjective,
    *,
    temperature: float,
    denominator: float,
    entropy_stats: tuple[float, float] | None,
    gradient_checkpointing: bool = False,
) -> PolicyLoss:
    """Policy loss of one micro-batch; the sum over micro-batches is the loss of the optimiser step."""
    single_pass = objective.follows_from_each_token(entropy_stats=entropy_stats is not None)
    return logits_policy_loss(
        row_logits(model, batch, gradient_checkpointing=gradient_checkpointing),
        batch.labels,
        batch.old_logprobs,
        batch.advantages,
        torch.ones_like(batch.labels, dtype=torch.bool),
        objective=objective,
        temperature=temperature,
        single_pass=single_pass,  # the gradient is written over the logits in the forward, else in the backward
        inplace_backward=not single_pass,
        ref_logprobs=batch.ref_logprobs,
        rollout_logprobs=batch.rollout_logprobs if objective.importance_cap is not None else None,
        cu_seqlens=batch.bounds if objective.needs_sequences else None,
        entropy_stats=entropy_stats,
        denominator=denominator,
    )


def own_microbatch_loss(
    model: PreTrainedModel,
    batch: LossRows,
    function: OwnLoss,
    *,
    temperature: float,
    tokens: int,
    paths: int,
    max_tokens: int,
    entropy_stats: tuple[float, float],
    gradient_checkpointing: bool = False,
) -> PolicyLoss:
    """The loss that `function` makes of one micro-batch; tokens and paths are those of the optimiser step.

    Its own metrics are called policy.<name>. OwnLossError says what the function did wrong; NaN in the logits makes the
    loss NaN, as everywhere.
    """
    mask = torch.ones_like(batch.labels, dtype=torch.bool)
    given = LossBatch(  # copies: a function that writes into one must not change the next optimiser step
        old_logprobs=batch.old_logprobs.clone(),
        old_entropy=batch.entropies.clone(),
        advantages=batch.advantages.clone(),
        rollout_logprobs=batch.rollout_logprobs.clone(),
        ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs.clone(),
        cu_seqlens=batch.bounds.clone(),
        tokens=tokens,
        paths=paths,
        max_tokens=max_tokens,
        entropy_stats=entropy_stats,
        temperature=temperature,
    )
    seen: list[Tensor] = []

    def loss_fn(logprobs: Tensor, entropy: Tensor) -> Tensor:
        seen[:] = logprobs.detach(), entropy.detach()
        return checked_call(function, logprobs, entropy, given)

    functools.update_wrapper(loss_fn, plain(function))  # errors name the user's function
    logits = row_logits(model, batch, gradient_checkpointing=gradient_checkpointing)
    try:
        loss, own = logits_loss(logits, batch.labels, mask, loss_fn, temperature=temperature, inplace_backward=True)
    except (TypeError, ValueError, RuntimeError) as error:
        if not seen or isinstance(error, OwnLossError):  # it did not come to the function, or that is its own error
            raise
        raise OwnLossError(f"{SETTING}: {error}") from error
    logprobs, entropy = seen
    known = policy_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        mask,
        objective=PolicyObjective(),
        entropy=entropy,
        ref_logprobs=batch.ref_logprobs,
    ).metrics
    return PolicyLoss(
        loss,
        {
            "loss": own.pop("loss"),
            **{name: known[name] for name in MEASURED_OF_ANY_LOSS if name in known},
            **{f"policy.{name}": value.to(loss) for name, value in own.items()},
        },
    )
