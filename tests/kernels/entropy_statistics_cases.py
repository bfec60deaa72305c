"""Claims about entropy statistics over ranks, each checked by every rank (ranks.py): those of all ranks' tokens,
with the same bits on every rank, however they are spread; one all-gather."""

import torch
import torch.distributed as dist
from ranks import Ranks, collectives

from aepo_kernels.entropy_advantage import entropy_statistics


def tokens(lengths, seed=0):
    """Entropies and masks of ranks with so many tokens; NaN where nothing counts."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        mask = torch.rand(length, generator=g) < 0.6
        x = 5 + torch.randn(length, generator=g, dtype=torch.float64) * (1 + length / 10)
        found.append((x.masked_fill(~mask, torch.nan), mask))
    return found


def case_all_ranks_together(ranks: Ranks, lengths=((40, 40, 40), (3, 50, 17), (0, 30, 30), (60, 0, 0), (1, 1, 1))):
    for of_ranks in lengths:
        parts = tokens(of_ranks[: ranks.world])
        mean, std = entropy_statistics(*parts[ranks.rank], process_group=ranks.group)
        everywhere = torch.cat([x[m] for x, m in parts])
        expected = everywhere.mean(), everywhere.std()
        assert (mean.dtype, std.dtype) == (torch.float64, torch.float64)
        if len(everywhere) > 1:
            torch.testing.assert_close((mean, std), expected, rtol=1e-12, atol=1e-12)
        seen = ranks.gather(torch.stack((mean, std)))
        assert all(torch.equal(x, seen[0]) for x in seen)


def case_no_token_anywhere(ranks: Ranks):
    stats = entropy_statistics(torch.full((4,), torch.nan), torch.zeros(4), process_group=ranks.group)
    assert [x.item() for x in stats] == [0, 0]


def case_one_token_in_all(ranks: Ranks):
    stats = entropy_statistics(torch.tensor([3.5]), torch.tensor([ranks.rank == 0]), process_group=ranks.group)
    assert [x.item() for x in stats] == [3.5, 0]


def case_small_spread_far_from_0(ranks: Ranks):
    """Sums of squares would cancel to nothing: the spread is 1e-3 about 1e6."""
    g = torch.Generator().manual_seed(1)
    parts = 1e6 + 1e-3 * torch.randn(ranks.world, 500, generator=g, dtype=torch.float64)
    _, std = entropy_statistics(parts[ranks.rank], torch.ones(500), process_group=ranks.group)
    torch.testing.assert_close(std, parts.std(), rtol=1e-6, atol=0)


def case_one_all_gather(ranks: Ranks):
    x = torch.ones(5)
    assert len(collectives(lambda: entropy_statistics(x, x, process_group=ranks.group))) == 1
    dist.barrier()
