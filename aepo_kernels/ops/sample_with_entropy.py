"""Draw one token per row of logits and return its log-prob and the entropy of the row with it: the sampler of a decode
step that leaves behind what training on the sample needs.

Registers aepo::sample_with_entropy, which chooses the backend when it runs. There is no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo_kernels import backend as backends
from aepo_kernels.ops.checks import check_float_tensor, check_integer, check_like, check_logits
from aepo_kernels.ops.rows import acc_dtype


class SampledTokens(NamedTuple):
    tokens: Tensor
    """[B] int64; -1 for a row without a softmax."""
    logprobs: Tensor
    """[B] float32, nats: log-prob of the token under softmax(logits / temperature), before any filter."""
    entropy: Tensor
    """[B] float32, nats: of the same distribution."""


# Of each number, or of each element of a tensor: is it in range, and how the range is called.
RANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "temperature": (lambda x: (x >= 0) & (x < math.inf), ">= 0 and finite"),
    "top_k": (lambda x: x >= 1, ">= 1"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "in [0, 1]"),
    "seed": (lambda x: (x >= -(2**63)) & (x < 2**63), "a 64-bit integer"),
    "offset": (lambda x: (x >= -(2**63)) & (x < 2**63), "a 64-bit integer"),
}
INTEGERS = ("top_k", "seed", "offset")

torch.library.define(
    "aepo::sample_with_entropy",
    "(Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor seed, Tensor offset, "
    "str? backend) -> (Tensor tokens, Tensor logprobs, Tensor entropy)",
)


@torch.library.impl("aepo::sample_with_entropy", "CompositeExplicitAutograd")
def _sample_with_entropy(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = backends.resolve(backend, logits, "sample_with_entropy")
    if logits.device.type == "cpu":
        for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
            _check_rows(name, value)
    stage = backends.stage(backend, "sample_with_entropy")
    return stage(logits, temperature, top_k, top_p, min_p, seed, offset)


@torch.library.register_fake("aepo::sample_with_entropy")
def _sample_with_entropy_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, acc = logits.shape[:1], acc_dtype(logits.dtype)
    return tuple(logits.new_empty(rows, dtype=dtype) for dtype in (torch.int64, acc, acc))  # type: ignore[return-value]


def _check_rows(name: str, value: Tensor | None) -> None:
    """Every element [B] is in range. Reads values: CPU tensors only."""
    if value is None:
        return
    in_range, meant = RANGES[name]
    wrong = ~in_range(value)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{name} must be {meant}; got {value[at].item()} for row {at}")


def _per_row(name: str, value: float | Tensor, logits: Tensor) -> Tensor:
    """A number or a tensor [B] as a tensor [B] in float64 or int64."""
    dtype = torch.int64 if name in INTEGERS else torch.float64
    if isinstance(value, Tensor):
        check_like(name, value, "the rows of logits", logits.shape[:1], logits.device)
        (check_integer if name in INTEGERS else check_float_tensor)(name, value)
        return value.to(dtype).contiguous()
    types: tuple[type, ...] = (int, torch.SymInt) if name in INTEGERS else (int, float, torch.SymInt, torch.SymFloat)
    if isinstance(value, bool) or not isinstance(value, types):
        kind = "an integer" if name in INTEGERS else "a number"
        raise TypeError(f"{name} must be {kind} or a tensor [B]; got {type(value).__name__}")
    in_range, meant = RANGES[name]
    if not in_range(value):
        raise ValueError(f"{name} must be {meant}; got {value}")
    return torch.full(logits.shape[:1], value, dtype=dtype, device=logits.device)


def sample_with_entropy(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    backend: str | None = None,
) -> SampledTokens:
    """Draw a token from each row of logits; return it with its log-prob and the row's entropy, in nats.

    logits [B, V] bfloat16, float16, float32 or float64, rows contiguous at any stride.
    Returns `SampledTokens(tokens [B] int64, logprobs [B], entropy [B])`, statistics in float32 (float64 for float64).

    All other arguments are a number for all rows or a tensor [B]; with p = softmax(logits / temperature):

    - temperature >= 0. A row with 0 takes its most likely token (the lowest id among equals); its statistics are those
      of temperature 1.
    - top_k >= 1 keeps token i if fewer than top_k tokens have a larger logit, top_p in (0, 1] if the tokens with a
      larger logit have less than top_p of the mass, min_p in [0, 1] if p_i >= min_p times the largest p. None: no such
      filter. The filters look at the same p, each for itself, and a token must pass all; equal logits are kept or
      dropped together. (vLLM and Transformers apply one after the other and renormalise in between: with top_k and
      top_p together their top_p is a share of what top_k left, so they keep the same tokens or fewer.)
    - seed and offset, 64-bit integers, name the random numbers: give each sequence a seed and each position an offset.
      The noise of a token is a function of (seed, offset, token id) alone (`aepo_kernels.reference`), so a row's token
      depends on no other row, no stride and no other call, and is the same on every backend and machine, except where
      two tokens' scores, or a token and a filter's bound, are equal to the last digits of the arithmetic.

    `logprobs` and `entropy` belong to p itself, before any filter: they are what `logprobs_and_entropy(logits, tokens,
    temperature)` gives, so a trainer that recomputes them finds the same. They are not the probabilities the token was
    drawn with if a filter cut anything off.

    Memory is read once. Filters cost passes over a row that is in the cache by then: one that weighs what lies above
    the drawn token and, each time they reject it, another draw among larger logits and another weighing. Rejections
    are about ln(1 / kept mass), 0.1 for top_p = 0.9, and at most one per distinct logit. On a GPU nothing waits for the
    host; numbers are spread over the rows by a small kernel each, float64 and int64 tensors are taken as they are.

    A logit of -inf is never drawn. A row with NaN, +inf or no finite logit has token -1 and NaN statistics and disturbs
    no other. There is no gradient. Raises TypeError or ValueError for dtypes, shapes, devices and numbers that do not
    fit; elements of tensors are checked on the CPU, and on a GPU, where that would cost a synchronisation, a row with
    one out of range has token -1 and NaN. `backend`: as for every operation (`aepo_kernels.backend`).
    """
    check_logits(logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, V]; got shape {tuple(logits.shape)}")
    filters = (("top_k", top_k), ("top_p", top_p), ("min_p", min_p))
    return SampledTokens(
        *torch.ops.aepo.sample_with_entropy(
            logits.detach(),
            _per_row("temperature", temperature, logits),
            *(None if value is None else _per_row(name, value, logits) for name, value in filters),
            _per_row("seed", seed, logits),
            _per_row("offset", offset, logits),
            backend,
        )
    )
