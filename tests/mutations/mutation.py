"""One deliberate mistake in the source, and the tests that must see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """`old`, which is in `file` exactly once, becomes `new`; then at least one of `tests` fails.

    file: a path from the root of the repository. tests: files, file::function or
    file::function[case], as pytest takes them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def mutated(self, root: Path = ROOT) -> str:
        """The text of the file with the mistake in it. ValueError: the source has changed, and the row with it."""
        source = (root / self.file).read_text(encoding="utf-8")
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: expected its old text exactly once in {self.file}, found it {count} times")
        return source.replace(self.old, self.new)
