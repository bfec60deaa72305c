"""Mathematical text as tokens: LaTeX, what people type, and Unicode signs, brought to one form."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from aepo.agents.rewards.text import DASHES

FUNCTIONS = ("sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "ln", "log", "exp", "abs")
CONSTANTS = ("pi", "infty", "e", "i")
_GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"),
    *("mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega"),
)
NAMES = (*FUNCTIONS, *CONSTANTS, *_GREEK)
SHORT_UNITS = (
    *("mm", "cm", "dm", "km", "mi", "ft", "yd", "in", "mg", "kg", "lb", "lbs", "oz", "ml", "cl", "dl"),
    *("ms", "sec", "min", "hr", "hrs", "mph", "usd", "eur", "cup", "day", "yr", "yrs", "gal"),
    *("rad", "ton", "ohm", "yen", "sq", "per"),
)

_SIGNS = {
    **dict.fromkeys("\u00d7\u00b7\u22c5\u2217", "*"),
    **dict.fromkeys("\u00f7\u2215\u2044", "/"),
    "\u221a": "\\sqrt ",
    "\u03c0": "\\pi ",
    "\u03b8": "\\theta ",
    "\u221e": "\\infty ",
    "\u2264": "\\le ",
    "\u2265": "\\ge ",
    "\u2260": "\\ne ",
    "\u2205": "\\emptyset ",
    "\u222a": "\\cup ",
    "\u2208": "\\in ",
    "\u00b1": "\\pm ",
    "\u00b0": "^\\circ ",
}
_RAISED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")
_LOWERED = re.compile("[\u2080-\u208e]+")
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_COMMANDS = {  # what says the same in other words
    **dict.fromkeys(("cdot", "times", "ast"), "*"),
    **dict.fromkeys(("div",), "/"),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("le", "leq", "leqslant"), "<="),
    **dict.fromkeys(("ge", "geq", "geqslant"), ">="),
    **dict.fromkeys(("ne", "neq"), "!="),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("lbrace", "{"), "\\{"),
    **dict.fromkeys(("rbrace", "}"), "\\}"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **{"%": "%", "$": "$", "degree": "circ", "infinity": "infty", "cup": "cup", "lbrack": "[", "rbrack": "]"},
    "colon": ":",
}
_DROPPED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|quad|qquad|!|,|;|:|\(|\)|\[|\])(?![a-zA-Z])"
    r"|\\(?:boxed|fbox|ensuremath)(?![a-zA-Z])|\\ |(?<=\S)~|(?<!\\)\$"  # "~5" is about 5
)
_LEAD = re.compile(r"(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*:)\s*:?", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox|ensuremath)\s*\{")
_BRACKET = re.compile(r"(?P<group>(?<=[a-zA-Z0-9}\]^])\{)|(?P<parts>\\?\{|[(\[])|[)\]}]")
_TEXT_WITH_NUMBER = re.compile(r"\\(?:text(?:bf|rm|it|sf|normal)?|math(?:rm|bf|sf)|mbox)\s*\{([^{}]*\d[^{}]*)\}")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_INDEX = re.compile(r"_\s*\{(\w)\}(?![\w.])")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,|\{,\}|,\\!|\\,|[\u00a0\u2009\u202f])\d{3})+(?!\d|,\d|\{,\})")
_MATRIX = re.compile(
    r"\\begin\{[pbB]?matrix\}(.*?)\\end\{[pbB]?matrix\}"
    r"|\\left\s*[(\[]\s*\\begin\{array\}\{[lcr]+\}(.*?)\\end\{array\}\s*\\right\s*[)\]]",
    re.DOTALL,
)
_DOLLARS = re.compile(r"(?<!\\)\$(?=\s*[\d.])")  # which are no sign around a formula, where there is one only
_EMPTY = re.compile(r"\\(?:emptyset|varnothing)(?![a-zA-Z])")
_REALS = re.compile(r"\\mathbb\s*(?:\{\s*R\s*\}|R(?![a-zA-Z]))")
_VECTOR = re.compile(r"\\(?:vec|overrightarrow|hat|nabla|bm|boldsymbol)(?![a-zA-Z])|\\mathbf\s*\{?\s*[a-zA-Z]|\u2207")
_CROSS = re.compile(r"(?:\\times(?![a-zA-Z])|\u00d7)(?!\s*\d)")
_CHOOSE = re.compile(r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\(?:overline|bar)\s*(?:\{(\d{1,20})\}|(\d))(?![\d.])")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_TOKEN = re.compile(
    r"(?P<text>\\(?:text(?:bf|rm|it|sf|normal)?|mathrm|mathbf|mathsf|mbox|operatorname)\s*\{(?P<inner>[^{}]*)\})"
    r"|(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?)"
    r"|\\(?P<command>[a-zA-Z]+|[{}%$|])"
    r"|(?P<name>[^\W\d_]+)"
    r"|(?P<sign><=|>=|!=|\*\*|\S)"
)


@dataclass(frozen=True, slots=True)
class Token:
    kind: Literal["number", "name", "sign", "text"]
    text: str
    spaced: bool = False  # after a space; two tokens that differ in this only are not told apart

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and (self.kind, self.text) == (other.kind, other.text)

    def __hash__(self) -> int:
        return hash((self.kind, self.text))


@functools.lru_cache(maxsize=1024)
def tokens_of(text: str) -> tuple[Token, ...]:
    """Spaces, sizes of brackets, dollar signs around formulas and thousands separators are gone."""
    if _VECTOR.search(text):
        text = _CROSS.sub(r" \\cross ", text)  # but 3\times10^4 is a product
    if not text.isascii():
        text = _ascii(text)
    text = _without_stop(text)
    if lead := _LEAD.match(text):
        text = text[lead.end() :].strip()
    if formula := _FORMULA.fullmatch(text):
        text = _without_stop(formula[formula.lastindex or 0])
    text = _TEXT_WITH_NUMBER.sub(r" \1 ", _without_box(text))
    text = _THOUSANDS.sub(lambda match: _joined(match, text), text)
    if text.count("$") == 1:
        text = _DOLLARS.sub(r"\\$", text)
    if bold := _BOLD.fullmatch(text):
        text = _without_stop(bold[1])
    text = _INDEX.sub(r"_\1", _TIMES_TEN.sub("*", text))
    text = _REPEATING.sub(_as_fraction, text)
    text = _REALS.sub(r"(-\\infty,\\infty)", text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", _EMPTY.sub(r"\\{\\}", text))
    text = _MATRIX.sub(lambda match: _as_tuples(match[1] or match[2] or ""), text)
    text = _DROPPED.sub(" ", text)
    return tuple(token for match in _TOKEN.finditer(text) for token in _read(match, text))


def _ascii(text: str) -> str:
    """Signs, raised and lowered digits and fractions as LaTeX; x\u00b2\u00b3 is x^{23}."""
    text = unicodedata.normalize("NFC", text)
    text = _RAISED.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", text)
    text = _FRACTION.sub(
        lambda match: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", match[0]).split("\u2044")), text
    )
    return "".join(_SIGNS.get(c, c) for c in text.translate(DASHES))


def _without_stop(text: str) -> str:
    """One full stop at the end only: 0.333... goes on."""
    return text.strip().removesuffix(".").strip()


def _without_box(text: str) -> str:
    """What is boxed, where this is all. A box of a part stays a group: two of them are no product."""
    while box := _BOX.match(text):
        depth = 1
        for end in range(box.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                break
        if depth or end < len(text) - 1:
            break
        text = _without_stop(text[box.end() : -1])
    return text


def _joined(match: re.Match[str], text: str) -> str:
    """The number without its separators; a comma divides in (1,234) and in {1,234}, not in \\sqrt{1,234}."""
    opened: list[bool] = []
    for bracket in _BRACKET.finditer(text, 0, match.start()):
        if bracket.lastgroup:
            opened.append(bracket.lastgroup == "parts")
        else:
            opened[-1:] = []
    inside = opened[-1:] == [True]
    if inside and "," in match[0].replace("{,}", "").replace(",\\!", ""):
        return match[0]
    return re.sub(r"\D", "", match[0])


def _as_fraction(match: re.Match[str]) -> str:
    """0.1\\overline{6} is 1/6."""
    whole, once, again = match[1], match[2], match[3] or match[4]
    top = int(whole + once + again) - int(whole + once or 0)
    return rf"(\frac{{{top}}}{{{'9' * len(again)}{'0' * len(once)}}})"


def _as_tuples(matrix: str) -> str:
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix) if row.strip()]
    return "((" + "),(".join(row.replace("&", ",") for row in rows) + "),)"


def _read(match: re.Match[str], text: str) -> list[Token]:
    spaced = match.start() > 0 and text[match.start() - 1].isspace()
    if match["text"] is not None:
        inner = match["inner"].strip()
        kind: Literal["name", "text"] = "name" if inner in NAMES else "text"
        return [Token(kind, inner, spaced or match["inner"][0].isspace())] if inner else []
    if match["number"] is not None:
        return [Token("number", match["number"], spaced)]
    if match["command"] is not None:
        command = match["command"]
        if command in NAMES or command in ("frac", "binom", "circ", "pm", "mp", "in", "to"):
            return [Token("name" if command in NAMES else "sign", command, spaced)]
        known = _COMMANDS.get(command)
        return [Token("name" if known == "infty" else "sign", known if known else f"\\{command}", spaced)]
    if match["name"] is not None:
        return _split_name(match["name"], spaced)
    return [Token("sign", "^" if match["sign"] == "**" else match["sign"], spaced)]


def _split_name(word: str, spaced: bool) -> list[Token]:
    """A known name, a word of four letters or more, or a product of variables."""
    lower = word.lower()
    if lower in ("inf", "infinity"):
        return [Token("name", "infty", spaced)]
    if word in NAMES or lower in ("or", "and") or len(word) == 1:
        return [Token("name" if word in NAMES or len(word) == 1 else "text", word, spaced)]
    if len(word) >= 4 or lower in SHORT_UNITS:
        return [Token("text", word, spaced)]
    return [Token("name", letter, spaced and index == 0) for index, letter in enumerate(word)]
