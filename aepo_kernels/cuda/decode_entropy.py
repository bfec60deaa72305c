"""The stage `decode_entropy` in CUDA C++: one launch, whatever the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.cuda.workspace import workspace


def decode_entropy(
    logits: Tensor,  # [B, V] float16, bfloat16 or float32, contiguous rows at any stride
    temperatures: Tensor | None,  # [B] float32
    temperature: float,
    slots: Tensor | None,  # [B] int32 or int64
    tokens: Tensor | None,  # [B] int32 or int64
    entropy: Tensor,  # [N] float32
    logprobs: Tensor | None,  # [N] float32
) -> None:
    """Fill entropy (and logprobs) by slot; the meaning is that of reference.decode_entropy.

    Nothing here waits for the GPU: sizes, strides and addresses go to the kernel as its arguments, slots, tokens and
    temperatures are read by the kernel, and the workspace exists already. Deterministic: the parts of a row are merged
    in a fixed order, whichever block does it. Their number depends on B, V and the GPU, and with it the last bits.
    """
    with torch.cuda.device_of(logits):
        stream = torch.cuda.current_stream().cuda_stream
        torch.ops.aepo_native.decode_entropy_cuda(
            logits,
            temperatures,
            temperature,
            slots,
            tokens,
            entropy,
            logprobs,
            workspace(logits.device, stream),
            stream,
        )
