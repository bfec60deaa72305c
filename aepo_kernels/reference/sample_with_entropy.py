"""One token per row drawn from truncated softmax(logits / temperature), in plain PyTorch.

With x a row of logits, z = x / temperature and K the tokens that top-k, top-p and min-p leave,

    token = argmax over K of z_i + g_i        g_i = -log(-log1p(-v_i))        v_i = (word_i + 1/2) / 2^32

The g_i are Gumbel noise, so this draws token i with probability p_i / sum of K's p (Gumbel 1954; Maddison et al. 2014,
A* sampling). They come from a counter (Philox4x32-10, Salmon et al. 2011), not from a state, and do not depend on K: in
whatever order, in however many parts and by whatever search a backend looks at the row, the argmax is the same. v near
0 is the noise that wins, and there a float32 has all of a word's digits; 1 - v there has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aepo_kernels.reference.token_stats import token_stats

LOW32 = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The 4 words of Philox4x32-10 for a counter of 4 words and a key of 2, 32-bit numbers in broadcastable int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products up to 2^64 wrap around in int64, but their bits are right, and the masks take off the sign.
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((high >> 32) & LOW32) ^ c1 ^ k0, high & LOW32
        c2, c3 = ((low >> 32) & LOW32) ^ c3 ^ k1, low & LOW32
        k0, k1 = (k0 + 0x9E3779B9) & LOW32, (k1 + 0xBB67AE85) & LOW32
    return c0, c1, c2, c3


def gumbel_noise(seed: Tensor, offset: Tensor, vocab: int) -> Tensor:
    """[B, vocab] float64 from seed, offset [B] int64. Token i has word i % 4 of the counter (i / 4, offset, 0), and the
    seed is the key; 64-bit numbers give their lower half first."""
    blocks = torch.arange((vocab + 3) // 4, device=seed.device)
    seed, offset = seed[:, None], offset[:, None]
    zero = torch.zeros_like(seed)
    words = philox((blocks, offset & LOW32, (offset >> 32) & LOW32, zero), (seed & LOW32, (seed >> 32) & LOW32))
    v = (torch.stack(words, -1).flatten(1)[:, :vocab].double() + 0.5) / 2**32
    return -(-torch.log1p(-v)).log()


def kept_tokens(
    z: Tensor,  # [B, V] float64 about the row's maximum: z <= 0
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor:
    """[B, V] bool: what the filters leave. Equal logits share their fate; -inf is never kept."""
    z = z.contiguous()
    descending, _ = z.sort(dim=-1, descending=True)
    num_above = torch.searchsorted(-descending, -z)  # #{j: z_j > z_i}
    keep = ~z.isneginf()
    if top_k is not None:
        keep &= num_above < top_k[:, None]
    if top_p is not None:
        # Not cumsum: on CUDA PyTorch has none of floating point numbers that always gives the same bits.
        mass = torch.log_softmax(descending, -1).logcumsumexp(-1).exp()
        mass_above = mass.gather(-1, (num_above - 1).clamp(min=0)).masked_fill(num_above == 0, 0.0)
        keep &= (mass_above < top_p[:, None]) | (top_p[:, None] >= 1)
    if min_p is not None:
        keep &= z.exp() >= min_p[:, None]
    return keep


def sample_with_entropy(
    logits: Tensor,  # [B, V]
    temperature: Tensor,  # [B] float64; 0: the most likely token, and statistics at temperature 1
    top_k: Tensor | None,  # [B] int64, or None for no such filter, as below
    top_p: Tensor | None,  # [B] float64
    min_p: Tensor | None,  # [B] float64
    seed: Tensor,  # [B] int64
    offset: Tensor,  # [B] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens [B] int64, logprobs [B], entropy [B]), the latter in float32 (float64 for float64 logits).

    Log-prob and entropy are those of softmax(logits / temperature) over the whole vocabulary. A row with NaN, +inf or
    no finite logit, or a parameter outside its range, has token -1 and NaN.
    """
    x = logits.double()
    maximum = x.amax(-1)  # NaN where the row holds one
    greedy = temperature == 0
    defined = maximum.isfinite() & (temperature >= 0) & temperature.isfinite()
    if top_k is not None:
        defined &= top_k >= 1
    if top_p is not None:
        defined &= (top_p > 0) & (top_p <= 1)
    if min_p is not None:
        defined &= (min_p >= 0) & (min_p <= 1)

    z = (x - maximum[:, None]) / temperature.masked_fill(greedy, 1.0)[:, None]
    z = z.masked_fill(~defined[:, None], 0.0)  # any number will do
    noise = gumbel_noise(seed, offset, logits.shape[1]).masked_fill(greedy[:, None], 0.0)
    # argmax takes the first of equals, the lowest id.
    tokens = (z + noise).masked_fill(~kept_tokens(z, top_k, top_p, min_p), -torch.inf).argmax(-1)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs, entropy, _, _ = token_stats(z.to(acc), tokens, 1.0, -1, False)
    tokens = tokens.masked_fill(~defined, -1)
    return tokens, logprobs.masked_fill(~defined, torch.nan), entropy.masked_fill(~defined, torch.nan)
