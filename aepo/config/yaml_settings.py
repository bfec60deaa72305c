"""YAML as settings are written in: every scalar is read by the type that its setting has, not by how it looks.

`dir: 2026_11_26` is a text, because run.dir is one; `learning_rate: 1e-5` is a number, though YAML 1.1 says text. Where
a setting takes any type, plain scalars are null, true, false, numbers or texts as in YAML 1.1, but 1e5 is a number, and
012, 12:30 and dates are texts. Quoted scalars are texts everywhere.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

import yaml

from aepo.config.setting_types import NOT_INTERPOLATED, alternatives

_TEXT, _LIST, _MAPPING = (yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG,
                          yaml.resolver.BaseResolver.DEFAULT_SEQUENCE_TAG,
                          yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG)  # fmt: skip
_PLAIN = "plain"  # the tag that we give to scalars without quotes and tags
_NULL = ("", "~", "null", "Null", "NULL")
_BOOLS = {
    form: value
    for word, value in {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.items()
    for form in (word, word.capitalize(), word.upper())
}
_INFINITE = re.compile(r"([-+]?)\.?(inf|nan|(?<!\.)infinity)", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """Nodes alone: tags say what was quoted. In Python, not libyaml, so that messages are the same everywhere."""

    yaml_implicit_resolvers: typing.ClassVar = {None: [(_PLAIN, re.compile(""))]}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and isinstance(self.anchors.get(event.anchor), yaml.CollectionNode):
            # They may hold themselves, or grow without bound.
            problem = f"*{event.anchor} stands for a list or for keys, expected them to be written out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        # JSON, which is YAML, writes letters beyond U+FFFF as two escapes.
        pair = r"[\ud800-\udbff][\udc00-\udfff]"
        node.value = re.sub(pair, lambda two: two[0].encode("utf-16", "surrogatepass").decode("utf-16"), node.value)
        return node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    looks_otherwise = not isinstance(_any(text), str) or _INFINITE.fullmatch(text)
    has_lines = text.splitlines() not in ([], [text])  # U+0085 would be read as a space without escapes
    return dumper.represent_scalar(_TEXT, text, style='"' if has_lines else "'" if looks_otherwise else None)


_Dumper.add_representer(str, _represent_text)


def dump(value: Mapping[str, Any]) -> str:
    """As YAML that both `read` and readers of YAML 1.1 take as it is. Its lines are not folded."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=float("inf"), allow_unicode=True)


def compose(text: str, place: str, lines: bool = True) -> yaml.Node | None:
    """The nodes of one document; None: there is nothing in it. ValueError, in one line that begins with `place`."""
    try:
        node = _Loader(text).get_single_node()
        if node is not None:
            _check(node, place, lines)
        return node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        number = mark.line + 1 if mark else text[: getattr(error, "position", 0)].count("\n") + 1
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    except RecursionError:
        number, problem = 1, "it is nested too deeply"
    where = f"{place}, line {number}" if lines else place
    hint = f"; {NOT_INTERPOLATED}" if "${" in "".join(text.split("\n")[number - 1 : number]) else ""
    raise ValueError(f"{where}: cannot be read as YAML: {problem}{hint}") from None


def _check(node: yaml.Node, place: str, lines: bool) -> None:
    """ValueError: a tag that means a type of its own, or a key that was given before."""
    where = f"{place}, line {line_of(node)}" if lines else place
    if node.tag not in (_TEXT, _LIST, _MAPPING, _PLAIN):
        raise ValueError(f"{where}: expected no tag {node.tag.replace('tag:yaml.org,2002:', '!!')}")
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _check(part, place, lines)
    elif isinstance(node, yaml.MappingNode):
        before: dict[str | int, yaml.Node] = {}
        for name, part in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ValueError(f"{where}: expected a name as a key, got a list or keys")
            _check(name, place, lines)
            first = before.get(name.value) or before.get(_name(name))
            before |= {name.value: name, _name(name): name}
            if first is not None:
                there = f"{place}, line {line_of(name)}" if lines else place
                line = f", first in line {line_of(first)}" if lines else ""
                raise ValueError(f"{there}: key {name.value!r} is given twice{line}")
            _check(part, place, lines)


