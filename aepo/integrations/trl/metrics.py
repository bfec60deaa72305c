"""What a loss measured, over the tokens of all ranks."""

from __future__ import annotations

import torch
from accelerate.utils import gather_object

from aepo.integrations.trl.loss import MicroLoss


def over_ranks(found: MicroLoss) -> dict[str, float]:
    """policy/<name>: means over the tokens of all ranks, of ratio_max the largest. As objects: a rank without tokens
    has none of a function's metrics."""
    names = list(found.metrics)
    tokens, *values = torch.stack([found.tokens, *found.metrics.values()]).tolist()  # waits for a GPU once
    parts = gather_object([(tokens, dict(zip(names, values, strict=True)))])
    means = {}
    for name in sorted({name for _, part in parts for name in part}):
        known = [(n, part[name]) for n, part in parts if name in part]
        if name == "ratio_max":
            means[f"policy/{name}"] = max(value for _, value in known)
        else:
            means[f"policy/{name}"] = sum(n * value for n, value in known) / max(sum(n for n, _ in known), 1)
    return means
