"""Settings from a YAML file and from `section.key=value`, for any dataclass of sections."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from aepo.config.setting_types import alternatives, keys_of, shown, suggestion
from aepo.config.yaml_settings import compose, elements_of, line_of, read, read_plain, takes_text

C = TypeVar("C")


def read_settings(config: type[C], path: str | Path | None, overrides: Sequence[str]) -> C:
    """See `aepo.config.load_config`."""
    values: dict[str, Any] = {}  # dotted name -> value; the last one counts
    places: dict[str, str] = {}
    types = {entry.name: entry.type for entry in keys_of(config)}
    if path is not None:
        for name, node in _nodes(config, _text_of(path), str(path)):
            places[name] = f" (in {path}, line {line_of(node)})"
            if name not in types:
                _unknown(config, name, places[name])
            try:
                values[name] = read(node, types[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}{places[name]}") from None
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: expected section.key=value, for example train.steps=20")
        setting = ".".join(name.split(".")[:2])
        is_keyed = any(typing.get_origin(kind) is dict for kind in alternatives(types.get(setting, Any)))
        if is_keyed and not _KEYS.fullmatch(name.removeprefix(setting)):
            raise ValueError(
                f"override {override!r}: expected names between dots behind {setting}, without brackets and quotes; "
                f"other keys are written {setting}='{{key: value}}'"
            )
        if setting not in types or (setting != name and not is_keyed):
            _unknown(config, name, "")
        if setting == name:
            values[name] = _value(text, types[name], override)
            places.pop(name, None)
        else:
            keys = [part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", name)[2:]]
            kind = typing.get_args(types[setting])[1] if len(keys) == 1 else Any
            values[setting] = _with_key(values.get(setting, {}), keys, _value(text, kind, override))
    sections = {}
    for section, kind in typing.get_type_hints(config).items():
        given = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}
        sections[section] = _placed(lambda: kind(**given), places)  # noqa: B023, called here
    return _placed(lambda: config(**sections), places)


_KEYS = re.compile(r"(\.(?! )([^.\[\]\"'\\]|\\\.)+(?<! ))*")
"""Behind a setting that has keys: .key.key; a dot of a key's own is written \\."""


def _placed(make: Any, places: dict[str, str]) -> Any:
    """An error that begins with the name of a setting also says where in a file that was given."""
    try:
        return make()
    except ValueError as error:
        name = re.match(r"\w+\.\w+", str(error))
        raise ValueError(f"{error}{places.get(name[0], '') if name else ''}") from None


def _text_of(path: str | Path) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; expected a YAML file with settings") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: cannot be read as YAML: {error}") from None


def _nodes(config: type, text: str, path: str) -> Iterator[tuple[str, yaml.Node]]:
    """Dotted names with what is given below them."""
    node = compose(text, path)
    if not isinstance(node, yaml.MappingNode):
        got = "nothing" if node is None else shown(read(node, Any))
        raise ValueError(f"{path}: expected sections with keys, got {got}")
    sections = list(typing.get_type_hints(config))
    for name, settings in node.value:
        section, where = name.value, f" (in {path}, line {line_of(name)})"
        if section not in sections:
            above, _, below = section.partition(".")
            known = _names(config)
            hint = (
                f": expected {below!r} below {above!r}"
                if section in known
                else suggestion(section, [*sections, *known])
            )
            raise ValueError(f"unknown section {section!r}{where}{hint}")
        if not isinstance(settings, yaml.MappingNode):
            raise ValueError(f"section {section!r}{where}: expected keys below it, got {shown(read(settings, Any))}")
        yield from ((f"{section}.{name.value}", value) for name, value in settings.value)


def _value(text: str, hint: Any, override: str) -> Any:
    """A text is taken as it is, but for quotes around the whole of it; all else is YAML."""
    of_lists = [kind for kind in alternatives(hint) if elements_of(kind) is not None]
    verbatim = takes_text(hint) or any(takes_text(elements_of(kind)) for kind in of_lists)
    if verbatim and not (of_lists and text.startswith("[")) and not _is_quoted(text):
        return read_plain(text, hint)
    node = compose(text, f"override {override!r}", lines=False)
    if node is None:
        return read_plain("", hint)
    if text[node.end_mark.index :].strip():
        raise ValueError(f"override {override!r}: {text[node.end_mark.index :].strip()!r} is a comment in YAML, "
                         "expected quotes around a text with ' #'")  # fmt: skip
    return read(node, hint)


def _is_quoted(text: str) -> bool:
    """One text in quotes, and nothing else."""
    try:
        node = compose(text, "", lines=False) if text[:1] in ("'", '"') else None
    except ValueError:
        return False
    return isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text)


def _with_key(before: Any, keys: Sequence[str], value: Any) -> Any:
    """A copy in which one key, between which others may stand, has that value."""
    if not keys:
        return value
    if not isinstance(before, dict):  # of a wrong type in the file: that is said
        return before
    name = next((known for known in before if str(known) == keys[0]), keys[0])
    below = before.get(name)
    return {**before, name: _with_key(below if isinstance(below, dict) else {}, keys[1:], value)}


def _unknown(config: type, name: str, where: str) -> typing.NoReturn:
    raise ValueError(f"unknown key {name!r}{where}{suggestion(name, _names(config))}; `aepo keys` lists all keys")


def _names(config: type) -> list[str]:
    """Every dotted key, and the keys of a setting that its help gives as an example: {enable_thinking: false}."""
    entries = keys_of(config)
    examples = [f"{entry.name}.{name}" for entry in entries for name in re.findall(r"\{(\w+):", entry.help)]
    return [*(entry.name for entry in entries), *examples]
