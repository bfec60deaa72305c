"""The rows of one `generate` call: which request each belongs to, what it may attend to, what it has written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aepo.rollout.engine import Generation, GenerationRequest
from aepo.rollout.engines.huggingface.kv_cache import BatchCache, Segment
from aepo.rollout.engines.huggingface.stopping import StopRules
from aepo_kernels import sample_with_entropy

Ending = Literal["stop", "eos", "length"]


@dataclass
class Prefix:
    """A distinct prefix of a call, and the requests that continue it."""

    token_ids: tuple[int, ...]
    members: list[int]
    segment: Segment  # the farthest computed one

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def computed(self) -> int:
        """Positions that need no forward. The last token always takes one: its logits are not kept."""
        return min(self.segment.end, self.length - 1)

    @property
    def missing(self) -> int:
        return self.length - self.computed


class Wave:
    """Row r belongs to request `owners[r]`. The rows that go on are always the first ones, so a step computes nothing
    else. Prefixes end before column `start` of the cache; output position i of every row is column `start + i`.
    """

    def __init__(
        self, requests: Sequence[GenerationRequest], prefixes: Sequence[Prefix], cache: BatchCache, rules: StopRules
    ) -> None:
        self.requests = requests
        self.cache = cache
        self.start = max(prefix.length for prefix in prefixes)
        self.step = 0  # tokens written per row
        # The first rows are computed, one per prefix; the others continue the same prefixes and are copied from them.
        self.owners = [prefix.members[0] for prefix in prefixes]
        self.owners += [member for prefix in prefixes for member in prefix.members[1:]]
        self.prefixes = {member: prefix for prefix in prefixes for member in prefix.members}
        self.low = 0  # first column that some row needs

        device = cache.storage.device
        ordered = [requests[owner] for owner in self.owners]
        lengths = torch.tensor([len(request.token_ids) for request in ordered], device=device)
        columns = torch.arange(cache.storage.shape[4], device=device)
        before = columns < (self.start - lengths)[:, None]
        # Additive, [rows, 1, 1, columns], for good: a row sees everything from its first column on.
        self.mask = torch.zeros(before.shape, dtype=cache.storage.dtype, device=device)
        self.mask = self.mask.masked_fill_(before, -torch.inf)[:, None, None]
        self.positions = lengths[:, None]  # [rows, 1], of the next token that goes through the model
        self.next_tokens = torch.empty(0, dtype=torch.int64, device=device)  # [rows], drawn last
        self._owner_index = torch.tensor(self.owners, device=device)
        # In the dtypes that a draw takes as they are. Its seeds are signed: the same 64 bits.
        seeds = torch.tensor([request.seed for request in ordered], dtype=torch.uint64).view(torch.int64)
        self._seeds = seeds.to(device)
        temperatures = [request.temperature for request in ordered]
        self._temperatures = torch.tensor(temperatures, dtype=torch.float64, device=device)

        self._rules = rules
        self._table = rules.table(string for request in requests for string in request.stop)
        self._next_limit = min(request.max_new_tokens for request in requests)
        self._endings: dict[int, tuple[int, Ending]] = {}  # request: (tokens written, why)
        new_tokens = max(request.max_new_tokens for request in requests)
        self._tokens = torch.zeros(len(requests), new_tokens, dtype=torch.int64, device=device)
        precision = torch.promote_types(cache.storage.dtype, torch.float32)
        self._logprobs = torch.zeros(self._tokens.shape, dtype=precision, device=device)
        self._entropies = torch.zeros_like(self._logprobs)

    def draw(self, logits: Tensor) -> None:
        """Write one token per row. logits: [rows, V]."""
        tokens, logprobs, entropies = sample_with_entropy(
            logits, temperature=self._temperatures, seed=self._seeds, offset=self.step
        )
        # A row without a softmax has token -1, no index of anything, and NaN, which results() reports.
        self.next_tokens = tokens.clamp(min=0)
        at = (self._owner_index, self.step)
        self._tokens[at], self._logprobs[at], self._entropies[at] = self.next_tokens, logprobs, entropies
        self.step += 1

    def ended_rows(self) -> list[int]:
        """Rows whose last token ended them, ascending; remembers why."""
        endings: dict[int, Ending] = {}
        flags = self._table[self.next_tokens]
        if flags.any():
            for row, flag in enumerate(flags.tolist()):
                if flag and (reason := self._rules.reason(flag, self.written(row), self._request(row).stop)):
                    endings[row] = reason
        if self.step == self._next_limit:
            for row in range(len(self.owners)):
                if self._request(row).max_new_tokens == self.step:
                    endings.setdefault(row, "length")
        self._endings |= {self.owners[row]: (self.step, reason) for row, reason in endings.items()}
        return sorted(endings)

    def written(self, row: int) -> list[int]:
        """Tokens that the row has generated so far."""
        return self._tokens[self.owners[row], : self.step].tolist()

    def drop(self, rows: Collection[int]) -> None:
        """Take rows out of the batch: the last rows that go on move into their places."""
        left = len(self.owners) - len(rows)
        holes = [row for row in rows if row < left]
        movers = [row for row in range(left, len(self.owners)) if row not in rows]
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.cache.move(movers, holes, slice(self.low, self.start + self.step - 1))
        self.owners = [self.owners[row] for row in order]
        index = torch.tensor(order, dtype=torch.int64, device=self.mask.device)
        for name in ("mask", "positions", "next_tokens", "_owner_index", "_seeds", "_temperatures"):
            setattr(self, name, getattr(self, name)[index])
        if self.owners:
            self.low = self.start - max(len(self._request(row).token_ids) for row in range(left))
            self._next_limit = min(self._request(row).max_new_tokens for row in range(left))

    def results(self, version: int) -> list[Generation]:
        """One per request, in their order. FloatingPointError: a log-prob or entropy is not finite."""
        broken = (~(self._logprobs.isfinite() & self._entropies.isfinite())).nonzero()
        if len(broken):
            request, position = broken[0].tolist()
            raise FloatingPointError(
                f"the model's logits are not finite at output position {position} of requests[{request}] "
                f"(weights version {version})"
            )
        columns = zip(self._tokens.tolist(), self._logprobs.tolist(), self._entropies.tolist(), strict=True)
        return [
            Generation(tuple(tokens[:end]), tuple(logprobs[:end]), tuple(entropies[:end]), reason, version)
            for (tokens, logprobs, entropies), (end, reason) in zip(
                columns, (self._endings[request] for request in range(len(self.requests))), strict=True
            )
        ]

    def _request(self, row: int) -> GenerationRequest:
        return self.requests[self.owners[row]]
