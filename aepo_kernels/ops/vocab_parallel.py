"""Vocabularies sharded over the ranks of a process group (tensor parallelism): from each rank's statistics the row's.

Each rank runs the stage `token_stats` over its own logits [.., V_r]. One all-gather of four numbers per token (maximum,
log_sum, entropy, and the label's log-prob from the rank that holds it) then gives every rank what the merge rule of
ops/merge.py needs, in rank order: all ranks get the same bits. The backward needs no collective: with the row's
statistics the gradient of a rank's logits is a matter of these logits alone.
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


def shard_of(process_group: dist.ProcessGroup | None, vocab_start: int | None) -> Shard:
    """The two public arguments, checked. A group of one rank is no group: nothing is sent."""
    if process_group is None:
        if vocab_start is not None:
            raise ValueError(f"vocab_start={vocab_start} has a meaning only together with process_group; got none")
        return Shard(None, 0)
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
    if shard.vocab_start == 0 and shard.group is None:
        return labels, ignore_index
    return (labels - shard.vocab_start).masked_fill(labels == ignore_index, NO_LABEL), NO_LABEL


def merge_over_ranks(
    stats: TokenStats, labels: Tensor | None, vocab: int, temperature: float, shard: Shard
) -> TokenStats:
    """The statistics of whole rows from those of the `vocab` entries on this rank; a collective over shard.group.

    labels [..] as `local_labels` makes them. A label that is held by no rank, or by several, raises on the CPU (on all
    ranks, after the collective, so nobody is left waiting) and has log-prob NaN elsewhere.
    """
    if labels is None:
        maximum, log_sum, entropy = _all_gather([stats.maximum, stats.log_sum, stats.entropy], shard)
        return merge_stats(TokenStats(stats.logprobs, entropy, maximum, log_sum), None, None, temperature)
    ours = (labels >= 0) & (labels < vocab)
    logprobs = torch.where(ours, stats.logprobs, ELSEWHERE)
    maximum, log_sum, entropy, logprobs = _all_gather([stats.maximum, stats.log_sum, stats.entropy, logprobs], shard)
    holds_label, ignored = logprobs != ELSEWHERE, labels == NO_LABEL
    if labels.device.type == "cpu":
        _check_placed(labels, ignored, holds_label, vocab, shard)
    return merge_stats(TokenStats(logprobs, entropy, maximum, log_sum), holds_label, ignored, temperature)


def _all_gather(columns: list[Tensor], shard: Shard) -> tuple[Tensor, ...]:
    """Per-token numbers [..] of this rank as those of all ranks, each [ranks, ..], in one collective."""
    mine = torch.stack(columns)
    resolve: Any = dist.distributed_c10d._resolve_process_group  # the type of its argument depends on PyTorch's version
    group = resolve(shard.group)
    everyones = mine.new_empty(group.size(), *mine.shape)
    dist.all_gather(list(everyones.unbind()), mine, group=group)
    return everyones.unbind(1)


def _check_placed(labels: Tensor, ignored: Tensor, holds_label: Tensor, vocab: int, shard: Shard) -> None:
    misplaced = (holds_label.sum(0) != 1) & ~ignored
    if misplaced.any():
        at = misplaced.nonzero()[0].tolist()
        label = int(labels[tuple(at)]) + shard.vocab_start
        ranks = holds_label[(slice(None), *at)].nonzero().flatten().tolist()
        raise ValueError(
            f"label {label} at position {at} must be in the vocabulary part of exactly one rank of process_group; "
            f"got ranks {ranks} (this rank holds [{shard.vocab_start}, {shard.vocab_start + vocab}))"
        )