def line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def read(node: yaml.Node, hint: Any) -> Any:
    """The value that a setting of that type has. What is of another type is returned as it looks.

    ValueError: `runs/exp #2`, of which YAML would leave the end out. `runs/exp  # mine` is what a comment looks like.
    """
    kinds = alternatives(hint)
    if isinstance(node, yaml.ScalarNode):
        behind = re.match(r"[ \t]+(#[^\s#].*)", node.end_mark.buffer[node.end_mark.pointer :])
        if behind and node.tag == _PLAIN and node.value and _holds_text(hint):
            raise ValueError(
                f"{behind[1]!r} behind {node.value!r} is a comment in YAML: expected quotes around the whole text, or "
                "a space after the #"
            )
        if node.tag == _PLAIN:
            return read_plain(node.value, hint)
        return [node.value] if _list_of_any_length(hint) and not takes_text(hint) else node.value
    if isinstance(node, yaml.SequenceNode):
        elements = next((elements_of(kind) for kind in kinds if elements_of(kind) is not None), Any)
        return [read(part, elements) for part in node.value]
    values = next((typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict), None)
    if values is None:
        return {_name(name): read(part, Any) for name, part in node.value}
    return {name.value: read(part, values) for name, part in node.value}


def read_plain(text: str, hint: Any) -> Any:
    """A scalar without quotes. One of a list may be written without brackets."""
    kinds = alternatives(hint)
    texts = takes_text(hint)
    if text in _NULL and (type(None) in kinds or not texts):
        return None
    if (float in kinds or int in kinds) and (number := _number(text, words=float in kinds)) is not None:
        return number if float in kinds or _exact(number, text) else text
    if texts:
        return text
    if _list_of_any_length(hint):
        return [read_plain(text, elements_of(hint))]
    return _any(text)


def _name(node: yaml.ScalarNode) -> str | int:
    """A key of a mapping of any type: a text, or an integer."""
    value = _any(node.value) if node.tag == _PLAIN else node.value
    return value if type(value) is int else node.value


def takes_text(hint: Any) -> bool:
    return any(kind is str or typing.get_origin(kind) is Literal for kind in alternatives(hint))


def _holds_text(hint: Any) -> bool:
    """Whether a scalar may be any text there, also as the one element of a list that is written without brackets."""
    kinds = [elements_of(kind) or kind for kind in alternatives(hint)]
    return str in kinds or Any in kinds


def _list_of_any_length(hint: Any) -> bool:
    return ... in typing.get_args(hint)


def elements_of(hint: Any) -> Any:
    """The type of a list's elements; None: it is no list."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) in (tuple, list) else None


def _any(text: str) -> Any:
    if text in _NULL:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    number = _number(text, words=False)
    return text if number is None else number


def _exact(number: float, text: str) -> bool:
    """Not 0.99999999999999999999, which would be an integer once it is rounded."""
    return isinstance(number, int) or not number.is_integer() or number == 0 or Decimal(text) == number


def _number(text: str, words: bool) -> float | None:
    """As Python writes numbers, so that 012 is none; YAML's .inf and .nan, and with `words` inf and nan."""
    if not text.isascii() or text != text.strip():
        return None
    if (match := _INFINITE.fullmatch(text)) and (words or "." in text):
        return float(match[1] + match[2])
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        number = float(text) if re.search(r"[.eE]", text) else None
    except ValueError:
        return None
    underflows = number == 0 and re.search("[1-9]", re.split("[eE]", text)[0])
    return None if number in (float("inf"), float("-inf")) or underflows else number  # 1e999, 1e-999
