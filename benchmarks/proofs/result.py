"""What a proof hands back, as tables for the terminal, for Markdown and for JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table as RichTable

Progress = Callable[[str], None]
"""Hears what is being done."""
Cell = str | float | int | None
"""None: nothing to say."""


def silent(doing: str) -> None:
    """No progress."""


@dataclass(frozen=True)
class Table:
    """Numbers with the way to print them. `columns` maps names to format specifications, "" for text."""

    title: str
    columns: dict[str, str]
    rows: list[list[Cell]]
    note: str = ""

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for name, spec in self.columns.items():
            table.add_column(name, justify="right" if spec else "left", overflow="fold")
        for row in self.texts():
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [list(self.columns), ["---:" if spec else "---" for spec in self.columns.values()], *self.texts()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"**{self.title}**", table, self.note) if part)

    def texts(self) -> list[list[str]]:
        specs = self.columns.values()
        return [
            ["" if cell is None else format(cell, spec) for cell, spec in zip(row, specs, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Proof:
    """claim: what is to be shown. checked: what was found right before any time was taken, with the numbers."""

    claim: str
    checked: str
    tables: list[Table]

    def markdown(self) -> str:
        return "\n\n".join([self.claim, f"Checked: {self.checked}", *(table.markdown() for table in self.tables)])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Proof:
        return cls(data["claim"], data["checked"], [Table(**table) for table in data["tables"]])


class ProofError(AssertionError):
    """What was to be shown is not so."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ProofError(message)
