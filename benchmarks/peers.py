"""What the kernels are compared with: log-prob and entropy as other code computes them, and the AEPO loss on top."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TokenStats = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [T, V], labels [T]) -> (logprobs [T], entropy [T]), differentiable."""


def eager(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """float32 log_softmax, as a trainer without kernels writes it."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def logsumexp_form(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same by logsumexp - E[logits], as verl writes it: cancels on confident rows, and compiles to other code."""
    x = logits.float()
    logsumexp = torch.logsumexp(x, dim=-1)
    return x.gather(-1, labels[:, None])[:, 0] - logsumexp, logsumexp - (torch.softmax(x, dim=-1) * x).sum(-1)


def installed() -> dict[str, TokenStats]:
    """TRL's and verl's own functions where these libraries are installed; says which are not.

    They compute in the dtype of the logits.
    """
    peers: dict[str, TokenStats] = {}
    try:
        from trl.trainer import utils as trl

        peers["TRL"] = lambda x, labels: (trl.selective_log_softmax(x, labels), trl.entropy_from_logits(x))
    except ImportError as error:
        print(f"no TRL row: {error}")
    try:
        from verl.utils import torch_functional as verl

        peers["verl"] = lambda x, labels: (verl.logprobs_from_logits(x, labels), verl.entropy_from_logits(x))
    except ImportError as error:
        print(f"no verl row: {error}")
    return peers


def in_float32(peer: TokenStats) -> TokenStats:
    return lambda logits, labels: peer(logits.float(), labels)


def aepo_loss(logprobs: Tensor, entropy: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The AEPO loss in plain PyTorch: entropy-aware advantage, stop-gradient clip (0.2), dual clip (3), token mean."""
    h = entropy.detach()
    a = advantages * (1 + 0.2 * (h - h.mean()) / h.std())
    ratio = (logprobs - old_logprobs).exp()
    upper = 1.2 * ratio / ratio.detach()  # value 1.2, gradient 1.2 d logprob
    clipped = torch.where(ratio > 1.2, upper, ratio.clamp(min=0.8))
    loss = torch.maximum(-a * ratio, -a * clipped)
    return torch.where(a < 0, torch.minimum(loss, -3.0 * a), loss).mean()
