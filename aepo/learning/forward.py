"""The model on the rows of a micro-batch: logits of those that are trained, and no others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from aepo.learning.attention import packed
from aepo.learning.batch import LossRows
from aepo_kernels import logprobs_and_entropy


def row_logits(model: PreTrainedModel, batch: LossRows, *, gradient_checkpointing: bool = False) -> Tensor:
    """Logits [R, V] of the rows; the head runs on no other position. gradient_checkpointing: all that is kept of a
    layer is what came into it, and the backward computes it again. `squeeze`: the backward of an index would copy the
    gradient of the logits, which is as large as they are."""
    with packed(model), recomputed_layers(model) if gradient_checkpointing else contextlib.nullcontext():
        output = model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            lengths=batch.lengths,
            logits_to_keep=batch.rows,
            use_cache=False,
        )
    return output.logits.squeeze(0)


def layers_to_recompute(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Those that transformers could compute again; none of a model that says of no layer that it can."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def is_compiled(model: PreTrainedModel) -> bool:
    """The model or a part of it."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


@contextlib.contextmanager
def recomputed_layers(model: PreTrainedModel) -> Iterator[None]:
    """Every layer that is called in the block is called again in the backward.

    Not by the switch that transformers has for it, which works in training mode alone: dropout would make the ratio
    differ from 1. A layer attends in the backward as it did in the forward, whose block has ended by then.
    """

    def twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # no layer draws in evaluation mode
            context_fn=lambda: (contextlib.nullcontext(), packed(model)),
            **kwargs,
        )

    layers = layers_to_recompute(model)
    own = [vars(layer).get("forward") for layer in layers]  # where somebody has replaced it before
    for layer in layers:
        layer.forward = functools.partial(twice, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@torch.no_grad()
def token_statistics(model: PreTrainedModel, batch: LossRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [R] of the labels under `model`."""
    stats = logprobs_and_entropy(row_logits(model, batch), batch.labels, temperature)
    logprobs, entropies = (values.to(batch.old_logprobs.dtype) for values in stats)
    return logprobs, entropies


def with_old_policy(model: PreTrainedModel, batch: LossRows, temperature: float) -> LossRows:
    """The rows with old log-probs and entropies of the model as it is now, in place of the engine's."""
    logprobs, entropies = token_statistics(model, batch, temperature)
    return replace(batch, old_logprobs=logprobs, entropies=entropies)


def with_reference(reference: PreTrainedModel, batch: LossRows, temperature: float) -> LossRows:
    """The rows with log-probs of the frozen reference."""
    return replace(batch, ref_logprobs=token_statistics(reference, batch, temperature)[0])


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model whose paths would see each other (state-space layers, windows hidden in masks).

    Runs three random tokens behind two others, and alone: 15 positions, milliseconds.
    """
    device, vocab = next(model.parameters()).device, model.config.vocab_size
    ids = torch.arange(1, 8, device=device) * 7919 % vocab
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2], device=device)

    def logits(start: int, lengths: tuple[int, ...]) -> Tensor:
        with packed(model):
            return model(
                input_ids=ids[None, start:], position_ids=positions[None, start:], lengths=lengths, use_cache=False
            ).logits[0, -3:]

    together, alone = logits(0, (4, 3)).double(), logits(4, (3,)).double()
    # float32 rounding gives 1e-6 and bfloat16 1e-2; leaking across paths gave 0.06 and more.
    error = ((together - alone).norm() / alone.norm()).item()
    limit = 0.03 if next(model.parameters()).dtype == torch.bfloat16 else 1e-3
    if not error <= limit:
        raise ValueError(
            f"{type(model).__name__} cannot be trained on packed trajectories: logits of a trajectory change by "
            f"{error:.2g} (relative) when another one stands before it; expected at most {limit}"
        )
