"""Claims about the one build: it holds every instruction set, picks the widest or the one that is asked for, and all
kernel tests pass on each; nothing outside the AVX paths contains AVX code, so it runs on any x86-64 processor.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aepo_kernels import backend as backends

pytestmark = pytest.mark.skipif(backends.missing("cpu") is not None, reason="the extension is not built")
X86 = platform.machine() in ("x86_64", "AMD64")
CAPABILITIES = ("avx512", "avx2", "portable")
TESTS = Path(__file__).parent


def run(*command: str, capability: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "AEPO_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


def ask(capability: str) -> subprocess.CompletedProcess[str]:
    return run(
        "-c", "import torch, aepo_kernels._C; print(torch.ops.aepo_native.cpu_capability())", capability=capability
    )


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known_ones():
    result = ask("sse9")
    assert result.returncode != 0
    assert re.search(r"RuntimeError: AEPO_CPU_CAPABILITY=sse9 .*this processor runs .*portable", result.stderr)


@pytest.mark.skipif("AEPO_CPU_CAPABILITY" in os.environ, reason="this run is about one instruction set")
def test_the_widest_supported_instruction_set_is_chosen():
    flags = set(Path("/proc/cpuinfo").read_text().split()) if X86 else set()
    has_avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    widest = "avx512" if has_avx512 else "avx2" if {"avx2", "fma", "f16c"} <= flags else "portable"
    assert torch.ops.aepo_native.cpu_capability() == widest


@pytest.mark.skipif("AEPO_CPU_CAPABILITY" in os.environ, reason="this run is about one instruction set")
@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_all_kernel_tests_pass_on_the_narrower_instruction_sets(capability):
    asked = ask(capability)
    if asked.returncode != 0:
        assert "is not available" in asked.stderr
        pytest.skip(f"this processor does not run {capability}")
    assert asked.stdout.strip() == capability
    names = ("cpu_rows", "cpu_single_pass", "token_stats", "special_values", "sample_with_entropy")
    files = [str(TESTS / f"test_{name}.py") for name in names]
    result = run("-m", "pytest", "-q", "-k", "cpu", "-p", "no:cacheprovider", *files, capability=capability)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.skipif(not X86 or shutil.which("objdump") is None, reason="reads x86 code with objdump")
def test_only_the_avx_kernels_contain_avx_code():
    import aepo_kernels._C as extension

    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", extension.__file__], capture_output=True, text=True
    ).stdout
    avx: dict[str, bool] = {}
    for function in re.split(r"\n\n[0-9a-f]+ <", code)[1:]:
        name, body = function.split(">:", 1)
        avx[name] = re.search(r"%[yz]mm|\tv[a-z0-9]+ ", body) is not None
    wide = {name for name in avx if "6avx512" in name or "4avx2" in name}
    assert len(avx) > 20
    assert len(wide) >= 36  # six kernels, three storage types, two instruction sets
    assert all(avx[name] for name in wide)
    assert not [name for name in avx if avx[name] and name not in wide]
