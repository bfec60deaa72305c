"""Two processes over gloo: tests/titan/titan_cases.py. `make test-titan`."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = [str(TESTS / "titan"), str(TESTS / "kernels"), str(TESTS), str(TESTS.parent)]
sys.path.append(str(TESTS / "kernels"))

from ranks import cases, run_in_processes  # noqa: E402


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(FOLDERS))
        return run_in_processes(["titan_cases"], 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", cases(["titan_cases"]))
def test_two_ranks_give_what_one_gives(case, failed):
    assert case not in failed, failed[case]
