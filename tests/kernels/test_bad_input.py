"""Claim: input that does not fit raises an error that names the argument, what came and what is expected, before
anything is computed."""

import pytest
import torch

from aepo_kernels import (
    PolicyObjective,
    entropy_from_logits,
    logits_policy_loss,
    logprobs_and_entropy,
    policy_loss,
    selective_log_softmax,
)
from aepo_kernels.backend import BACKENDS, missing, resolve

LOGITS = torch.zeros(4, 9)
LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "labels", "temperature", "error", "message"),
    [
        (
            LOGITS.long(),
            LABELS,
            1.0,
            TypeError,
            "logits must be bfloat16, float16, float32 or float64; got torch.int64",
        ),
        ([[0.0]], LABELS, 1.0, TypeError, "logits must be a tensor; got list"),
        (torch.zeros(()), LABELS, 1.0, ValueError, r"logits must be \[.., V\] with V >= 1; got shape \(\)"),
        (torch.zeros(4, 0), LABELS, 1.0, ValueError, r"with V >= 1; got shape \(4, 0\)"),
        (LOGITS, LABELS[:3], 1.0, ValueError, r"labels must have shape \(4,\) like logits.*; got \(3,\)"),
        (LOGITS, LABELS.float(), 1.0, TypeError, "labels must have an integer dtype; got torch.float32"),
        (LOGITS, LABELS.bool(), 1.0, TypeError, "labels must have an integer dtype; got torch.bool"),
        (LOGITS, LABELS.to("meta"), 1.0, ValueError, "labels must be on cpu like logits.*; got meta"),
        (LOGITS, None, 1.0, TypeError, "labels must be a tensor; got NoneType"),
        (LOGITS, LABELS, 0.0, ValueError, "temperature must be > 0 and finite; got 0.0"),
        (LOGITS, LABELS, float("nan"), ValueError, "temperature must be > 0 and finite; got nan"),
        (LOGITS, LABELS, "1", TypeError, "temperature must be a float; got str"),
        (LOGITS, LABELS, torch.ones(4), TypeError, "temperature must be a float; got Tensor"),
    ],
)
def test_logprobs_and_entropy(logits, labels, temperature, error, message):
    with pytest.raises(error, match=message):
        logprobs_and_entropy(logits, labels, temperature)


@pytest.mark.parametrize("label", [9, -1, -100, 2**40])
def test_a_label_outside_the_vocabulary_is_named(label, backend):
    labels = torch.tensor([0, 1, label, 3])
    with pytest.raises(ValueError, match=rf"label {label} at position \[2\] is outside \[0, V\) with V = 9"):
        selective_log_softmax(LOGITS, labels, backend=backend)
    if label != -100:
        with pytest.raises(ValueError, match=rf"label {label} at position \[0, 2\] is outside"):
            logprobs_and_entropy(LOGITS[None], labels[None], backend=backend)
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match=rf"label {label} at position \[2\]"):
        logits_policy_loss(
            LOGITS, labels, zeros, zeros, torch.ones(4, dtype=int), objective=PolicyObjective(), backend=backend
        )


def test_a_parameter_is_not_overwritten(backend):
    logits, zeros = torch.nn.Parameter(LOGITS.clone()), torch.zeros(4)
    policy = (torch.zeros(4, dtype=torch.int64), zeros, zeros + 1, zeros == 0)
    with pytest.raises(ValueError, match="write the gradient over a parameter"):
        logits_policy_loss(logits, *policy, objective=PolicyObjective(), inplace_backward=True, backend=backend)
    logits_policy_loss(logits, *policy, objective=PolicyObjective(), backend=backend).loss.backward()
    assert torch.equal(logits.detach(), LOGITS)
    assert logits.grad.abs().sum() > 0


