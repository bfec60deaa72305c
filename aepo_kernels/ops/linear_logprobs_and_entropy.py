"""Entropy and log-prob of every token from hidden states and the lm_head's weight; the [T, V] logits never exist.

Registers aepo::linear_token_stats and aepo::linear_grad; ops/linear.py has the schedule (one product forward, three
backward).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.ops import linear, rows
from aepo_kernels.ops.checks import (
    check_device,
    check_float_tensor,
    check_integer,
    check_labels,
    check_like,
    check_temperature,
)
from aepo_kernels.ops.merge import TokenStats

torch.library.define(
    "aepo::linear_token_stats",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float temperature, float? softcap, int ignore_index, "
    "str? backend) -> (Tensor logprobs, Tensor entropy, Tensor maximum, Tensor log_sum)",
)
torch.library.define(
    "aepo::linear_grad",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor maximum, Tensor log_sum, Tensor entropy, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, float? softcap, int ignore_index, bool[] wanted, "
    "str? backend) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)


def flat_rows(hidden: Tensor, labels: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [.., D] as [T, D] and labels [..] as [T], ignored ones as rows.NO_LABEL."""
    return hidden.reshape(-1, hidden.shape[-1]), labels.masked_fill(ignored, rows.NO_LABEL).reshape(-1)


@torch.library.impl("aepo::linear_token_stats", "CompositeExplicitAutograd")
def _linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    backend: str | None,
) -> tuple[Tensor, ...]:
    ignored = labels == ignore_index
    if labels.device.type == "cpu":
        check_labels(labels, ignored, len(weight))
    head = linear.Head(weight, bias, temperature, softcap, backends.resolve(backend, hidden))
    stats = linear.statistics(head, *flat_rows(hidden, labels, ignored))
    return tuple(x.view(labels.shape) for x in stats)


@torch.library.register_fake("aepo::linear_token_stats")
def _linear_token_stats_fake(hidden: Tensor, weight: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(labels.shape, dtype=rows.acc_dtype(hidden.dtype)) for _ in range(4))


@torch.library.impl("aepo::linear_grad", "CompositeExplicitAutograd")
def _linear_grad(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    wanted: list[bool],
    backend: str | None,
) -> tuple[Tensor, ...]:
    head = linear.Head(weight, bias, temperature, softcap, backends.resolve(backend, hidden))
    flat_hidden, flat_labels = flat_rows(hidden, labels, labels == ignore_index)
    stats = TokenStats(*(x.reshape(-1) for x in (maximum, entropy, maximum, log_sum)))
    coefficients = linear.Coefficients(*(None if x is None else x.reshape(-1) for x in (grad_logprobs, grad_entropy)))
    grads = linear.gradients(head, flat_hidden, flat_labels, stats, coefficients, linear.Wanted(*wanted))
    return grads.hidden.view(hidden.shape) if wanted[0] else grads.hidden, grads.weight, grads.bias


@torch.library.register_fake("aepo::linear_grad")
def linear_grad_fake(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    wanted = linear.Wanted(*others[-2])
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else 0),
        weight.new_empty(weight.shape if wanted.weight else 0),
        weight.new_empty(weight.shape[:1] if wanted.bias else 0),
    )


class _LinearTokenStats(torch.autograd.Function):
    """(hidden, weight, labels, bias, ..) -> (logprobs, entropy), differentiable once in hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, maximum, log_sum = torch.ops.aepo.linear_token_stats(hidden, weight, labels, bias, *settings)
        ctx.save_for_backward(hidden, weight, labels, bias, maximum, log_sum, entropy)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        *settings, backend = ctx.settings
        grads = torch.ops.aepo.linear_grad(*ctx.saved_tensors, grad_logprobs, grad_entropy, *settings, wanted, backend)
        hidden, weight, bias = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return hidden, weight, None, bias, *[None] * len(ctx.settings)


def check_linear(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    check_float_tensor("hidden", hidden)
    check_float_tensor("weight", weight)
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            "hidden must be [.., D] and weight [V, D] with V, D >= 1; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    for name, x in {"weight": weight, "bias": bias}.items():
        if x is not None:
            check_device(name, x, "hidden", hidden.device)
            if x.dtype != hidden.dtype:
                raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}; got {x.dtype}")
    if bias is not None:
        check_like("bias", bias, "the vocabulary", weight.shape[:1], hidden.device)
    if softcap is not None and (
        isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf
    ):
        raise ValueError(f"softcap must be a number > 0 and finite, or None; got {softcap!r}")
    check_like("labels", labels, "hidden without the last dimension", hidden.shape[:-1], hidden.device)
    check_integer("labels", labels)


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy of each distribution, in nats, straight from hidden states.

        z = hidden @ weight.T + bias      z <- softcap tanh(z / softcap), if given      then as `logprobs_and_entropy`

    hidden [.., D], weight [V, D] and bias [V] of one dtype (bfloat16, float16, float32, float64); labels [..] integer.
    Returns (logprobs [..], entropy [..]) in float32 (float64 for float64), differentiable once in hidden, weight and
    bias, whose gradients have their dtypes. Logits exist as tiles only, in float32 from float32 sums: they are never
    rounded to 16 bits, and memory beyond the gradients is O(T D) plus one tile. The backward makes the tiles again, for
    the rows that have a gradient; the weight's gradient is summed in float32 and rounded once.

    Ignored labels, -inf (from a bias), NaN and the meaning of `backend` are as in `logprobs_and_entropy`. Raises
    TypeError or ValueError naming the argument that does not fit. Under FSDP2 call it through `LinearHead`.
    """
    check_linear(hidden, weight, labels, bias, softcap)
    check_temperature(temperature)
    settings = (float(temperature), None if softcap is None else float(softcap), ignore_index, backend)
    return _LinearTokenStats.apply(hidden, weight, labels.to(torch.int64), bias, *settings)
