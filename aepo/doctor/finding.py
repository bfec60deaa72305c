"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    topic: str
    name: str
    state: Literal["ok", "info", "missing", "broken"]  # only "broken" makes the exit code 1
    detail: str
    remedy: str = ""  # the command that installs what is missing


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
