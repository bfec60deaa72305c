"""CUDA sources compiled for the host (cuda_on_host/cuda_runtime.h), and what their tests share."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CXX = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs a C++ compiler and ucontext")
ROOT = Path(__file__).parents[2]
LANES, WORDS = 128, 4  # kThreads and kWords of csrc/cuda/lane_softmax.h
VEC = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}
TILE = {dtype: LANES * WORDS * vec for dtype, vec in VEC.items()}
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # LogitsType of csrc/include/row_kernels.h
# float32 sums of up to 4e4 terms in 128 lanes: a lane adds a few hundred terms one by one, which costs a few ulp.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}
WHOLE, SPLIT, SHREDDED = 1, 6, 2000  # places in the workspace: one per row, a few, one per tile of every row


def compile_for_host(source: str, folder: Path) -> ctypes.CDLL:
    """The functions of a file of cuda_on_host/, as a library in `folder`."""
    here = Path(__file__).with_name("cuda_on_host")
    includes = [f"-I{path}" for path in (here, ROOT / "csrc/include", ROOT / "csrc/cuda")]
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
    target = folder / "kernels.so"
    subprocess.run([CXX, *flags, *includes, str(here / source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def make_workspace(blocks: int) -> torch.Tensor:
    """States of earlier launches, and the tickets: 0, as every launch leaves them."""
    workspace = torch.full((blocks, 5), 0x7FC00000, dtype=torch.int32)  # NaN as float32
    tickets(workspace).zero_()
    return workspace


def tickets(workspace: torch.Tensor) -> torch.Tensor:
    return workspace.view(-1)[4 * len(workspace) :]
