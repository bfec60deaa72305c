"""What a tool is, to the rollout."""

from __future__ import annotations

from typing import Protocol


class ToolError(Exception):
    """A call that failed by the model's own fault, for example code that raised: the model reads the message."""


class Tool(Protocol):
    """Called with the text between `<name>` and `</name>`; returns the text that the model reads next.

    A call may block, raise, or return nothing: the `ToolBox` runs calls concurrently in threads, gives up waiting
    after `timeout` and turns every failure into a short error text. A tool that holds processes or connections has
    a method `close()`, which the `ToolBox` calls when it is closed itself.
    """

    name: str
    timeout: float  # seconds

    def __call__(self, argument: str) -> str: ...
