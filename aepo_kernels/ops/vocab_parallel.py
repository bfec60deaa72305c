"""Vocabularies sharded over the ranks of a process group (tensor parallelism): from each rank's statistics the row's.

Each rank runs the stage `token_stats` over its own logits [.., V_r]. One all-gather of four numbers per token (maximum,
log_sum, entropy, and the label's log-prob from the rank that holds it) then gives every rank what the merge rule of
ops/merge.py needs, in rank order: all ranks get the same bits. The gradient of a rank's logits is then a matter of
these logits alone; that of hidden states, which the weights of all ranks add to, is summed in one more collective.

Registers aepo::gather_tokens, for hidden states whose tokens are sharded (sequence parallelism).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from aepo_kernels.ops.merge import TokenStats, merge_stats
from aepo_kernels.ops.rows import NO_LABEL

ELSEWHERE = torch.inf
"""What a rank says for a label that it does not hold; no log-prob is +inf."""


class Shard(NamedTuple):
    """This rank's part of the vocabulary, in the form that the registered operations take."""

    group: str | None
    """Name of the process group; None: the whole vocabulary is here."""
    vocab_start: int
    """Id of the part's first entry."""


WHOLE = Shard(None, 0)


def shard_of(process_group: dist.ProcessGroup | None, vocab_start: int | None) -> Shard:
    """The two public arguments, checked. A group of one rank is no group: nothing is sent."""
    if process_group is None:
        if vocab_start is not None:
            raise ValueError(f"vocab_start={vocab_start} has a meaning only together with process_group; got none")
        return WHOLE
    check_process_group(process_group)
    if vocab_start is None:
        raise ValueError(
            "process_group needs vocab_start, the id of the first vocabulary entry that this rank holds: "
            "parts may be of different sizes, so it cannot be known from the rank"
        )
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int):
        raise TypeError(f"vocab_start must be an int; got {type(vocab_start).__name__}")
    if vocab_start < 0:
        raise ValueError(f"vocab_start must be >= 0; got {vocab_start}")
    return Shard(group_name(process_group), vocab_start)


def check_process_group(process_group: dist.ProcessGroup) -> None:
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup; got {type(process_group).__name__}")


def group_name(process_group: dist.ProcessGroup | None) -> str | None:
    """The name by which a registered operation finds the group; None where there is nobody to talk to."""
    return None if process_group is None or process_group.size() == 1 else process_group.group_name


def local_labels(labels: Tensor, ignore_index: int, shard: Shard) -> tuple[Tensor, int]:
    """Labels [..] counted from the first entry of this rank's part, and the index that is ignored among them.

    Ignored labels become NO_LABEL, because some other id could fall onto ignore_index when the start is subtracted.
    """
    if shard == WHOLE:
        return labels, ignore_index
    return (labels - shard.vocab_start).masked_fill(labels == ignore_index, NO_LABEL), NO_LABEL


def merge_over_ranks(
    stats: TokenStats, labels: Tensor | None, vocab: int, temperature: float, shard: Shard
) -> TokenStats:
    """The statistics of whole rows from those of the `vocab` entries on this rank; one collective if there are others.

    labels [..] as `local_labels` makes them. A label that is held by no rank, or by several, raises on the CPU (on all
    ranks, after the collective, so nobody is left waiting) and has log-prob NaN elsewhere.
    """
    if shard.group is None:
        return stats
    if labels is None:
        mine = torch.stack((stats.maximum, stats.log_sum, stats.entropy))
        maximum, log_sum, entropy = _all_gather(mine, shard.group).unbind(1)
        return merge_stats(TokenStats(stats.logprobs, entropy, maximum, log_sum), None, None, temperature)
    ours = (labels >= 0) & (labels < vocab)
    logprobs = torch.where(ours, stats.logprobs, ELSEWHERE)
    mine = torch.stack((stats.maximum, stats.log_sum, stats.entropy, logprobs))
    maximum, log_sum, entropy, logprobs = _all_gather(mine, shard.group).unbind(1)
    holds_label, ignored = logprobs != ELSEWHERE, labels == NO_LABEL
    if labels.device.type == "cpu":
        _check_placed(labels, ignored, holds_label, vocab, shard)
    return merge_stats(TokenStats(logprobs, entropy, maximum, log_sum), holds_label, ignored, temperature)


def sum_over_ranks(x: Tensor, group: str, scatter: bool) -> Tensor:
    """The sum of all ranks' x [T, D]; with `scatter` this rank's share of the tokens, [T / ranks, D]. Overwrites x."""
    if not scatter:
        dist.all_reduce(x, group=_resolve(group))
        return x
    shares = x.view(group_size(group), -1, x.shape[-1])
    share = torch.empty_like(shares[0])
    dist.reduce_scatter(share, list(shares.unbind()), group=_resolve(group))
    return share


torch.library.define("aepo::gather_tokens", "(Tensor hidden, str group) -> Tensor")


@torch.library.impl("aepo::gather_tokens", "CompositeExplicitAutograd")
def _gather_tokens(hidden: Tensor, group: str) -> Tensor:
    """Hidden states [T / ranks, .., D] of this rank's tokens as those of all, [T, .., D] in the order of the ranks."""
    return _all_gather(hidden.contiguous(), group).flatten(0, 1)


@torch.library.register_fake("aepo::gather_tokens")
def _gather_tokens_fake(hidden: Tensor, group: str) -> Tensor:
    return hidden.new_empty(len(hidden) * group_size(group), *hidden.shape[1:])


def group_size(group: str) -> int:
    return _resolve(group).size()


def _resolve(group: str) -> dist.ProcessGroup:
    resolve: Any = dist.distributed_c10d._resolve_process_group  # the type of its argument depends on PyTorch's version
    return resolve(group)


def _all_gather(mine: Tensor, group: str) -> Tensor:
    """The tensors [..] of all ranks, [ranks, ..]."""
    everyones = mine.new_empty(group_size(group), *mine.shape)
    dist.all_gather(list(everyones.unbind()), mine, group=_resolve(group))
    return everyones


def _check_placed(labels: Tensor, ignored: Tensor, holds_label: Tensor, vocab: int, shard: Shard) -> None:
    misplaced = (holds_label.sum(0) != 1) & ~ignored
    if misplaced.any():
        at = tuple(misplaced.nonzero()[0].tolist())
        ranks = holds_label[(slice(None), *at)].nonzero().flatten().tolist()
        raise ValueError(
            f"label {int(labels[at]) + shard.vocab_start} must be in the vocabulary part of exactly one rank of "
            f"process_group; got ranks {ranks} (this rank holds [{shard.vocab_start}, {shard.vocab_start + vocab}))"
        )
