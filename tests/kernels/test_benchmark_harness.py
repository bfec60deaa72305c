"""Claims about the CPU benchmarks: a wrong or NaN answer gets no row, inputs are restored before every run, the memory
column sees a temporary, the last line is JSON, and the scripts' help and peers work without measuring anything.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aepo_kernels.objective import PolicyObjective
from aepo_kernels.ops.policy_loss import policy_loss
from benchmarks import harness, peers

ROOT = Path(__file__).parents[2]


def problem(**settings):
    x = torch.arange(1.0, 5.0)
    return harness.Problem("toy", x, x[:2], (x[:2].double() * 2,), ideal_bytes=16, logits=x, **settings)


def test_only_correct_providers_get_a_row():
    providers = [
        harness.Provider("right", lambda x: (x * 2,)),
        harness.Provider("wrong", lambda x: (x * 2.1,)),
        harness.Provider("nan", lambda x: (x * torch.nan,)),
    ]
    rows = harness.measure(problem(), providers, rounds=2)
    assert [row.provider for row in rows][2:] == ["right"]
    assert rows[2].max_error == 0
    assert all(row.median_ms > 0 for row in rows)


def test_inputs_are_restored_before_every_run():
    seen = []
    provider = harness.Provider("in place", lambda x: (seen.append(x.clone()), (x.mul_(2),))[1])
    harness.measure(problem(restore=lambda x: x.copy_(torch.arange(1.0, len(x) + 1))), [provider], rounds=3)
    assert len(seen) >= 4
    assert all(torch.equal(x, torch.arange(1.0, len(x) + 1)) for x in seen)


def test_extra_memory_sees_a_temporary():
    extra = harness.extra_memory(lambda: torch.ones(2**22).sum())
    if extra is None:
        pytest.skip("the kernel does not tell")
    assert 0.9 * 2**24 < extra < 2**25


def test_the_last_line_is_json(capsys, tmp_path):
    parser = harness.arguments("d", "e")
    args = parser.parse_args(["--rounds", "1", "--json", str(tmp_path / "new" / "rows.json")])
    harness.report([problem()], [harness.Provider("right", lambda x: (x * 2,))], "right", args)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["provider"] for row in last["rows"]][-1] == "right"
    assert last == json.loads((tmp_path / "new" / "rows.json").read_text())


def test_the_plain_aepo_loss_is_the_preset():
    g = torch.Generator().manual_seed(0)
    logprobs, old, advantages = torch.randn(3, 200, generator=g, dtype=torch.float64)
    entropy = torch.rand(200, generator=g, dtype=torch.float64)
    losses, grads = [], []
    for loss in (
        lambda x: peers.aepo_loss(x, entropy, old, advantages),
        lambda x: (
            policy_loss(
                x,
                old,
                advantages,
                torch.ones(200, dtype=torch.bool),
                entropy=entropy,
                objective=PolicyObjective.preset("aepo"),
            ).loss
        ),
    ):
        x = logprobs.clone().requires_grad_()
        losses.append(loss(x))
        grads.append(torch.autograd.grad(losses[-1], x)[0])
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("script", ["token_stats_cpu", "policy_loss_cpu"])
def test_help_teaches(script):
    command = [sys.executable, "-m", f"benchmarks.{script}", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert "--quick" in result.stdout
    assert "GB/s counts" in result.stdout
