"""A loss of the user's own in the trainer, `policy.loss`: what the function gets, and how it is called.

docs/own_loss.md is the guide. This module imports no torch: the report reads it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aepo.registry import place_of, plain, resolve_function

if TYPE_CHECKING:
    from torch import Tensor

SETTING = "policy.loss"
ARGUMENTS = "logprobs, entropy, batch"
MEASURED = frozenset(
    {
        "loss",
        "entropy",
        "entropy_std",
        "ratio_mean",
        "ratio_max",
        "approx_kl",
        "kl",
        "advantage_flips",
        "mismatch_kl",
        "mismatch_max",
    }
)
"""Metrics policy.<name> of every run, which a function's own must not be called."""
CLIPPED = frozenset({"clip_high", "clip_low", "dual_clip"})
"""Those of a preset's loss alone: a function of the user's own may measure them its own way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBatch:
    """What a loss gets beside log-probs and entropies: R tokens that the model wrote, of N paths one after the other.

    Every token is trained on, so there is no mask. Tensors are constants, float32 (float64 with model.dtype=float64),
    on the device of the log-probs; log-probs and entropies are in nats, at the temperature of the rollout.
    """

    old_logprobs: Tensor
    """[R] of the policy that a ratio is taken against: before the first optimiser step on this rollout batch."""
    old_entropy: Tensor
    """[R] of the same policy, over the whole vocabulary."""
    advantages: Tensor
    """[R] as `policy.preset` or `policy.advantage` makes them of the rewards; without any entropy factor."""
    rollout_logprobs: Tensor
    """[R] as the engine sampled; `old_logprobs` unless these are recomputed (policy.old_logprobs)."""
    ref_logprobs: Tensor | None
    """[R] of the frozen starting weights; None without policy.reference=true."""
    cu_seqlens: Tensor
    """int64 [N + 1], from 0 to R: path n owns the tokens cu_seqlens[n] to cu_seqlens[n + 1]."""
    tokens: int
    """Trained tokens of the whole optimiser step, all micro-batches together: what a mean over tokens divides by."""
    paths: int
    """Paths of the whole optimiser step: what a mean over paths divides by."""
    max_tokens: int
    """rollout.max_tokens: the longest path after its prompt, for losses with a constant denominator."""
    entropy_stats: tuple[float, float]
    """Mean and unbiased std of `old_entropy` over the whole rollout batch; std 0 where there is no spread."""
    temperature: float
    """Of rollout and loss; log-probs and entropies have it in them."""


OwnLoss = Callable[["Tensor", "Tensor", LossBatch], "Tensor | tuple[Tensor, Mapping[str, Tensor | float]]"]
"""(logprobs [R], entropy [R], batch) -> the loss [] of these tokens, or (loss [], metrics).

The losses of the micro-batches are added up. Logged metrics are means over tokens."""


class OwnLossError(ValueError):
    """The user's function failed, or what it returned is no loss."""


def own_loss(name: str) -> OwnLoss:
    """The function called `name`, package.module:function. ValueError in one line where there is none."""
    return resolve_function(name, SETTING, ARGUMENTS)


def checked_call(function: OwnLoss, logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Any:
    """What the function returns, as it is. OwnLossError, with the line, where it raises; and for names of metrics that
    are taken."""
    name_of_function = plain(function).__qualname__
    try:
        returned = function(logprobs, entropy, batch)
    except Exception as error:  # whatever the user's code does
        problem = f"{name_of_function} raised {type(error).__name__}: {error}{place_of(error, function)}"
        raise OwnLossError(f"{SETTING}: {problem}") from error
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        for name in returned[1]:
            if not isinstance(name, str) or not name:
                raise OwnLossError(f"{SETTING}: {name_of_function}: names of metrics must be texts; got {name!r}")
            if name in MEASURED:
                raise OwnLossError(
                    f"{SETTING}: {name_of_function}: metric {name!r} must have another name, the trainer logs its own "
                    f"policy.{name} (as it does {', '.join(sorted(MEASURED - {name}))})"
                )
    return returned
