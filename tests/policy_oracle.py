"""The policy losses written as the papers print them, for autograd: another formulation than the kernels' table."""

import dataclasses
import itertools

import torch
from torch import Tensor


@dataclasses.dataclass
class Batch:
    """Packed tokens with everything that any objective can ask for, float64 on the CPU unless converted."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor
    cu_seqlens: Tensor

    def to(self, dtype, device="cpu"):
        fields = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        return Batch(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in fields.items()})


def make_batch(seed=0, lengths=(13, 1, 0, 29, 8), spread=0.5):
    """Sequences with masked tokens, one without tokens; log-ratios wide enough to reach every clip rule."""
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    old = -2 * torch.rand(tokens, generator=g, dtype=torch.float64) - 0.1

    def noise(scale):
        return scale * torch.randn(tokens, generator=g, dtype=torch.float64)

    mask = torch.rand(tokens, generator=g) < 0.75
    mask[0] = mask[13] = True
    return Batch(
        logprobs=old + noise(spread),
        old_logprobs=old,
        advantages=noise(1.0),
        mask=mask,
        entropy=noise(1.0).abs() ** 3,  # skewed, so that a large factor turns some advantages around
        ref_logprobs=old + noise(0.4),
        rollout_logprobs=old + noise(0.6),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
    )


def policy_oracle(b, o, *, entropy_stats=None, denominator=None):
    """The loss of objective `o` on batch `b`, differentiable by autograd in b.logprobs and b.entropy."""
    sequences = itertools.starmap(range, itertools.pairwise(b.cu_seqlens.tolist()))
    valid = [[t for t in sequence if b.mask[t]] for sequence in sequences]
    valid = [tokens for tokens in valid if tokens]
    everywhere = [t for tokens in valid for t in tokens]

    advantages = b.advantages
    if o.entropy_advantage:
        h = b.entropy.detach()
        mean, std = (h[everywhere].mean(), h[everywhere].std()) if entropy_stats is None else entropy_stats
        factor = 1 + o.entropy_advantage * (h - mean) / std
        advantages = advantages * (factor.clamp(min=0) if o.clamp_entropy_factor else factor)

    per_sequence = []
    for tokens in valid:
        a, logprob, old = advantages[tokens], b.logprobs[tokens], b.old_logprobs[tokens]
        r = (logprob - old).exp()
        if o.ratio_level == "sequence":
            r = (logprob - old).mean().exp().expand(len(tokens))
        loss = clipped(o, r, a, logprob)
        if o.importance_cap is not None:
            loss = loss * (old - b.rollout_logprobs[tokens]).exp().clamp(max=o.importance_cap).detach()
        log_ref = b.ref_logprobs[tokens] - logprob
        kl = {"k1": -log_ref, "k2": log_ref**2 / 2, "k3": log_ref.exp() - 1 - log_ref}[o.kl_estimator]
        per_sequence.append(loss + o.kl_coef * kl - o.entropy_bonus * b.entropy[tokens])

    if o.aggregation == "token-mean":
        return torch.cat(per_sequence).sum() / (denominator or len(everywhere))
    if o.aggregation == "seq-mean-token-sum":
        return torch.stack([x.sum() for x in per_sequence]).sum() / (denominator or len(valid))
    if o.aggregation == "seq-mean-token-mean":
        return torch.stack([x.mean() for x in per_sequence]).sum() / (denominator or len(valid))
    return torch.cat(per_sequence).sum() / denominator


def clipped(o, r, a, logprob):
    low, high = torch.full_like(r, 1 - o.eps_low), torch.full_like(r, 1 + o.eps_high)
    if o.clip == "cispo":
        return -r.clamp(1 - o.eps_low, 1 + o.eps_high).detach() * a * logprob
    if o.clip == "gppo":
        low = low / r.detach() * r
    if o.clip in ("aepo", "gppo"):
        high = high / r.detach() * r
    loss = torch.max(-a * r, -a * torch.minimum(torch.maximum(r, low), high))
    if o.dual_clip is not None:
        loss = torch.where(a < 0, torch.min(loss, -o.dual_clip * a), loss)
    return loss
