"""The numbers of docs/memory.md are those of the code."""

from pathlib import Path

import pytest

from benchmarks import model_sizes

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_page_says_what_a_dtype_costs():
    assert model_sizes.dtype_table() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if index else ()) for index, name in enumerate(model_sizes.SIZES)],
)
def test_the_page_has_the_numbers_of_the_code(name):
    rows = [f"| {' | '.join(row)} |" for row in model_sizes.size_rows(name)]
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8")
