"""What a loss measured, over the tokens of all ranks and under the names that aepo's own trainer logs."""

from __future__ import annotations

from accelerate.utils import gather_object
from torch import Tensor

NAMES = {"clip_fraction_high": "clip_high", "clip_fraction_low": "clip_low", "dual_clip_fraction": "dual_clip"}


def over_ranks(metrics: dict[str, Tensor], *, without: tuple[str, ...]) -> dict[str, float]:
    """policy/<name> of a PolicyLoss's metrics, those in `without` left out: means over the tokens of all ranks, of
    ratio_max the largest. As objects: a rank without tokens has none of a function's metrics."""
    tokens = float(metrics["valid_tokens"])
    own = {name: (float(value), tokens) for name, value in metrics.items() if name not in without}
    parts = gather_object([own])
    found = {}
    for name in sorted({name for part in parts for name in part}):
        values = [part[name] for part in parts if name in part]
        if name == "ratio_max":
            mean = max(value for value, _ in values)
        else:
            mean = sum(value * n for value, n in values) / max(sum(n for _, n in values), 1.0)
        found[f"policy/{NAMES.get(name, name)}"] = mean
    return found
