"""When two answers are the same text: the usual normalisation of question answering, without what changes a number."""

from __future__ import annotations

import functools
import re
import unicodedata

MAX_CHARS = 10_000  # of an answer; a longer one matches nothing

DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"), "-")
_CURRENCIES = "$\u00a3\u00a5\u20ac"
_THOUSANDS = re.compile(r"(?<![\w.,])([1-9]\d{0,2})((?:,\d{3})+)(?![\w,])")
_SPACED_SIGN = re.compile(rf"(?<![\w)\]}}])([-+])\s+(?=[{_CURRENCIES}]?\.?\d)")
_DASH = re.compile(r"(?<=[^\W\d])-(?=\w)|(?<=\w)-(?=[^\W\d])")  # between words
# Marks that change nothing, unless they stand between two digits, before one as its sign or point, join a word to
# another (x_1), or are the minus behind a word (O-) or the factorial behind a digit.
_MARK = re.compile(
    r"""(?!(?<=\d)[^\w\s]\d)(?!(?<=[^\W_])(?:_[^\W_]|-(?![-\w])))(?!(?<!\w)\.\d)(?!(?<!\w)-[^\s-])(?!(?<=\d)!)[-.,;:!?'"`\u00b4\u2018\u2019\u201c\u201d\u2026()\[\]{}_*]"""
)
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_ZEROS = re.compile(r"(?<![\w.])(\d+)(?:\.0+|(\.\d*[1-9])0+)(?![\w.])")
_PLUS = re.compile(r"^\+(?=\d)")
_ARTICLE = re.compile(r"^(?:an?\s+(?=\w\w)|the\s+(?=\S))|(?<=\s)the\s+(?=\S)")


@functools.lru_cache(maxsize=1024)  # the right answer, and what many paths of a question give
def normalized(text: str) -> str:
    """For comparing answers: composed Unicode, small letters, single spaces, no articles, no harmless punctuation.

    What makes another number stays: signs, decimal points and commas, and every mark between two digits. "1,234" is
    1234, but "3,5" is not 35. An article is one only where a word follows: "A" and "vitamin A" keep theirs.
    """
    text = unicodedata.normalize("NFC", text[: MAX_CHARS + 1]).casefold().translate(DASHES)
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # what has no width
    text = _SPACED_SIGN.sub(r"\1", text)
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = " ".join(_MARK.sub("", _DASH.sub(" ", text)).split())
    text = _ZEROS.sub(r"\1\2", _BARE_POINT.sub("0.", _PLUS.sub("", text)))
    return _ARTICLE.sub("", text)


def same_text(given: str, answer: str) -> bool:
    """Nothing is the same as nothing."""
    if max(len(given), len(answer)) > MAX_CHARS:
        return False
    return normalized(given) == normalized(answer) != ""
