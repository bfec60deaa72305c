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
