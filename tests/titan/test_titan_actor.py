"""torchtitan's PolicyTrainer takes a step of two micro-batches with our loss: tests/titan/actor.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = 400  # 65 on a busy machine


@pytest.fixture(scope="module")
def steps():
    """loss -> ([metrics of a micro-batch, ..], metrics of the optimiser step)"""
    path = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, HERE / "actor.py"], capture_output=True, text=True, timeout=SECONDS, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def of_micro_batches(step, name):
    return [metrics[name] for metrics in step[0]]


def gradient(step):
    return step[1]["trainer/grad_norm/mean"]


def test_the_step_is_that_of_torchtitans_own_loss(steps):
    """Its DAPOLoss and our preset, whole and in chunks; the model runs in bfloat16, which gradients are rounded to."""
    theirs = steps["theirs"]
    for ours in (steps["dapo"], steps["dapo_chunks"]):
        for name in ("loss/mean", "loss/ratio_mean", "trainer/entropy/mean"):
            assert of_micro_batches(ours, name) == pytest.approx(of_micro_batches(theirs, name), rel=1e-4)
        assert gradient(ours) == pytest.approx(gradient(theirs), rel=1e-3)


def test_the_entropies_of_the_whole_step_reach_every_chunk(steps):
    whole, chunks = steps["aepo"], steps["aepo_chunks"]
    for name in whole[0][0]:
        assert of_micro_batches(chunks, name) == pytest.approx(of_micro_batches(whole, name), rel=1e-4)
    assert gradient(chunks) == pytest.approx(gradient(whole), rel=1e-3)
    assert abs(gradient(whole) / gradient(steps["dapo"]) - 1) > 0.1
