"""What a setting names in the user's own code: "package.module:Name" becomes the object.

The current directory can be imported from, as with `python -m`. This module imports no torch.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

SHOWN = 8  # names in an error
INSTALLED = ("<frozen", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
"""How the names of files begin that are nobody's own."""


def resolve(name: str, setting: str) -> Any:
    """The object called `name`, "package.module:Name" or "package.module:Class.attribute".

    `setting` says who asks, for the errors. ValueError in one line, with what was looked for and what is there: the
    form is another one, there is no such module or no such name in it, importing the module fails, or another module
    hides the one in the current directory.
    """
    module_name, colon, path = name.partition(":")
    a_file = "/" in module_name or module_name.endswith(".py")
    hint = "; a module is written with dots and without .py" if a_file else ""
    if "-" in module_name:
        hint += "; a module's name has no dash, the file needs another name"
    if not colon or a_file or not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise ValueError(f"{setting} = {name!r}: expected package.module:name, as in my_losses:clipped{hint}")
    found: Any = _import(module_name, f"{setting} = {name!r}")
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            there = _names(attribute, _own_names(found))
            raise ValueError(f"{setting} = {name!r}: {_name(found)} has no {attribute!r}; {there}") from None
        except (Exception, SystemExit) as error:  # of a __getattr__ or a property of the user's
            problem = f"{error_text(error)}{_place(error)}"
            raise ValueError(f"{setting} = {name!r}: {attribute!r} of {_name(found)} failed: {problem}") from error
    return found


def resolve_function(name: str, setting: str, arguments: str) -> Any:
    """The same, where it must be callable with positional arguments, say "logprobs, entropy, batch"."""
    found = resolve(name, setting)
    check_function(found, f"{setting} = {name!r}", arguments)
    return found


def check_function(found: Any, what: str, arguments: str) -> None:
    """ValueError in one line, beginning with `what`, where it cannot be called with such positional arguments."""
    if not callable(found):
        raise ValueError(f"{what}: expected a function ({arguments}); it is of type {type(found).__name__}")
    try:
        signature = inspect.signature(found)
    except Exception:  # some built-in ones have none, and a __getattr__ of the user's may raise anything
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        given = f"{plain(found).__qualname__}{signature}"
        raise ValueError(f"{what}: expected a function ({arguments}); it is {given}: {error}") from None


def plain(function: Any) -> Any:
    """The function behind partial(), decorators and objects that can be called: what messages name."""
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(attribute_of(function, "__qualname__"), str):
        function = type(function).__call__
    try:
        found = inspect.unwrap(function)
    except Exception:  # a __getattr__ that raises, or that makes up a __wrapped__ without end
        return function
    return found if callable(found) else function


def error_text(error: BaseException) -> str:
    """Its kind and what it says, in one line; also where its text cannot be made."""
    try:
        says = " ".join(str(error).split())
    except Exception as failure:
        says = f"its message cannot be shown ({type(failure).__name__})"
    return f"{type(error).__name__}{f': {says}' if says else ''}"


def place_of(error: BaseException, function: Any) -> str:
    """The line of the function's file where the error came from, in words; "" where it has none."""
    found = plain(function)
    code = attribute_of(found.__init__ if isinstance(found, type) else found, "__code__")  # type: ignore[misc]
    file = code.co_filename if isinstance(code, CodeType) else None
    lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""


def _import(module: str, asked: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # it stays: the module may import its neighbours later
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # something that the module imports
            raise ValueError(f"{asked}: importing {module} failed: {error}{_place(error)}") from error
        _refuse_hidden(module, asked)
        parent, _, missing = error.name.rpartition(".")
        where = getattr(sys.modules.get(parent), "__path__", None) if parent else [here]
        there = _names(missing, (found.name for found in pkgutil.iter_modules(where or [])))
        place = f"package {parent}" if parent else f"{here} and the installed packages"
        raise ValueError(f"{asked}: no module {error.name!r} in {place}; {'it' if parent else here} {there}") from None
    except (Exception, SystemExit) as error:  # whatever the user's file does, exit() too
        place = "" if isinstance(error, SyntaxError) else _place(error)  # whose text names it
        raise ValueError(f"{asked}: importing {module} failed: {error_text(error)}{place}") from error
    _refuse_hidden(module, asked)
    return found


def _refuse_hidden(module: str, asked: str) -> None:
    """ValueError where a file of the current directory has the name, and another one was imported: json.py, say."""
    top, here = module.partition(".")[0], Path.cwd()
    file = next((path for path in (here / top / "__init__.py", here / f"{top}.py") if path.is_file()), None)
    found = sys.modules.get(top)
    if file is None or found is None:
        return
    where = attribute_of(found, "__file__")
    if where is not None:
        home = Path(where).parent
        if (home.parent if attribute_of(found, "__path__") else home).resolve() == here.resolve():
            return
    raise ValueError(
        f"{asked}: {top} of {where or 'Python itself'} is found first, and {file} is not used: it needs another name"
    ) from None


def _place(error: BaseException) -> str:
    """The last line of the user's own files; that of an installed one where only such ones ran. A fault that json or
    a hook of sys.exit() raises is mended where they were called."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    own = [f for f in frames if not f.filename.startswith(INSTALLED)] or frames
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _own_names(owner: Any) -> Iterator[str]:
    """Public names that were defined there; what a module imported is not among them."""
    home = attribute_of(owner, "__name__")
    for name, value in (attribute_of(owner, "__dict__") or {}).items():
        imported = isinstance(owner, ModuleType) and (
            isinstance(value, ModuleType) or (attribute_of(value, "__module__") or home) != home
        )
        if not name.startswith("_") and not imported:
            yield name


def attribute_of(owner: Any, name: str) -> Any:
    """None where there is none, whatever a __getattr__ of the user's does: `getattr` lets all but AttributeError by."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def _name(owner: Any) -> str:
    name = attribute_of(owner, "__name__")
    return name if isinstance(name, str) else type(owner).__name__


def _names(wanted: str, there: Iterable[str]) -> str:
    """What is there, the nearest names first."""
    shown = nearest_first(wanted, there)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"has {', '.join(shown[:SHOWN])}{more}" if shown else "has none"


def nearest_first(wanted: str, there: Iterable[str]) -> list[str]:
    """All names that are there: those like `wanted` first, the others in alphabetical order."""
    names = sorted(there)
    near = difflib.get_close_matches(wanted, names, SHOWN, 0.5)
    return [*near, *(name for name in names if name not in near)]