def valid_call(**changes):
    zeros = torch.zeros(4)
    call = {
        "logprobs": zeros,
        "old_logprobs": zeros,
        "advantages": zeros,
        "mask": torch.ones(4, dtype=torch.bool),
        "objective": PolicyObjective(aggregation="seq-mean-token-sum"),
        "cu_seqlens": torch.tensor([0, 4]),
    }
    return {**call, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logprobs": torch.zeros(4, dtype=int)}, TypeError, "logprobs must be bfloat16"),
        (
            {"old_logprobs": torch.zeros(3)},
            ValueError,
            r"old_logprobs must have shape \(4,\) like the tokens; got \(3,\)",
        ),
        ({"old_logprobs": None}, TypeError, "old_logprobs must be a tensor; got NoneType"),
        ({"advantages": torch.zeros(1)}, ValueError, r"advantages must have shape \(4,\)"),
        (
            {"advantages": torch.zeros(4, device="meta")},
            ValueError,
            "advantages must be on cpu like the tokens; got meta",
        ),
        ({"mask": torch.tensor([1.0, 0.5, 1.0, 0.0])}, ValueError, "mask must hold 0 and 1 alone.*; got 0.5"),
        ({"mask": torch.ones(4, dtype=torch.complex64)}, TypeError, "mask must be bool, integer or floating point"),
        ({"entropy": torch.zeros(5)}, ValueError, r"entropy must have shape \(4,\)"),
        ({"ref_logprobs": torch.zeros(4, dtype=int)}, TypeError, "ref_logprobs must be bfloat16"),
        ({"objective": "aepo"}, TypeError, "objective must be a PolicyObjective.*; got 'aepo'"),
        (
            {"cu_seqlens": torch.tensor([0, 3])},
            ValueError,
            r"cu_seqlens must start at 0, end at .* \(4\).*got \[0, 3\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, "never decrease"),
        ({"cu_seqlens": torch.tensor([])}, TypeError, "cu_seqlens must have an integer dtype"),
        (
            {"cu_seqlens": torch.zeros(2, dtype=int, device="meta")},
            ValueError,
            "cu_seqlens must be on cpu .*; got meta",
        ),
        ({"cu_seqlens": [0, 4]}, TypeError, "cu_seqlens must be a 1-D integer tensor"),
        ({"denominator": 0}, ValueError, "denominator must be finite and > 0; got 0"),
        ({"denominator": float("nan")}, ValueError, "denominator must be finite and > 0; got nan"),
        ({"denominator": torch.tensor(0)}, ValueError, "denominator must be > 0 and finite; got 0"),
        ({"denominator": torch.ones(2)}, ValueError, "denominator must be one number"),
        ({"denominator": 1e-40}, ValueError, "denominator must be of a size from 1e-30 to 1e\\+30; got 1e-40"),
        ({"denominator": torch.tensor(3e38)}, ValueError, r"denominator must be in \[1e-30, 1e\+30\]; got"),
        ({"denominator": torch.tensor(1e-40)}, ValueError, r"denominator must be in \[1e-30, 1e\+30\]"),
        ({"denominator": torch.tensor(float("nan"))}, ValueError, "denominator must be > 0 and finite; got nan"),
        ({"denominator": torch.tensor(4 + 0j)}, TypeError, "denominator must be a real number; got torch.complex64"),
        ({"denominator": torch.tensor(True)}, TypeError, "denominator must be a real number; got torch.bool"),
        ({"denominator": 1e300}, ValueError, "denominator must be .* to 1e\\+30; got 1e"),
        ({"denominator": "4"}, TypeError, "denominator must be a number or a one-element tensor; got str"),
    ],
)
def test_policy_loss(changes, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**valid_call(**changes))


@pytest.mark.parametrize(
    ("stats", "error", "message"),
    [
        (1.0, TypeError, r"entropy_stats must be a pair \(mean, std\)"),
        ((1.0, -0.1), ValueError, "entropy_stats std must be finite and >= 0"),
        ((float("nan"), 1.0), ValueError, "entropy_stats mean must be finite"),
    ],
)
def test_entropy_stats(stats, error, message):
    call = valid_call(objective=PolicyObjective.preset("aepo"), entropy=torch.zeros(4), entropy_stats=stats)
    with pytest.raises(error, match=message):
        policy_loss(**call)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    with pytest.raises(ValueError, match=f"backend must be None or one of {', '.join(BACKENDS)}; got 'numba'"):
        entropy_from_logits(LOGITS, backend="numba")
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: it has no kernels for this operation"):
        entropy_from_logits(LOGITS, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call: it serves CUDA tensors"):
        entropy_from_logits(LOGITS, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if missing("triton") is None:
        with pytest.raises(ValueError, match="it has no float64 kernels"):
            entropy_from_logits(LOGITS.double(), backend="triton")
    with pytest.raises(ValueError, match="backend='cpu' cannot serve this call: it serves CPU tensors"):
        resolve("cpu", LOGITS.to("meta"))


def test_without_a_request_the_best_backend_serves():
    assert resolve(None, LOGITS) == ("cpu" if missing("cpu") is None else "reference")
    assert resolve(None, LOGITS.to("meta")) == "reference"


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ((0.5, -1.0), "entropy_stats std must be"),
        ((0.5, float("inf")), "entropy_stats std must be"),
        ((float("nan"), 1.0), "entropy_stats mean must be"),
        ((float("inf"), 1.0), "entropy_stats mean must be"),
        ((1e300, 1.0), "entropy_stats mean must be"),
        ((0.5, 1e38), "entropy_stats std must be"),
    ],
)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_entropy_stats_beyond_what_they_can_be(stats, message, as_tensors):
    objective = PolicyObjective(entropy_advantage=0.2)
    if as_tensors:
        stats = tuple(torch.tensor(x, dtype=torch.float64) for x in stats)
    call = valid_call(objective=objective, cu_seqlens=None, entropy=torch.ones(4), entropy_stats=stats)
    with pytest.raises(ValueError, match=message):
        policy_loss(**call)
