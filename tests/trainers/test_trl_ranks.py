"""Claims about several processes (gloo, started by torchrun): two with 4 rows each are one with 8, in gradients,
weights and logged numbers; a rank without a token that counts neither hangs nor changes anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl_oracle import assert_gradients
from trl_ranks import CASES, run

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 240


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """([rank 0's, rank 1's], one process's): case -> what it saw. The two sides run at the same time."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    with (folder / "output").open("w") as output:
        ranks = subprocess.Popen(
            [*command, str(HERE / "trl_ranks.py"), str(folder)],
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        try:
            whole = {case: run(case, 8) for case in CASES}
            code = ranks.wait(timeout=TIMEOUT_SECONDS)
        finally:
            ranks.kill()
            ranks.wait()
    assert code == 0, (folder / "output").read_text()[-5000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], whole


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case, found):
    parts, whole = found
    for part in parts:
        for mine, one in zip(part[case]["gradients"], whole[case]["gradients"], strict=True):
            assert_gradients(mine, one, 2e-5)
        assert_gradients(part[case]["weights"], whole[case]["weights"], 1e-6)
    for mine, one in zip(parts[0][case]["log"], whole[case]["log"], strict=True):
        assert mine.keys() == one.keys()
        cut = "gradient_accumulation_steps" in CASES[case]  # TRL logs means of micro-batches' means
        for name in ["loss", "grad_norm"] if cut else one.keys() - {"step_time", "epoch"}:
            assert mine[name] == pytest.approx(one[name], rel=1e-4, abs=2e-6), name


def test_the_runs_are_no_trivial_ones(found):
    parts, whole = found
    for case in CASES:
        assert max(entry["policy/ratio_max"] for entry in whole[case]["log"]) > 1.01, case
    for case in ("an_empty_rank", "an_empty_rank_own_loss"):
        assert [part[case]["valid"][0] > 0 for part in parts] == [True, False]
    assert whole["aepo"]["log"][0]["policy/advantage_flips"] > 0


@pytest.mark.parametrize("case", ["aepo", "gigpo", "reinforce++"])
def test_every_rank_has_its_part_of_the_advantages(case, found):
    parts, whole = found
    width = [part[case]["mine"] for part in parts]
    for mine, one in zip(width, whole[case]["mine"].split(4), strict=True):
        common = mine if mine.dim() == 1 else mine[:, : one.shape[1]]
        torch.testing.assert_close(common, one if one.dim() == 1 else one[:, : common.shape[1]], rtol=1e-4, atol=1e-5)
    for part in parts:
        assert part[case]["advantages"] == pytest.approx(whole[case]["advantages"], rel=1e-5)
