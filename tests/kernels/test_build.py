"""Claims about setup.py: whether CUDA code is built is decided by AEPO_CUDA and the presence of nvcc, and said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(tmp_path, **environment):
    """Ask for a build elsewhere; these all end before anything is compiled."""
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"AEPO_CUDA": "yes"}, "AEPO_CUDA must be 0, 1 or not set; got 'yes'"),
        (
            {"AEPO_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "AEPO_CUDA=1, but there is no CUDA compiler: looked for /nowhere/",
        ),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(tmp_path, environment, message):
    result = build(tmp_path, **environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_an_nvcc_that_knows_none_of_our_gpus_is_an_error(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho compute_50\n")
    nvcc.chmod(0o755)
    result = build(tmp_path, CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert f"{nvcc} compiles for none of sm_80, sm_90a, sm_100" in result.stderr


@pytest.mark.parametrize(("command", "works"), [("egg_info", True), ("build_ext", False)])
def test_what_compiles_nothing_needs_no_torch(tmp_path, command, works):
    """As in the isolated environments of `python -m build` and uv, from which even an installed torch is not seen."""
    hidden = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", {command!r}, *{["--egg-base", str(tmp_path)] if works else []!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == works, done.stderr
    assert bool(list(tmp_path.iterdir())) == works
    if not works:
        assert "aepo-kernels builds its extension against your torch" in done.stderr
        assert "uv pip install --no-build-isolation" in done.stderr
