"""Paths as users give them, in settings and arguments."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(name: str, given: str | Path) -> Path:
    """`~` and `~user` are home directories; `./~` is a file of that name. ValueError, which begins with `name`: it is
    empty, has a NUL character, is not UTF-8, as all that is written about it, or there is no such user."""
    return Path(expanded(name, str(given)))


def expanded(name: str, given: str) -> str:
    """As `user_path`, as a text that means the same place when it is given again: `./~/x`, which is `~/x` to `Path`, is
    an absolute path; all else stays as it is written."""
    if not given or "\0" in given:
        raise ValueError(f"{name} = {given!r}: expected a path, got {'a NUL character in it' if given else 'none'}")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} = {given!r}: expected a path in UTF-8") from None
    path = os.path.expanduser(given)
    if path.startswith("~"):
        raise ValueError(f"{name} = {given!r}: expected ~ or ~user, whose home directory is known (./~ is a file)")
    return str(Path.cwd() / path) if str(Path(path)).startswith("~") else path
