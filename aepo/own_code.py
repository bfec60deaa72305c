"""The user's own code behind a run: which files, and whether they are still as they were.

Of a function, class or object these are the files of the modules that it and its base classes are defined in, and what
these import of the user's own. People fix comments, so a change is said and no error. This module imports no torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from aepo.registry import INSTALLED, attribute_of, plain, resolve

Code = Mapping[str, Mapping[str, "str | None"]]
"""By part of the agent ("reward my_rewards:score") its files ("my_rewards.py") with their SHA-256; of an installed
package its name with its version; None: there is no file, as in a notebook."""
NOBODYS = {"aepo", "aepo_kernels", "builtins", *sys.stdlib_module_names}


def named_part(setting: str, name: str | None) -> dict[str, list[Any]]:
    """The part that a setting names, for `code_of`; empty where that is nothing of the user's own."""
    return {f"{setting} {name}": [resolve(name, setting)]} if name is not None and ":" in name else {}


def code_of(parts: Mapping[str, Iterable[Any]]) -> Code:
    """parts: the things (functions, classes, objects, paths of scripts) that each part of the agent is made of."""
    read = functools.cache(_read)  # every file once: all parts see the same
    return {part: dict(_files(things, read)) for part, things in parts.items()}


def code_facts(code: Code) -> dict[str, str | None]:
    """As run.json has them: by file alone."""
    return {file: digest for files in code.values() for file, digest in files.items()}


def code_changes(recorded: Mapping[str, str | None] | None, code: Code) -> list[str]:
    """A line for every file that is not as it was recorded (`code_facts`; None: by an older version, which did not)."""
    if recorded is None:
        return []
    users: dict[str, list[str]] = {}
    for part, files in code.items():
        for file, digest in files.items():
            if file not in recorded or recorded[file] != digest:
                users.setdefault(file, []).append(part)
    return [
        f"{', '.join(parts)}: {file} {'is not as it was' if file in recorded else 'was not'} in the run"
        for file, parts in users.items()
    ]


def _files(things: Iterable[Any], read: Callable[[Path], bytes | None]) -> Iterator[tuple[str, str | None]]:
    """Files and installed packages behind the things: the name with the hash, or the version."""
    modules: list[str] = []
    for thing in things:
        if isinstance(thing, Path):
            yield str(thing), _digest(read(thing))
        else:
            modules += _homes(thing)
    homes, seen = set(modules), set()
    for name in modules:  # which grows
        if name in seen or name.partition(".")[0] in NOBODYS:
            continue
        seen.add(name)
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is not None and file is not None and not file.startswith(INSTALLED):
            content = read(Path(file))
            yield _name(module, Path(file)), _digest(content)
            modules += _imports(module, content or b"")
        elif name in homes:
            yield _version(name)


def _homes(thing: Any, depth: int = 0) -> Iterator[str]:
    """The modules where it is defined; of a class or an object those of its base classes, too, and of a function or a
    partial those of the functions and objects that it holds: a decorator's wrapper calls what was decorated."""
    held: list[Any] = []
    if isinstance(thing, functools.partial):
        held = [thing.func, *thing.args, *thing.keywords.values()]
    closure = attribute_of(thing, "__closure__")  # an object may make up any attribute
    for cell in closure if isinstance(closure, tuple) else ():
        with contextlib.suppress(ValueError):  # not yet filled
            held.append(cell.cell_contents)
    found = plain(thing) if callable(thing) else thing
    owner = attribute_of(thing, "__self__")
    kind = thing if isinstance(thing, type) else type(thing if owner is None else owner)
    for home in (thing, found, *kind.__mro__):
        if isinstance(name := attribute_of(home, "__module__"), str):
            yield name
    for one in held:
        if callable(one) and depth < 8:  # a function may hold itself
            yield from _homes(one, depth + 1)


def _imports(module: ModuleType, source: bytes) -> list[str]:
    """Names that may be modules. From the source: an imported number does not say where it comes from."""
    found: list[str] = []
    try:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    base = importlib.util.resolve_name("." * node.level + base, module.__package__)
                found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    except (SyntaxError, ValueError, ImportError):  # no Python, or edited since it was imported
        return []
    return found


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _name(module: ModuleType, file: Path) -> str:
    """The file as its module is called: the same from every directory, "my_package/rewards.py"."""
    parts = module.__name__.split(".")
    return "/".join([*(parts if file.name == "__init__.py" else parts[:-1]), file.name])


def _version(module: str) -> tuple[str, str | None]:
    """The installed package that a module belongs to; None: to none, as what a notebook defines."""
    top = module.partition(".")[0]
    for distribution in importlib.metadata.packages_distributions().get(top, ()):
        return distribution, importlib.metadata.version(distribution)
    return top, None
