"""How token losses become one number: the weight of every token, computed here for all backends."""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(
    valid: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: str,
    denominator: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Weights w [T] with loss = sum over t of w_t L_t, exactly 0 where not valid.

    valid [T] bool; counts [T], how often each token stands for itself, 0 where not valid (None: once); cu_seqlens
    [N + 1] int64 bounds of the packed sequences (needed by the seq- aggregations); denominator [] float. A sequence
    counts when it has at least one valid token; n_i is the number of its valid tokens, each counted c_t times.

        aggregation           weight of a valid token      denominator, and its value when it is None
        token-mean            c_t / denominator            valid tokens; those of this call
        seq-mean-token-sum    c_t / denominator            sequences; those of this call
        seq-mean-token-mean   c_t / (denominator n_i)      sequences; those of this call
        constant              c_t / denominator            required; Dr. GRPO: sequences * maximum length

    Micro-batches and ranks add up exactly to the loss of the whole batch when each of them passes the count of the
    whole batch (no sequence may be cut for the seq- aggregations), and, for an entropy-aware advantage, its
    `entropy_stats`.
    """
    times = valid.to(torch.int64) if counts is None else counts.double()  # sums of either are exact
    if aggregation == "token-mean":
        share = times.sum() if denominator is None else denominator
    elif aggregation == "constant":
        assert denominator is not None, "the constant aggregation has no default"
        share = denominator
    else:
        assert cu_seqlens is not None, "aggregation over sequences needs their bounds"
        lengths = torch.nn.functional.pad(times.cumsum(0), (1, 0))[cu_seqlens].diff()
        share = (lengths > 0).sum() if denominator is None else denominator
        if aggregation == "seq-mean-token-mean":
            share = share * lengths.repeat_interleave(cu_seqlens.diff(), output_size=len(valid))
    weight = 1.0 / share.to(dtype)
    return torch.where(valid & (times != 0), weight if counts is None else counts * weight, 0.0)
