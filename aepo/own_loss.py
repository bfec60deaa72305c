"""A loss of the user's own in the trainer, `policy.loss`: what the function gets, and how it is called.

docs/own_loss.md is the guide. Importing this module imports no torch: the report reads it, too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from aepo.registry import error_text, nearest_first, place_of, plain, resolve_function

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from aepo.config import Config

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
METRIC_NAME = re.compile(r"(?!policy\.)[A-Za-z_][A-Za-z0-9_./-]*")


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


def try_own_loss(function: OwnLoss, config: Config, dtype: torch.dtype, device: torch.device | str) -> None:
    """Call the function once, on made-up tokens, so that a mistake in it costs no rollout and leaves no run directory.

    `dtype` is that of log-probs: float32, or float64. OwnLossError is the one that the first micro-batch would give.
    Random numbers that the function draws are put back.
    """
    import torch

    from aepo_kernels.ops.loss_function import TokenLoss, differentiate, finite

    logprobs, entropy, batch = _made_up(config, dtype, torch.device(device))
    counted = torch.ones_like(logprobs, dtype=torch.bool)

    def loss_fn(logprobs: Tensor, entropy: Tensor) -> Any:
        return checked_call(function, logprobs, entropy, batch)

    functools.update_wrapper(loss_fn, plain(function))  # errors name the user's function
    try:
        with torch.random.fork_rng([logprobs.device] if logprobs.is_cuda else []):
            loss, metrics, grad_logprobs, grad_entropy = differentiate(loss_fn, logprobs, entropy, counted)
        # On the CPU, since `finite` does not look at what lies elsewhere.
        found = TokenLoss(
            loss.cpu(), metrics, grad_logprobs.cpu(), None if grad_entropy is None else grad_entropy.cpu()
        )
        finite(loss_fn, found, logprobs.cpu(), entropy.cpu(), counted.cpu())
    except (TypeError, ValueError, RuntimeError) as error:
        problem = error if isinstance(error, OwnLossError) else f"{SETTING}: {error}"
        raise OwnLossError(f"{problem} (tried on made-up tokens before the start)") from error


def _made_up(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, LossBatch]:
    """Log-probs, entropies and a batch of 12 tokens in 3 paths, the whole of an optimiser step: the same every time."""
    import torch

    draw = torch.Generator().manual_seed(0)

    def between(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(12, generator=draw, dtype=dtype)).to(device)

    def near(logprobs: Tensor) -> Tensor:
        return (logprobs + between(-0.3, 0.3)).clamp(max=-0.01)

    logprobs, entropy, old_entropy = between(-4, -0.05), between(0.1, 2), between(0.1, 2)
    old_logprobs = near(logprobs)
    lengths = torch.tensor([3, 5, 4])
    advantages = torch.tensor([1.1, -0.8, -0.3], dtype=dtype).repeat_interleave(lengths).to(device)
    batch = LossBatch(
        old_logprobs=old_logprobs,
        old_entropy=old_entropy,
        advantages=advantages,
        rollout_logprobs=near(old_logprobs) if config.recomputes_old_logprobs else old_logprobs,
        ref_logprobs=near(logprobs) if config.policy.reference else None,
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device),
        tokens=12,
        paths=3,
        max_tokens=config.rollout.max_tokens,
        entropy_stats=(old_entropy.mean().item(), old_entropy.std().item()),
        temperature=config.rollout.temperature,
    )
    return logprobs, entropy, batch


def checked_call(
    function: OwnLoss,
    logprobs: Tensor,
    entropy: Tensor,
    batch: LossBatch,
    *,
    setting: str = SETTING,
    reference: str = "policy.reference=true",
) -> Any:
    """What the function returns, as it is. OwnLossError, with the line, where it raises; and for names of metrics that
    are taken, or are none.

    setting, reference: what the trainer that calls it calls the function, and what gives batch.ref_logprobs.
    """
    name_of_function = plain(function).__qualname__
    try:
        returned = function(logprobs, entropy, batch)
    except Exception as error:  # whatever the user's code does
        problem = f"{name_of_function} raised {error_text(error)}{place_of(error, function)}"
        raise OwnLossError(f"{setting}: {problem}{_hint(error, batch, reference)}") from error
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        for name in returned[1]:
            if not isinstance(name, str) or not METRIC_NAME.fullmatch(name):
                raise OwnLossError(
                    f"{setting}: {name_of_function}: names of metrics must be letters, digits and _ . / -, begin with "
                    f"a letter or _, and not with policy., which the trainer writes before them; got {name!r}"
                )
            if name in MEASURED:
                raise OwnLossError(
                    f"{setting}: {name_of_function}: metric {name!r} must have another name, the trainer logs its own "
                    f"policy.{name} (as it does {', '.join(sorted(MEASURED - {name}))})"
                )
    return returned


def _hint(error: Exception, batch: LossBatch, reference: str) -> str:
    """What the batch has to do with it, in words."""
    if isinstance(error, AttributeError) and error.obj is batch:
        names = [field.name for field in fields(batch)]
        return f"; it has {', '.join(nearest_first(error.name or '', names))}"
    if batch.ref_logprobs is None and "NoneType" in str(error):
        return f"; batch.ref_logprobs is None without {reference}"
    return ""
