"""Claims about the machine code of the Triton kernels, for sm_80, sm_90 and sm_100, without a GPU.

Nothing spills; the loops over the logits use 128-bit accesses only, whatever the alignment of the rows, have no barrier
and no exchange between lanes, and stay inside their instruction budgets.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]
TARGETS = (80, 90, 100)
STREAMING = {"token_stats_kernel", "decode_entropy_kernel", "logits_grad_kernel", "single_pass_kernel"}


def compiling(*command):
    """Run Python in a process of its own: here Triton may already be the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def reports():
    done = compiling("-m", "benchmarks.gpu_static_check", "--json")
    assert done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


OTHER_NUMBERS = """
import torch
from aepo_kernels.kernels.policy_terms import policy_terms, policy_terms_kernel
from aepo_kernels.objective import PRESETS, PolicyObjective
from benchmarks.gpu_static_check import Case, compile_case

token = torch.empty(300, device="meta")

def launch():
    for preset in PRESETS:
        for dual_clip in (None, 1.5):
            dual_clip = None if preset == "cispo" else dual_clip
            numbers = PolicyObjective.preset(preset, dual_clip=dual_clip, eps_low=1.0, kl_coef=0.1).numbers()
            policy_terms(token, token, token, token, None, token, token, None, None, None, numbers)

compile_case(Case("every preset", launch), 90)
print(len(policy_terms_kernel.device_caches[90][0]))
"""


def test_other_numbers_of_an_objective_compile_nothing():
    done = compiling("-c", OTHER_NUMBERS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1


def of(reports, kernel, **equal):
    return [r for r in reports if r["kernel"] == kernel and all(r[name] == value for name, value in equal.items())]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_keeps_its_budget(reports, target):
    mine = [r for r in reports if r["capability"] == target and r["case"] != "grad bf16, odd out"]
    broken = {f"{r['case']}: {r['kernel']}": r["problems"] for r in mine if r["problems"]}
    assert not broken
    launched = {"merge_parts_kernel", "merge_decode_kernel", "moments_kernel", "policy_terms_kernel", "totals_kernel"}
    launched |= {"sample_parts_kernel", "finish_rows_kernel", "scaled_cast_kernel"}
    assert {r["kernel"] for r in mine} == STREAMING | launched


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", sorted(STREAMING))
def test_the_hot_loops_were_found_and_read(reports, kernel, target):
    for r in of(reports, kernel, capability=target):
        if r["case"] == "grad bf16, odd out":
            continue
        assert set(r["loads"]) == {"128"}
        width = "64" if r["case"] == "grad fp32 to bf16" else "128"  # as many elements as are loaded
        writes = kernel == "logits_grad_kernel" or r["case"].endswith("write")
        assert set(r["stores"]) == ({width} if writes else set())
        assert 1 <= r["exp2"] < 1.1  # one per logit, and the forward's rescaling
        assert 6 < r["instructions"] <= 14  # fewer cannot do the arithmetic


def test_sums_become_gradients_at_the_speed_of_memory(reports):
    assert len(of(reports, "scaled_cast_kernel")) == len(TARGETS)
    for r in of(reports, "scaled_cast_kernel"):
        assert set(r["loads"]) == set(r["stores"]) == {"128"}
        assert r["issue_share"] < 0.1


def test_the_sampler_makes_its_random_numbers_within_the_memorys_time(reports):
    # 8 instructions of the softmax, 18 of Philox; the logarithms are in a branch that few tiles take.
    for r in of(reports, "sample_parts_kernel"):
        assert set(r["loads"]) == {"128"}
        assert 20 < r["instructions"] < 31
        assert 1 <= r["exp2"] < 1.1
        assert r["barriers"] <= 4
    assert of(reports, "sample_parts_kernel", case="sample fp32", capability=90)[0]["issue_share"] < 0.8


def test_a_nan_survives_the_guard_against_minus_inf(reports):
    # The interpreter's maximum always keeps a NaN, a GPU's only when told to, so only the machine code can show it.
    for r in (r for kernel in STREAMING for r in of(reports, kernel)):
        without = r["case"] == "grad bf16, no entropy" or (r["case"].endswith("write") and ", all" not in r["case"])
        assert r["nan_maxima"] == (0 if without else 1), r["case"]


def test_forward_leaves_half_of_an_h100s_memory_time_to_spare(reports):
    for r in of(reports, "token_stats_kernel", capability=90):
        assert r["issue_share"] <= 0.5
        assert r["exp2_share"] <= 0.5


def test_the_check_notices_narrow_accesses(reports):
    narrow = of(reports, "logits_grad_kernel", case="grad bf16, odd out")
    assert len(narrow) == len(TARGETS)
    for r in narrow:
        assert "16" in r["stores"]
        assert any("narrower than 128 bits" in problem for problem in r["problems"])
