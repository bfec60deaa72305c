"""Random numbers by counting: every draw is a hash of what it is for, never a state that others advance.

So a path gets the same seeds whatever else is in the batch and in whatever order things finish.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """An unsigned 64-bit integer; different parts give unrelated ones."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def derive_uniform(*parts: int | str) -> float:
    """A draw from [0, 1), a multiple of 2^-53."""
    return (derive_seed(*parts) >> 11) * 2.0**-53
