"""Entropy of every row of the logits at decode time, written where a sampler wants it, without waiting for the GPU.

Registers aepo::decode_entropy (new tensors) and aepo::decode_entropy_ (into given ones, by slot), which choose the
backend when they run. There is no gradient.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from aepo_kernels import backend as backends
from aepo_kernels.ops.checks import (
    check_device,
    check_float_tensor,
    check_integer,
    check_like,
    check_logits,
    check_temperature,
)
from aepo_kernels.ops.rows import acc_dtype

torch.library.define(
    "aepo::decode_entropy",
    "(Tensor logits, Tensor? temperatures, float temperature, Tensor? tokens, str? backend) "
    "-> (Tensor entropy, Tensor logprobs)",
)
torch.library.define(
    "aepo::decode_entropy_",
    "(Tensor logits, Tensor? temperatures, float temperature, Tensor? slots, Tensor? tokens, Tensor(a!) out, "
    "Tensor(b!)? logprobs_out, str? backend) -> ()",
)


@torch.library.impl("aepo::decode_entropy", "CompositeExplicitAutograd")
def _decode_entropy(
    logits: Tensor, temperatures: Tensor | None, temperature: float, tokens: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    entropy, logprobs = _decode_entropy_fake(logits, temperatures, temperature, tokens, backend)
    to_logprobs = None if tokens is None else logprobs
    _run(logits, temperatures, temperature, None, tokens, entropy, to_logprobs, backend)
    return entropy, logprobs


@torch.library.register_fake("aepo::decode_entropy")
def _decode_entropy_fake(
    logits: Tensor, temperatures: Tensor | None, temperature: float, tokens: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    rows, acc = logits.shape[0], acc_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=acc), logits.new_empty(0 if tokens is None else rows, dtype=acc)


@torch.library.impl("aepo::decode_entropy_", "CompositeExplicitAutograd")
def _decode_entropy_into(
    logits: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    slots: Tensor | None,
    tokens: Tensor | None,
    out: Tensor,
    logprobs_out: Tensor | None,
    backend: str | None,
) -> None:
    _run(logits, temperatures, temperature, slots, tokens, out, logprobs_out, backend)
    for written in (out, logprobs_out):
        if written is not None and not written.is_inference():  # which counts no versions
            torch.autograd.graph.increment_version(written)  # native code writes behind autograd's back


@torch.library.register_fake("aepo::decode_entropy_")
def _decode_entropy_into_fake(logits: Tensor, *args: Any) -> None:
    return None


def _run(
    logits: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    slots: Tensor | None,
    tokens: Tensor | None,
    entropy: Tensor,
    logprobs: Tensor | None,
    backend: str | None,
) -> None:
    backend = backends.resolve(backend, logits, "decode_entropy")
    if logits.device.type == "cpu":
        slots, tokens = (x if x is None else x.to(torch.int64) for x in (slots, tokens))
        _check_values(slots, tokens, temperatures, logits.shape[1], len(entropy))
    stage = backends.stage(backend, "decode_entropy")
    stage(logits, temperatures, temperature, slots, tokens, entropy, logprobs)


def _check_values(
    slots: Tensor | None, tokens: Tensor | None, temperatures: Tensor | None, vocab: int, num_slots: int
) -> None:
    """What can only be known from the values. CPU tensors alone: on a GPU reading them would wait for it."""
    wanted: Tensor | slice = slice(None)
    if slots is not None:
        wanted = slots >= 0
        used = slots[wanted]
        if (used >= num_slots).any():
            raise ValueError(f"slots must be below N = {num_slots} of out (or negative); got {int(used.max())}")
        distinct, uses = used.unique(return_counts=True)
        if len(distinct) < len(used):
            raise ValueError(f"slots must differ from row to row; got {int(distinct[uses.argmax()])} more than once")
    if tokens is not None:
        wrong = tokens[wanted][(tokens[wanted] < 0) | (tokens[wanted] >= vocab)]
        if len(wrong):
            raise ValueError(f"tokens must be in [0, V) with V = {vocab}; got {int(wrong[0])}")
    if temperatures is not None:
        wrong = temperatures[wanted][~((temperatures[wanted] > 0) & temperatures[wanted].isfinite())]
        if len(wrong):
            raise ValueError(f"temperature must be > 0 and finite in every row; got {float(wrong[0])}")


@overload
def decode_entropy(
    logits: Tensor,
    temperature: float | Tensor | None = None,
    out: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    tokens: None = None,
    logprobs_out: None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def decode_entropy(
    logits: Tensor,
    temperature: float | Tensor | None = None,
    out: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    tokens: Tensor,
    logprobs_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def decode_entropy(
    logits: Tensor,
    temperature: float | Tensor | None = None,
    out: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    tokens: Tensor | None = None,
    logprobs_out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Entropy [B] in nats of softmax(logits / temperature) row by row, and on request the log-prob of a token.

    logits [B, V] bfloat16, float16, float32 or float64 (float64 not on GPU kernels) with a contiguous last dimension,
    rows at any stride. temperature: a float, or a float tensor [B] with one per row; None is 1. Both are > 0.

    Without `out`: returns a new entropy [B] in float32 (float64 for float64 logits); with tokens, [B] integers, it
    returns (entropy, logprobs) from the same read, the log-probs under the same temperature.

    With `out` [N] (1-D, any stride, of the dtype that a new result would have): row b's entropy is written to
    out[slots[b]] and `out` is returned; with tokens the log-prob goes to logprobs_out[slots[b]], and the pair (out,
    logprobs_out) is returned. slots [B] integers; None stands for 0 .. B - 1. A row with a negative slot is not read
    and writes nothing; no other element of `out` changes. Two rows must not share a slot.

    It is as exact as `logprobs_and_entropy`: relative 1e-5 from 1e-8 nats to ln V, -inf has probability 0, a row with
    NaN, +inf or no finite logit is NaN. Equal inputs give equal bits. There is no gradient.

    Nothing waits for the GPU, so the values of slots, tokens and temperature are checked on the CPU alone. On a GPU a
    slot >= N counts as negative, a token outside [0, V) has log-prob NaN, a row with a temperature that is not > 0 and
    finite is NaN, and of rows that share a slot any may win. With backends cuda and triton a call can be captured in a
    CUDA graph; integers other than int32 and int64 and a temperature other than float32 cost a conversion kernel each.

    Raises TypeError or ValueError for what does not fit, and for a tensor that requires a gradient outside of no_grad.
    `backend`: None takes the fastest that serves the tensors; a name never falls back (see `aepo_kernels.backend`).
    """
    check_logits(logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, V]; got shape {tuple(logits.shape)}")
    acc = acc_dtype(logits.dtype)
    temperatures, number = None, 1.0
    if isinstance(temperature, Tensor):
        check_float_tensor("temperature", temperature)
        check_like("temperature", temperature, "the rows of logits", logits.shape[:1], logits.device)
        temperatures = temperature.to(acc).contiguous()
    elif temperature is not None:
        check_temperature(temperature)
        number = float(temperature)
    slots = _integers("slots", slots, logits)
    tokens = _integers("tokens", tokens, logits)
    for name, x in (("logits", logits), ("temperature", temperatures), ("out", out), ("logprobs_out", logprobs_out)):
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, and decode_entropy has none: call it under torch.no_grad(), or "
                "logprobs_and_entropy for a gradient"
            )
    if out is None:
        for name, x in (("slots", slots), ("logprobs_out", logprobs_out)):
            if x is not None:
                raise ValueError(f"{name} was given without out, which it belongs to")
        entropy, logprobs = torch.ops.aepo.decode_entropy(logits, temperatures, number, tokens, backend)
        return entropy if tokens is None else (entropy, logprobs)
    _check_out("out", out, logits, acc)
    if slots is None and out.shape[0] < logits.shape[0]:
        raise ValueError(
            f"out must have a place for each of the {logits.shape[0]} rows, or come with slots; got {out.shape[0]}"
        )
    if (tokens is None) != (logprobs_out is None):
        raise ValueError("with out, tokens and logprobs_out must be given together; got one of them")
    if logprobs_out is not None:
        _check_out("logprobs_out", logprobs_out, logits, acc)
        check_like("logprobs_out", logprobs_out, "out", out.shape, out.device)
    torch.ops.aepo.decode_entropy_(logits, temperatures, number, slots, tokens, out, logprobs_out, backend)
    return out if logprobs_out is None else (out, logprobs_out)


def _integers(name: str, x: Tensor | None, logits: Tensor) -> Tensor | None:
    """Checked integers [B] as the kernels read them: contiguous, 32 or 64 bits."""
    if x is None:
        return None
    check_like(name, x, "the rows of logits", logits.shape[:1], logits.device)
    check_integer(name, x)
    return (x if x.dtype in (torch.int32, torch.int64) else x.to(torch.int64)).contiguous()


def _check_out(name: str, x: Tensor, logits: Tensor, dtype: torch.dtype) -> None:
    check_float_tensor(name, x)
    check_device(name, x, "logits", logits.device)
    if x.dim() != 1 or x.dtype != dtype or (x.stride(0) == 0 and x.shape[0] > 1):
        raise ValueError(
            f"{name} must be a 1-D {dtype} tensor with a place of its own for every element; got {x.dtype} of shape "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
