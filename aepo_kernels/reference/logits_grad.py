"""Gradient of per-token log-probs and entropies with respect to the logits, in plain PyTorch.

d logprob(y) / d x_i = (1[i = y] - p_i) / temperature        d H / d x_i = -p_i (log p_i + H) / temperature
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits_grad(
    logits: Tensor,  # [T, V]
    labels: Tensor | None,  # [T] int64
    maximum: Tensor,  # [T] acc, from token_stats
    log_sum: Tensor,  # [T] acc, from token_stats
    entropy: Tensor,  # [T] acc, from token_stats
    grad_logprobs: Tensor | None,  # [T] acc
    grad_entropy: Tensor | None,  # [T] acc
    temperature: float,
    ignore_index: int,
    out: Tensor,  # [T, V], may be `logits` itself
    vocab_start: int = 0,
) -> None:
    """Write the gradient into `out`, rounded once to its dtype.

    Ignored rows have no log-prob part. A row whose coefficients are all 0 becomes 0 whatever it holds (a masked row may
    be NaN), and so does a logit of -inf. `vocab_start` is the id of the first logit.
    """
    log_p = (logits.to(maximum.dtype) - maximum[:, None]) / temperature - log_sum[:, None]
    p = log_p.exp()
    grad = torch.zeros_like(p)
    used = torch.zeros_like(maximum, dtype=torch.bool)
    if grad_logprobs is not None:
        assert labels is not None, "a log-prob gradient needs labels"
        ignored = labels == ignore_index
        coefficient = grad_logprobs.masked_fill(ignored, 0.0)
        in_range = (labels >= vocab_start) & (labels < vocab_start + logits.shape[1])
        local = (labels - vocab_start).where(in_range, 0)
        one_hot = torch.zeros_like(p).scatter(-1, local[:, None], in_range[:, None].to(p.dtype))
        grad = grad + coefficient[:, None] * (one_hot - p)
        used = used | (coefficient != 0)
    if grad_entropy is not None:
        # p = 0: the limit of p log p is 0, its product in floating point would be NaN.
        grad = grad - grad_entropy[:, None] * torch.where(p == 0, 0.0, p * (log_p + entropy[:, None]))
        used = used | (grad_entropy != 0)
    out.copy_(torch.where(used[:, None], grad / temperature, 0.0))
