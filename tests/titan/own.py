"""Losses of a user's own, as docs/own_loss.md has them."""

import torch


def dapo(logprobs, entropy, batch):
    """The clip of the preset, written once more, with a metric."""
    ratio = (logprobs - batch.old_logprobs).exp()
    clipped = ratio.clamp(0.8, 1.28)
    value = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return -value.sum() / batch.tokens, {"advantage": batch.advantages.mean()}


def per_path(logprobs, entropy, batch):
    return torch.segment_reduce(logprobs, "mean", offsets=batch.cu_seqlens).sum() / batch.paths


def with_old_entropy(logprobs, entropy, batch):
    return (logprobs * batch.old_entropy).sum()


def misspelt(logprobs, entropy, batch):
    return (logprobs * batch.advantage).sum()


def of_means(logprobs, entropy, batch):
    """NaN without a token."""
    return -(logprobs * batch.advantages).mean() + 0.1 * entropy.mean()


def that_writes(logprobs, entropy, batch):
    """dapo, of a function that uses old_logprobs as its scratch space."""
    batch.old_logprobs.zero_()
    ratio = (logprobs - batch.rollout_logprobs).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.28) * batch.advantages)
    return -gain.sum() / batch.tokens
