"""What a run of the benchmarks was asked for, and the shapes that follow from it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QWEN3, LLAMA3, SMOLLM2 = 151936, 128256, 49152
"""Vocabularies: an odd multiple of 128, a power of two's neighbour, and one of a small model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """None: each question's own default."""

    device: str
    """cpu or cuda."""
    quick: bool = False
    tokens: tuple[int, ...] | None = None
    vocab: tuple[int, ...] | None = None
    hidden: int | None = None
    dtype: torch.dtype | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda; got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch.cuda.is_available() is False here")
        for name, value in (("tokens", self.tokens), ("vocab", self.vocab)):
            if value is not None and (not value or min(value) < 1):
                raise ValueError(f"{name} must be integers >= 1; got {value}")
        for name, number in (("hidden", self.hidden), ("rounds", self.rounds)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be an integer >= 1; got {number}")

    @classmethod
    def from_text(
        cls, *, device: str | None, tokens: str | None, vocab: str | None, dtype: str | None, **others: Any
    ) -> Settings:
        """As the command line writes them: "128,512" for several numbers, None for the default."""
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        return cls(
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            tokens=_integers("tokens", tokens),
            vocab=_integers("vocab", vocab),
            dtype=DTYPES[dtype] if dtype else None,
            **others,
        )

    def shapes(
        self, cpu: list[tuple[int, int]], cuda: list[tuple[int, int]], quick: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """(tokens, vocab) of every problem: the defaults of the device, or all combinations of what was asked for.

        ValueError for one whose float32 logits, which eager PyTorch makes several times, or weight do not fit.
        """
        found = self._shapes({"cpu": cpu, "cuda": cuda}[self.device], quick)
        memory = _memory(self.device)
        for tokens, vocab in found:
            needed = 4 * vocab * max(tokens, self.hidden or 0)
            if needed > memory:
                raise ValueError(
                    f"tokens {tokens}, vocab {vocab}, hidden {self.hidden or 'default'}: one float32 tensor of that "
                    f"size takes {needed / 2**30:.3g} GiB, and this machine has {memory / 2**30:.3g}"
                )
        return found

    def _shapes(self, device: list[tuple[int, int]], quick: tuple[int, int]) -> list[tuple[int, int]]:
        defaults = [quick] if self.quick else device
        if self.tokens is None and self.vocab is None:
            return defaults
        if self.tokens is None:  # decoding has several batch sizes, each vocabulary is measured with all of them
            return [(t, v) for v in self.vocab or () for t in dict.fromkeys(t for t, _ in defaults)]
        return [(t, v) for v in self.vocab or defaults[0][1:] for t in self.tokens]


def _memory(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _integers(name: str, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be integers separated by commas, e.g. 128,512; got {text!r}") from None
