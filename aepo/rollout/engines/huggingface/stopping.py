"""Where generation ends: end-of-text tokens, and stop strings that may span tokens or lie inside one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MAY_COMPLETE, IS_EOS = 1, 2


class StopRules:
    """Tells after every step which rows have ended, looking at text only where a token may have completed a string.

    A token may do so if its own text holds the last character of a stop string, or a part of that character's bytes.
    For closing tags that is the few tokens with ">" in them, so most steps cost one table look-up for all rows.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Iterable[int], device: torch.device
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        self._eos_ids = list(eos_ids)
        self._vocab_size = vocab_size
        self._device = device
        self._tables: dict[frozenset[str], Tensor] = {}

    def table(self, stop: Iterable[str]) -> Tensor:
        """uint8 [V]: what each token can do to a row with these stop strings: 0, MAY_COMPLETE or IS_EOS."""
        strings = frozenset(stop)
        if strings not in self._tables:
            last = {string[-1] for string in strings}
            if any(ord(character) > 127 for character in last):
                last.add("\ufffd")  # how a token with a part of a character's bytes is shown
            table = [MAY_COMPLETE if strings and not last.isdisjoint(text) else 0 for text in self._texts]
            table += [0] * (self._vocab_size - len(table))  # embeddings padded beyond the tokenizer
            for index in self._eos_ids:
                table[index] = IS_EOS
            self._tables[strings] = torch.tensor(table, dtype=torch.uint8, device=self._device)
        return self._tables[strings]

    def reason(self, flag: int, generated: list[int], stop: Sequence[str]) -> Literal["stop", "eos"] | None:
        """Why a row ends with the last of its `generated` tokens, given that token's table entry; None: it goes on."""
        if flag == IS_EOS:
            return "eos"
        # Every token holds at least one byte, so a string that ends here began at most so many tokens ago; an earlier
        # occurrence would have ended the row. One more token, because a decoder may drop a leading space.
        longest = max((len(string.encode()) for string in stop), default=0)
        tail = self._tokenizer.decode(generated[-longest - 1 :], skip_special_tokens=False)
        return "stop" if any(string in tail for string in stop) else None
