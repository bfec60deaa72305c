"""Text becomes tokens: what users and tools say stays letters, also where it looks like a control token.

A tokenizer finds its added tokens (<|im_end|>, <tool_call>, <think>) wherever their text occurs. Here an occurrence in
such a content is cut after its first character, and the parts are encoded by themselves: no part holds it any more.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from aepo.types import Message, TokenIds

TRUSTED_ROLES = ("system", "developer", "assistant")
"""Whose contents are written by the author of a task or by the model: control tokens stay what they are there."""
PROBE = 'Text "a": <b>1.5</b>\n\n  {x: [y]} \\ |z| 50% ~Ab'


Protect = Callable[[str], str]
"""Marks the places in a text that a rendering is cut at, so that it stays letters."""
Render = Callable[[Sequence[Message], Protect], str]
"""Renders a dialogue whose contents are protected already; other text that is not to be trusted it protects itself."""


class TextTokenizer:
    """A fast tokenizer and the texts that must stay letters: its added tokens, and those in `letters`.

    Added tokens of white space only, or of one character, count as letters. ValueError: the tokenizer is a slow one,
    or a text does not survive encoding and decoding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, letters: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.name = str(tokenizer.name_or_path or type(tokenizer).__name__)
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer {self.name}: expected a fast one (with a tokenizer.json)")
        added = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip() and len(token.content) > 1
        }
        self._control = frozenset((*added, *letters))
        self._control_ids = frozenset(added.values()) - {tokenizer.unk_token_id}
        self._lengths = sorted({len(text) for text in self._control})
        first = "".join(sorted({text[0] for text in self._control}))
        self._first = re.compile(f"[{re.escape(first)}]" if first else "(?!)")
        self._normalizes = tokenizer.backend_tokenizer.normalizer is not None
        begin = tokenizer.encode("a", add_special_tokens=True)[:1]
        self.bos: TokenIds = tuple(begin) if begin == [tokenizer.bos_token_id] else ()  # where encoding adds it
        self._anchor, self._anchor_ids = self._find_anchor()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, with its control tokens."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def plain_tokens(self, text: str) -> TokenIds:
        """Tokens that are no control tokens, and go on after other tokens with exactly this text."""
        return self.continued(self.cut(text))

    def rendered_tokens(self, messages: Sequence[Message], render: Render) -> TokenIds:
        """Tokens of a dialogue, with the tokenizer's BOS once. Contents of users and tools stay letters, all else is
        as the tokenizer makes it."""
        first, *others = self.rendered_pieces(messages, render)
        ids = self._encode(first) + self.continued(others)
        return ids if ids[: len(self.bos)] == self.bos else self.bos + ids

    def rendered_pieces(self, messages: Sequence[Message], render: Render) -> list[str]:
        """The rendered text, cut where what users and tools say would become a control token."""
        # Letters and digits, which templates leave alone; a text cannot hold the hash of all texts.
        mark = f"cut{hashlib.sha256(repr(messages).encode()).hexdigest()[:16]}x"

        def protect(text: str) -> str:
            return mark.join(self.cut(text))

        trusted = [message.get("role") in TRUSTED_ROLES for message in messages]
        cut = [m if trust else _with_texts(m, protect) for m, trust in zip(messages, trusted, strict=True)]
        return render(cut, protect).split(mark)

    def continued(self, pieces: Iterable[str]) -> TokenIds:
        """Each piece encoded by itself, as what goes on after other tokens."""
        return tuple(chain.from_iterable(map(self._continued, pieces)))

    def cut(self, text: str) -> list[str]:
        """Its parts, none of which holds a control token; a text that has none is one part."""
        text = sound(text)
        places = [
            match.start()
            for match in self._first.finditer(text)
            if any(text[match.start() : match.start() + length] in self._control for length in self._lengths)
        ]
        ends = [*(place + 1 for place in places), len(text)]
        pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if not self._normalizes:
            return pieces
        # What a normalizer makes of a text may be a control token: full-width signs, capital letters.
        fine = [self._control_ids.isdisjoint(self._encode(piece)) for piece in pieces]
        return list(chain.from_iterable([piece] if ok else piece for piece, ok in zip(pieces, fine, strict=True)))

    def _encode(self, text: str) -> TokenIds:
        return tuple(self._tokenizer.encode(sound(text), add_special_tokens=False))

    def _continued(self, text: str) -> TokenIds:
        if not text:
            return ()
        ids, size = self._encode(self._anchor + text), len(self._anchor_ids)
        if ids[:size] != self._anchor_ids:
            raise ValueError(
                f"tokenizer {self.name}: {text[:40]!r} is encoded together with {self._anchor!r} before it"
            )
        return ids[size:]

    def _find_anchor(self) -> tuple[str, TokenIds]:
        """What a text is encoded behind, and its tokens: nothing for most tokenizers.

        Those of the kind of Llama 2 put a space in front of a text, but not behind a control token or a line break.
        """
        problems = []
        for anchor in dict.fromkeys(("", self._tokenizer.eos_token or "", "\n")):
            self._anchor, self._anchor_ids = anchor, self._encode(anchor)
            try:
                self._check_survival()
                return anchor, self._anchor_ids
            except ValueError as error:
                problems.append(error)
        raise problems[0]

    def _check_survival(self) -> None:
        before = self._encode("a")
        for probe in (PROBE, " x", "\n", *sorted(self._control)[:8]):
            found = self.decode(before + self.plain_tokens(probe))
            if found != f"a{probe}":
                raise ValueError(
                    f"tokenizer {self.name}: expected that a text survives encoding and decoding, {probe!r} behind 'a' "
                    f"became {found!r}"
                )


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    """Tokens of a text that never become added tokens, special or not, and decode to the same text."""
    return _text_tokenizer(tokenizer, len(tokenizer)).plain_tokens(text)


@functools.lru_cache(maxsize=4)
def _text_tokenizer(tokenizer: PreTrainedTokenizerBase, size: int) -> TextTokenizer:
    """size: of the vocabulary, so that tokens which are added later count too."""
    return TextTokenizer(tokenizer)


def sound(text: str) -> str:
    """Without lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def content_text(message: Message) -> str:
    """The content of a message, where it is in parts those put together."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(map(_part_text, content))


def _with_texts(message: Message, change: Callable[[str], str]) -> Message:
    content = message.get("content")
    if content is None:
        return message
    if isinstance(content, str):
        return {**message, "content": change(content)}
    return {**message, "content": [{"type": "text", "text": change(_part_text(part))} for part in content]}


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"a message's content: expected a text or parts of type text, got {part!r:.80}")
