"""Claims about the machine code of the CUDA C++ kernels in the built extension, for each GPU it was built for.

Nothing spills; the loop over the logits uses 128-bit loads only, four before it waits, has no barrier and no exchange
between lanes, keeps a NaN and stays inside its budget of instructions; registers allow the planned occupancy.
"""

import shutil
import subprocess

import pytest
import torch

pytest.importorskip("triton")  # brings the disassembler

from aepo_kernels import backend as backends
from benchmarks import cuda_static_check

reason = backends.missing("cuda")
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(scope="module")
def reports():
    return list(cuda_static_check.reports())


def decode(reports):
    return [r for r in reports if r.kernel == "decode_entropy_kernel"]


def test_every_kernel_is_there_for_every_gpu_and_keeps_its_budget(reports):
    assert not {f"{r.case} sm_{r.capability}": r.problems for r in reports if r.problems}
    targets = {int(name.removeprefix("sm_").rstrip("a")) for name in torch.ops.aepo_native.cuda_targets().split()}
    cases = {case.name for case in cuda_static_check.CASES.values()}
    assert {(r.case, r.capability) for r in reports} >= {(case, target) for case in cases for target in targets}


def test_the_hot_loops_were_found_and_read(reports):
    for r in decode(reports):
        assert r.loads == {"128": 4}
        assert 1 <= r.exp2 < 1.1  # one per logit, and the rescaling
        assert 6 < r.instructions < 9.2  # fewer cannot do the arithmetic
        assert 1 <= r.nan_maxima < 1.1  # the guard against 0 * -inf must not hide a NaN


def test_decode_leaves_the_memory_time_to_the_memory(reports):
    for r in decode(reports):
        if r.capability in (80, 90):
            assert max(r.issue_share, r.exp2_share) <= (0.25 if "fp32" in r.case else 0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_extension_loads_and_says_what_is_missing():
    assert "driver" in torch.ops.aepo_native.cuda_problem() or "device" in torch.ops.aepo_native.cuda_problem()


@pytest.mark.skipif(shutil.which("nm") is None, reason="reads symbols with nm")
def test_the_cuda_runtime_inside_is_private():
    # Exported, its functions would be replaced by those of the runtime that a CUDA build of torch has loaded.
    import aepo_kernels._C as extension

    symbols = subprocess.run(["nm", "-D", extension.__file__], capture_output=True, text=True, check=True).stdout
    assert not [line for line in symbols.splitlines() if "cuda" in line.lower() and "PyInit" not in line]
