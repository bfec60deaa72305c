"""The model on packed trajectories, and the policy loss of a micro-batch.

Linear layers see all tokens of all trajectories as one long row. Attention is the only place where trajectories must
not see each other: `packed_attention` runs it once per trajectory. The head runs only on positions that are trained.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from aepo.config import OBJECTIVE_KEYS, PolicyConfig
from aepo.learning.pack_paths import PackedBatch
from aepo.own_loss import SETTING, LossBatch, OwnLoss, OwnLossError, checked_call
from aepo.registry import plain
from aepo_kernels import (
    PolicyLoss,
    PolicyObjective,
    logits_loss,
    logits_policy_loss,
    logprobs_and_entropy,
    policy_loss,
)

ATTENTION = "aepo_packed"
MEASURED_OF_ANY_LOSS = ("ratio_mean", "ratio_max", "approx_kl", "entropy_mean", "entropy_std", "kl", "valid_tokens")
"""The kernels' metrics that do not depend on how a loss treats its tokens."""


def policy_objective(policy: PolicyConfig) -> PolicyObjective:
    """The preset's objective with the configured fields in their place."""
    chosen = {name: getattr(policy, name) for name in OBJECTIVE_KEYS}
    return PolicyObjective.preset(policy.preset, **{name: value for name, value in chosen.items() if value is not None})


def loss_denominator(objective: PolicyObjective, trained_tokens: int, paths: int, max_tokens: int) -> float:
    """What the loss of one optimiser step is divided by, so that its micro-batches add up to the whole."""
    return {"token-mean": trained_tokens, "constant": paths * max_tokens}.get(objective.aggregation, paths)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, key_value_heads, T, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lengths: tuple[int, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    attend: Callable[..., Tensor] = scaled_dot_product_attention,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention within each trajectory. Returns ([1, T, heads, head_dim], None).

    One call per trajectory does no work on padding: forward and backward of 32 trajectories of 100 to 300 tokens take
    half the time of one padded call on the CPU. `split` matters: slicing would make the backward O(N T).
    """
    unsupported = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if others.get(name)]
    if unsupported or dropout:
        raise ValueError(f"packed attention has no {', '.join(unsupported) or 'dropout'}, which this model asks for")
    outputs = [
        attend(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, packed_attention)


@contextlib.contextmanager
def _packed(model: PreTrainedModel) -> Iterator[None]:
    """Only for the call: the rollout engine runs the same module with its own attention. The backward does not look."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def packed_logits(model: PreTrainedModel, batch: PackedBatch, rows: Tensor) -> Tensor:
    """Logits [R, V] at positions `rows` (int64 [R]) of the batch.

    `squeeze`, as the backward of indexing would copy their gradient, which is as large.
    """
    with _packed(model):
        output = model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            lengths=batch.lengths,
            logits_to_keep=rows,
            use_cache=False,
        )
    return output.logits.squeeze(0)


def row_bounds(batch: PackedBatch) -> Tensor:
    """Of the trajectories among the trained positions alone, int64 [N + 1]."""
    return torch.nn.functional.pad(batch.mask.cumsum(0), (1, 0))[batch.cu_seqlens]


def microbatch_loss(
    model: PreTrainedModel,
    batch: PackedBatch,
    objective: PolicyObjective,
    *,
    temperature: float,
    denominator: float,
    entropy_stats: tuple[float, float] | None,
) -> PolicyLoss:
    """Policy loss of one micro-batch; the sum over micro-batches is the loss of the optimiser step."""
    rows = batch.mask.nonzero().squeeze(1)
    single_pass = objective.follows_from_each_token(entropy_stats=entropy_stats is not None)
    return logits_policy_loss(
        packed_logits(model, batch, rows),
        batch.labels[rows],
        batch.old_logprobs[rows],
        batch.advantages[rows],
        torch.ones_like(rows, dtype=torch.bool),
        objective=objective,
        temperature=temperature,
        single_pass=single_pass,  # the gradient is written over the logits in the forward, else in the backward
        inplace_backward=not single_pass,
        ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[rows],
        rollout_logprobs=batch.rollout_logprobs[rows] if objective.importance_cap is not None else None,
        cu_seqlens=row_bounds(batch) if objective.needs_sequences else None,
        entropy_stats=entropy_stats,
        denominator=denominator,
    )


