"""An lm_head whose weight is used where it is whole: inside its own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LinearHead(torch.nn.Linear):
    """A torch.nn.Linear [V, D] that also runs the linear operations, as the head of a sharded (FSDP2) model.

        model.lm_head = LinearHead.of(model.lm_head)                  # before fully_shard; keeps the parameters
        logprobs, entropy = model.lm_head(
            hidden, lambda h, weight, bias: linear_logprobs_and_entropy(h, weight, labels, bias)
        )

    FSDP2 gathers a module's weight for the time of its forward, and gathers it again and reduces its gradient in its
    backward. A fused operation that reads `head.weight` from outside sees a shard, or with full_tensor() skips that
    reduction: each rank then keeps the gradient of its own tokens alone. Passed in as a function, the operation runs
    where the weight is whole, and only `hidden` crosses the module's boundary: everything else, such as old log-probs
    that mixed precision would round to 16 bits there, is captured by the function untouched.
    """

    @classmethod
    def of(cls, linear: torch.nn.Linear) -> LinearHead:
        """A head that owns the parameters of `linear` (the same tensors, so a tied embedding stays tied)."""
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear; got {type(linear).__name__}")
        head = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head

    def forward(self, hidden: Tensor, operation: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None) -> Any:
        """operation(hidden, weight [V, D], bias [V] or None), or without one the logits [.., V] of hidden [.., D]."""
        if operation is None:
            return super().forward(hidden)
        return operation(hidden, self.weight, self.bias)
