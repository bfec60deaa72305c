"""The stage `sample_with_entropy` in CUDA C++: one launch, whatever the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.cuda.workspace import workspace


def sample_with_entropy(
    logits: Tensor,  # [B, V] float16, bfloat16 or float32, contiguous rows at any stride
    temperature: Tensor,  # [B] float64
    top_k: Tensor | None,  # [B] int64
    top_p: Tensor | None,  # [B] float64
    min_p: Tensor | None,  # [B] float64
    seed: Tensor,  # [B] int64
    offset: Tensor,  # [B] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens [B] int64, logprobs [B], entropy [B]), float32; the meaning is that of the reference.

    Nothing here waits for the GPU, and equal inputs give equal bits; `aepo_kernels.cuda.decode_entropy` says how.
    """
    rows = logits.shape[0]
    tokens = logits.new_empty(rows, dtype=torch.int64)
    logprobs, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(logits):
        stream = torch.cuda.current_stream().cuda_stream
        torch.ops.aepo_native.sample_with_entropy_cuda(
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            offset,
            tokens,
            logprobs,
            entropy,
            workspace(logits.device, stream),
            stream,
        )
    return tokens, logprobs, entropy
