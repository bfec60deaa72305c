"""The rows of the table fit the source as it is today. Whether tests kill them is for `make mutations` to say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations.mutation import ROOT, Mutation
from tests.mutations.table import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_row_applies_and_its_tests_exist(mutation: Mutation) -> None:
    assert mutation.mutated() != (ROOT / mutation.file).read_text(encoding="utf-8")
    if mutation.file.endswith(".py"):
        ast.parse(mutation.mutated())
    assert mutation.tests
    for test in mutation.tests:
        file, _, function = test.partition("[")[0].partition("::")
        assert (ROOT / file).is_file(), test
        if function:
            names = [n.name for n in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if hasattr(n, "name")]
            assert function in names, test


def test_names_tell_rows_apart() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    changes = [(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS]
    assert len(set(changes)) == len(changes)


def test_a_row_that_has_rotted_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\na = 1\n")
    for old, times in (("b", 0), ("a = 1", 2)):
        with pytest.raises(
            ValueError, match=f"rotten: expected its old text exactly once in code.py, found it {times}"
        ):
            Mutation("rotten", "code.py", old, "c", ()).mutated(tmp_path)
