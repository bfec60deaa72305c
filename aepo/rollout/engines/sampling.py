"""Drawing tokens: all rows at once, with noise that depends on (seed, output position) and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniform_noise(seeds: Sequence[int], positions: int) -> Tensor:
    """Draws from [0, 1), float64 [len(seeds), positions]; entry [i, j] is a function of (seeds[i], j).

    SplitMix64 (Steele, Lea and Flood, 2014) read at any index: its state after j steps is seed + j * gamma.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    z = np.array(seeds, dtype=np.uint64)[:, None] + gamma * np.arange(1, positions + 1, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    # 52 bits, so that `draw`'s product with the total weight is below that total also after rounding.
    return torch.from_numpy((z >> np.uint64(12)) * 2.0**-52)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row from softmax(logits), by inverting the distribution function; int64 [rows].

    logits: [rows, V], any float dtype; uniforms: float64 [rows], in [0, 1).

    The sums are float64: in float32 the tokens of a vocabulary of 150,000 would share 2^24 steps, and rare ones late in
    the order would never be drawn. A row with NaN gives some token in range.
    """
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    thresholds = uniforms[:, None] * cumulative[:, -1:]
    # right=True: the first token whose sum exceeds the threshold, so one of weight 0 is never drawn.
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)
