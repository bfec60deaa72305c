"""Per-row statistics of the softmax over a vocabulary, in plain PyTorch: log-prob of a label, entropy, normaliser.

With x a row of logits, d = (x - max x) / temperature, and R the sum of exp(d) over all entries but one maximum,

    log S = log1p(R)        logprob(y) = d_y - log S        H = log S - sum exp(d) d / (1 + R)

Leaving the maximum's own 1 to log1p is what keeps the digits of a small entropy: at H = 1e-5 the textbook form
logsumexp - sum p z is off by 26 % in float32, this one by 3e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_stats(
    logits: Tensor,  # [T, V]
    labels: Tensor | None,  # [T] int64
    temperature: float | Tensor,  # or [T, 1]
    ignore_index: int,
    skip_ignored: bool,
    vocab_start: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, maximum, log_sum), each [T] in float32 (float64 for float64 logits).

    `maximum` is the row's largest raw logit and `log_sum` the log of S, so that any log p_i can be had again as
    (x_i - maximum) / temperature - log_sum without the rounding of one large logsumexp. Ignored rows have log-prob 0,
    with `skip_ignored` 0 in every output. Without labels `logprobs` is empty. A row with NaN or +inf is NaN in every
    output. So is a row without any finite logit, except that its `maximum` is -inf: as a part of a longer row it is
    empty, not undefined (ops/merge.py). `vocab_start` is the id of the first logit, so that a tile of a vocabulary
    takes labels as they are; a label outside [vocab_start, vocab_start + V) gives log-prob NaN.
    """
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = logits.to(acc)
    maximum, at_maximum = x.max(dim=-1)
    d = (x - maximum[:, None]) / temperature
    e = d.exp()
    rest = e.scatter(-1, at_maximum[:, None], 0.0).sum(-1)
    log_sum = rest.log1p()
    # e = 0 stands for a logit of -inf (or one that underflows): 0 * -inf must count as nothing, not as NaN.
    entropy = log_sum - torch.where(e == 0, 0.0, e * d).sum(-1) / (1 + rest)

    undefined = ~maximum.isfinite()  # max propagates NaN, so this also catches NaN among finite logits
    log_sum, entropy = (stat.masked_fill(undefined, torch.nan) for stat in (log_sum, entropy))
    maximum = maximum.masked_fill(undefined & ~maximum.isneginf(), torch.nan)
    if labels is None:
        return logits.new_empty(0, dtype=acc), entropy, maximum, log_sum

    in_range = (labels >= vocab_start) & (labels < vocab_start + logits.shape[1])
    label_d = d.gather(-1, (labels - vocab_start).where(in_range, 0)[:, None])[:, 0]
    logprobs = (label_d - log_sum).masked_fill(~in_range, torch.nan)
    ignored = labels == ignore_index
    logprobs = logprobs.masked_fill(ignored & ~undefined, 0.0)
    if skip_ignored:
        logprobs, entropy, maximum, log_sum = (
            stat.masked_fill(ignored, 0.0) for stat in (logprobs, entropy, maximum, log_sum)
        )
    return logprobs, entropy, maximum, log_sum
