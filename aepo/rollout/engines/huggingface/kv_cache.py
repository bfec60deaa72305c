"""Keys and values: of the rows that are being generated, and of everything read or written so far in a rollout.

`BatchCache` is the working set: one tensor [layers, 2, rows, heads, columns, head_dim]. Rows are aligned at their
ends: all prefixes end just before column `start`, so that every decode step writes one column, the same for all rows,
and the mask of a row never changes. Positions are given explicitly, so the alignment changes no result.

`PrefixTree` keeps what has been computed, each token once, as a tree of the same shape as the rollout trees. A request
finds the longest computed prefix by walking down; its row is filled by copying that chain.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

TOKEN_BYTES = 4


class Segment:
    """A run of tokens, from position `end - len` to `end`, with its keys and values."""

    __slots__ = ("children", "end", "kv", "parent", "tokens")

    def __init__(self, parent: Segment | None, tokens: bytes, kv: Tensor | None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.kv = kv  # [layers, 2, heads, len, head_dim]; None at the root
        self.end: int = (parent.end if parent else 0) + len(tokens) // TOKEN_BYTES
        self.children: dict[bytes, Segment] = {}

    def chain(self) -> Iterator[Segment]:
        """This segment and those before it, last first, without the root."""
        segment = self
        while segment.parent is not None:
            yield segment
            segment = segment.parent


class PrefixTree:
    """All computed keys and values of a rollout."""

    def __init__(self) -> None:
        self._root = Segment(None, b"", None)

    def longest_prefix(self, tokens: Sequence[int]) -> Segment:
        """The segment that ends farthest along `tokens` (the root: none)."""
        return _farthest(self._root, _to_bytes(tokens))

    def add(self, parent: Segment, tokens: Sequence[int], kv: Tensor) -> Segment:
        """Keep the keys and values of `tokens`, which follow `parent`. kv: [layers, 2, heads, len, head_dim]."""
        key = _to_bytes(tokens)
        return parent.children.setdefault(key, Segment(parent, key, kv))


def _to_bytes(tokens: Iterable[int]) -> bytes:
    """As an int32 array: so prefixes are compared at memory speed, and the same tokens are the same dict key."""
    return array("i", tokens).tobytes()


def _farthest(segment: Segment, tokens: bytes) -> Segment:
    offset = segment.end * TOKEN_BYTES
    # More than one child can match: one sample may be the beginning of another.
    ends = (_farthest(c, tokens) for c in segment.children.values() if tokens.startswith(c.tokens, offset))
    return max(ends, key=lambda end: end.end, default=segment)


class BatchCache(Cache):
    """The rows of one `generate` call; see the module's docstring for the layout."""

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        heads: int,
        columns: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        # Zeros, not empty: a masked column still takes part as 0 * value, and 0 * NaN is NaN.
        self.storage = torch.zeros(layers, 2, rows, heads, columns, head_dim, dtype=dtype, device=device)
        self._write = (slice(0), slice(0))
        self._read = slice(0)
        self._valid: Tensor | None = None

    def attend(self, rows: slice, write: slice, read: slice, valid: Tensor | None = None) -> None:
        """Set what the next forward does: write its tokens to columns `write` of `rows`, attend to columns `read`.

        valid: bool [rows, 1, tokens, 1]; False: padding, not written. None: everything is written.
        """
        self._write, self._read, self._valid = (rows, write), read, valid

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with [rows, heads, tokens, head_dim]."""
        rows, columns = self._write
        both = []
        for stored, new in zip(self.storage[layer_idx], (key_states, value_states), strict=True):
            stored = stored[rows]
            target = stored[:, :, columns]
            target.copy_(new if self._valid is None else torch.where(self._valid, new, target))
            both.append(stored[:, :, self._read])
        return both[0], both[1]

    def fill(self, row: int, start: int, segment: Segment, length: int) -> None:
        """Copy the first `length` positions of the chain that ends with `segment` to columns from `start` on."""
        for piece in segment.chain():
            assert piece.parent is not None
            assert piece.kv is not None
            first, last = piece.parent.end, min(piece.end, length)
            if first < last:
                self.storage[:, :, row, :, start + first : start + last] = piece.kv[:, :, :, : last - first]

    def extract(self, row: int, columns: slice) -> Tensor:
        """A copy of the keys and values of `columns`, [layers, 2, heads, len, head_dim]."""
        return self.storage[:, :, row, :, columns].clone()

    def move(self, source: list[int], target: list[int], columns: slice) -> None:
        """Copy rows `source` over rows `target`."""
        self.storage[:, :, target, :, columns] = self.storage[:, :, source, :, columns]
