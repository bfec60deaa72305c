"""How token losses become one number: the weight of every token, computed here for all backends."""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(
    valid: Tensor, cu_seqlens: Tensor | None, aggregation: str, denominator: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Weights w [T] with loss = sum over t of w_t L_t, exactly 0 where not valid.

    valid [T] bool; cu_seqlens [N + 1] int64 bounds of the packed sequences (needed by the seq- aggregations);
    denominator [] float. A sequence counts when it has at least one valid token; n_i is the number of its valid tokens.

        aggregation           weight of a valid token    denominator, and its value when it is None
        token-mean            1 / denominator            valid tokens; those of this call
        seq-mean-token-sum    1 / denominator            sequences; those of this call
        seq-mean-token-mean   1 / (denominator n_i)      sequences; those of this call
        constant              1 / denominator            required; Dr. GRPO: sequences * maximum length

    Micro-batches and ranks add up exactly to the loss of the whole batch when each of them passes the count of the
    whole batch (no sequence may be cut for the seq- aggregations), and, for an entropy-aware advantage, its
    `entropy_stats`.
    """
    if aggregation == "token-mean":
        share = valid.sum() if denominator is None else denominator
    elif aggregation == "constant":
        assert denominator is not None, "the constant aggregation has no default"
        share = denominator
    else:
        assert cu_seqlens is not None, "aggregation over sequences needs their bounds"
        counts = torch.nn.functional.pad(valid.cumsum(0), (1, 0))[cu_seqlens].diff()
        share = (counts > 0).sum() if denominator is None else denominator
        if aggregation == "seq-mean-token-mean":
            share = share * counts.repeat_interleave(cu_seqlens.diff(), output_size=len(valid))
    return torch.where(valid, 1.0 / share.to(dtype), 0.0)
