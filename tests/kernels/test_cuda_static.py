"""Claims about the machine code of the CUDA C++ kernels in the built extension, for each GPU it was built for.

Nothing spills; the loops over the logits use 128-bit loads only, four before they wait, have no barrier and no exchange
between lanes, keep a NaN and stay inside their budgets of instructions; registers allow the planned occupancy.
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


def of(reports, kernel):
    return [r for r in reports if r.kernel == kernel]


def test_every_kernel_is_there_for_every_gpu_and_keeps_its_budget(reports):
    assert not {f"{r.case} sm_{r.capability}": r.problems for r in reports if r.problems}
    targets = {int(name.removeprefix("sm_").rstrip("a")) for name in torch.ops.aepo_native.cuda_targets().split()}
    cases = {case.name for case in cuda_static_check.CASES.values()}
    assert {(r.case, r.capability) for r in reports} >= {(case, target) for case in cases for target in targets}


def test_the_hot_loops_were_found_and_read(reports):
    for r in of(reports, "decode_entropy_kernel"):
        assert r.loads == {"128": 4}
        assert 1 <= r.exp2 < 1.1  # one per logit, and the rescaling
        assert 6 < r.instructions < 9.2  # fewer cannot do the arithmetic
        assert 1 <= r.nan_maxima < 1.1  # the guard against 0 * -inf must not hide a NaN
    for r in of(reports, "sample_with_entropy_kernel"):
        assert r.loads == {"128": 4}
        assert 1 <= r.exp2 < 1.32  # the rescaling, and a bound on the noise of each word
        assert 6 + 36 / 4 < r.instructions < 26  # 18 products and as many exclusive ors make 4 random words
        assert 1 <= r.nan_maxima < 1.1


def test_decode_leaves_the_memory_time_to_the_memory(reports):
    for r in of(reports, "decode_entropy_kernel"):
        if r.capability in (80, 90):
            assert max(r.issue_share, r.exp2_share) <= (0.25 if "fp32" in r.case else 0.5)


def test_the_sampler_makes_its_random_numbers_about_as_fast_as_16_bit_logits_come(reports):
    for r in of(reports, "sample_with_entropy_kernel"):
        if r.capability in (80, 90):
            assert max(r.issue_share, r.exp2_share) <= (0.65 if "fp32" in r.case else 1.15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_extension_loads_and_says_what_is_missing():
    assert "driver" in torch.ops.aepo_native.cuda_problem() or "device" in torch.ops.aepo_native.cuda_problem()


@pytest.mark.skipif(shutil.which("nm") is None, reason="reads symbols with nm")
def test_the_cuda_runtime_inside_is_private():
    # Exported, its functions would be replaced by those of the runtime that a CUDA build of torch has loaded.
    import aepo_kernels._C as extension

    symbols = subprocess.run(["nm", "-D", extension.__file__], capture_output=True, text=True, check=True).stdout
    assert not [line for line in symbols.splitlines() if "cuda" in line.lower() and "PyInit" not in line]