def own_microbatch_loss(
    model: PreTrainedModel,
    batch: PackedBatch,
    function: OwnLoss,
    *,
    temperature: float,
    tokens: int,
    paths: int,
    max_tokens: int,
    entropy_stats: tuple[float, float],
) -> PolicyLoss:
    """The loss that `function` makes of one micro-batch; tokens and paths are those of the optimiser step.

    Its own metrics are called policy.<name>. OwnLossError says what the function did wrong; NaN in the logits makes the
    loss NaN, as everywhere.
    """
    rows = batch.mask.nonzero().squeeze(1)
    mask = torch.ones_like(rows, dtype=torch.bool)
    given = LossBatch(
        old_logprobs=batch.old_logprobs[rows],
        old_entropy=batch.entropies[rows],
        advantages=batch.advantages[rows],
        rollout_logprobs=batch.rollout_logprobs[rows],
        ref_logprobs=None if batch.ref_logprobs is None else batch.ref_logprobs[rows],
        cu_seqlens=row_bounds(batch),
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
    logits = packed_logits(model, batch, rows)
    try:
        loss, own = logits_loss(
            logits, batch.labels[rows], mask, loss_fn, temperature=temperature, inplace_backward=True
        )
    except (TypeError, ValueError, RuntimeError) as error:
        if not seen or isinstance(error, OwnLossError):  # it did not come to the function, or that is its own error
            raise
        raise OwnLossError(f"{SETTING}: {error}") from error
    logprobs, entropy = seen
    known = policy_loss(
        logprobs,
        given.old_logprobs,
        given.advantages,
        mask,
        objective=PolicyObjective(),
        entropy=entropy,
        ref_logprobs=given.ref_logprobs,
    ).metrics
    return PolicyLoss(
        loss,
        {
            "loss": own.pop("loss"),
            **{name: known[name] for name in MEASURED_OF_ANY_LOSS if name in known},
            **{f"policy.{name}": value.to(loss) for name, value in own.items()},
        },
    )


@torch.no_grad()
def token_statistics(model: PreTrainedModel, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [T] of the labels under `model`; 0 off the mask."""
    rows = batch.mask.nonzero().squeeze(1)
    stats = logprobs_and_entropy(packed_logits(model, batch, rows), batch.labels[rows], temperature)
    logprobs, entropies = (
        torch.zeros_like(batch.old_logprobs).index_copy(0, rows, x.to(batch.old_logprobs.dtype)) for x in stats
    )
    return logprobs, entropies


def with_old_policy(model: PreTrainedModel, batch: PackedBatch, temperature: float) -> PackedBatch:
    """The batch with old log-probs and entropies of the model as it is now, in place of the engine's."""
    logprobs, entropies = token_statistics(model, batch, temperature)
    return replace(batch, old_logprobs=logprobs, entropies=entropies)


def with_reference(reference: PreTrainedModel, batch: PackedBatch, temperature: float) -> PackedBatch:
    """The batch with log-probs of the frozen reference."""
    return replace(batch, ref_logprobs=token_statistics(reference, batch, temperature)[0])


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model whose trajectories would see each other (state-space layers, windows hidden in masks).

    Runs three random tokens behind two others, and alone: 15 positions, milliseconds.
    """
    device, vocab = next(model.parameters()).device, model.config.vocab_size
    ids = torch.arange(1, 8, device=device) * 7919 % vocab
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2], device=device)

    def logits(start: int, lengths: tuple[int, ...]) -> Tensor:
        with _packed(model):
            return model(
                input_ids=ids[None, start:], position_ids=positions[None, start:], lengths=lengths, use_cache=False
            ).logits[0, -3:]

    packed, alone = logits(0, (4, 3)).double(), logits(4, (3,)).double()
    # float32 rounding gives 1e-6 and bfloat16 1e-2; leaking across trajectories gave 0.06 and more.
    error = ((packed - alone).norm() / alone.norm()).item()
    limit = 0.03 if next(model.parameters()).dtype == torch.bfloat16 else 1e-3
    if not error <= limit:
        raise ValueError(
            f"{type(model).__name__} cannot be trained on packed trajectories: logits of a trajectory change by "
            f"{error:.2g} (relative) when another one stands before it; expected at most {limit}"
        )
