"""The merge rule: the token statistics of a row from those of its parts, be they tiles of one product or ranks.

A part knows its maximum m, log_sum = log sum exp(d) and entropy H about its own m, d = (x - m) / temperature. That is
all it takes: with R = expm1(log_sum), the sum without the maximum's own 1, and W = (log_sum - H)(1 + R) = sum exp(d) d,

    M = max m                                 shift = (m - M) / temperature
    R' = R of the part that holds M + sum over others exp(shift) (1 + R)
    W' = sum exp(shift) (W + shift (1 + R))   log_sum' = log1p(R')      H' = log_sum' - W' / (1 + R')

Nothing cancels: log1p(R') keeps the digits of a small entropy just as inside one part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """The outputs of the stage `token_stats` for some rows."""

    logprobs: Tensor
    entropy: Tensor
    maximum: Tensor
    log_sum: Tensor

    def of_rows(self, index: Tensor | slice) -> TokenStats:
        return TokenStats(*(x[index] for x in self))


def merge_stats(
    parts: TokenStats, holds_label: Tensor | None, ignored: Tensor | None, temperature: float
) -> TokenStats:
    """Merge P parts of T rows: every field [P, T] in, [T] out, in the same dtype; the arithmetic is float64.

    holds_label [P, T] bool: the part whose `logprobs` is that of the row's label; ignored [T] bool: rows with log-prob
    0. A row that is not ignored and has not exactly one such part gets log-prob NaN. Both None: no labels, `logprobs`
    is passed on. A part without any finite logit (maximum -inf) is empty; a part with a NaN maximum makes its row NaN,
    and so does a row whose parts are all empty, except that its maximum is -inf. Parts are summed in their order, so
    equal parts give equal bits.
    """
    dtype = parts.maximum.dtype
    part_maximum, log_sum, entropy = (x.double() for x in (parts.maximum, parts.log_sum, parts.entropy))
    maximum, holder = part_maximum.max(dim=0)  # NaN wins
    empty = part_maximum.isneginf()
    shift = ((part_maximum - maximum) / temperature).masked_fill(empty, -torch.inf)
    decay = shift.exp()
    part_sum = log_sum.exp()
    weighted = torch.where(decay == 0, 0.0, decay * part_sum * (log_sum - entropy + shift)).sum(0)
    others = torch.where(decay == 0, 0.0, decay * part_sum).scatter(0, holder[None], 0.0).sum(0)
    rest = others + log_sum.gather(0, holder[None])[0].expm1()
    undefined = torch.where(maximum.isfinite(), 0.0, torch.nan)
    row_log_sum = rest.log1p() + undefined
    row_entropy = row_log_sum - weighted / (1 + rest)
    logprobs = parts.logprobs
    if holds_label is not None and ignored is not None:
        # The part's log-prob about its own maximum and sum, moved to those of the row; -inf where the part is empty.
        moved = parts.logprobs.double() + ((part_maximum - maximum) / temperature + (log_sum - row_log_sum))
        found = torch.where(holds_label, moved.masked_fill(empty, -torch.inf), 0.0).sum(0)
        found = found.masked_fill(holds_label.sum(0) != 1, torch.nan).masked_fill(ignored, 0.0)
        logprobs = (found + undefined).to(dtype)
    return TokenStats(logprobs, row_entropy.to(dtype), maximum.to(dtype), row_log_sum.to(dtype))
