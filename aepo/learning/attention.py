"""Attention within each path of a packed micro-batch, put into a transformers model for the time of a call.

Linear layers see all tokens of all paths as one long row. Attention is the only place where paths must not see each
other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "aepo_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, key_value_heads, T, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lengths: tuple[int, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    attend: Callable[..., Tensor] = scaled_dot_product_attention,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention within each path. Returns ([1, T, heads, head_dim], None).

    One call per path does no work on padding: forward and backward of 32 paths of 100 to 300 tokens take half the time
    of one padded call on the CPU. `split` matters: slicing would make the backward O(N T).
    """
    unsupported = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if others.get(name)]
    if unsupported or dropout:
        raise ValueError(f"packed attention has no {', '.join(unsupported) or 'dropout'}, which this model asks for")
    outputs = [
        attend(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, packed_attention)


@contextlib.contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """The model attends so within the block: the rollout engine runs the same module with its own attention."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before
