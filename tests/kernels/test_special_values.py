"""Claims about values that are not ordinary numbers: a logit of -inf counts as nothing, wherever it stands; a row with
NaN, +inf or nothing finite is NaN in every output and disturbs no other row."""

import math

import pytest
import torch

from aepo_kernels import (
    PolicyObjective,
    decode_entropy,
    entropy_from_logits,
    linear_logprobs_and_entropy,
    linear_policy_loss,
    logits_policy_loss,
    logprobs_and_entropy,
    selective_log_softmax,
)
from aepo_kernels.testing import assert_within_budget, eager_token_stats, make_labels, make_logits

# Where the -inf logits of a row of 5000 stand: leading ones fill the first block of every kernel, and more.
HOLES = {
    "one": [2500],
    "first": [0],
    "last": [4999],
    "leading block": range(2048),
    "leading half and more": range(4500),
    "trailing block": range(2900, 5000),
    "every second": range(0, 5000, 2),
    "all but one": range(1, 5000),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("holes", HOLES)
def test_minus_inf_counts_as_nothing(holes, dtype, backend, device):
    logits = make_logits(2, 5000, "normal", dtype, device=device)
    logits[:, list(HOLES[holes])] = -torch.inf
    labels = make_labels(logits)
    x = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(x, labels, backend=backend)
    (logprobs.sum() + 0.5 * entropy.sum()).backward()
    weights = (torch.ones(2), torch.full((2,), 0.5))
    truth = eager_token_stats(logits, labels, 1.0, *weights, dtype=torch.float64)
    assert_within_budget("logprobs", logprobs, truth.logprobs, scale=10)
    assert_within_budget("entropy", entropy, truth.entropy, scale=10)
    assert_within_budget("grad", x.grad, truth.grad, scale=10)
    assert x.grad[logits.isneginf()].eq(0).all()
    assert entropy.ge(0).all()


def test_a_label_without_probability_has_logprob_minus_inf(backend, device):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], device=device)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1], device=device), backend=backend)
    assert logprobs.item() == -torch.inf
    assert entropy.isfinite().all()


def test_the_gradient_of_a_label_without_probability(backend, device):
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 0.5]], device=device).requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1], device=device), backend=backend)
    (grad,) = torch.autograd.grad(
        (logprobs, entropy), logits, (torch.ones_like(logprobs), 2 * torch.ones_like(entropy))
    )
    p = torch.tensor([[0.0, -torch.inf, 1.0, 0.5]], dtype=torch.float64).softmax(-1)
    log_p = p.log().masked_fill(p == 0, 0.0)
    truth = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64) - p - 2 * p * (log_p - (p * log_p).sum())
    torch.testing.assert_close(grad.cpu().double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_smallest_finite_number_as_a_mask(dtype, backend, device):
    # Masked logits are often written as finfo.min; divided by a temperature below 1 it overflows to -inf.
    logits = make_logits(3, 1000, "normal", dtype, device=device)
    masked = logits.clone()
    masked[:, ::3] = torch.finfo(dtype).min
    dropped = logits.clone()
    dropped[:, ::3] = -torch.inf
    labels = make_labels(dropped)
    for x, y in zip(*(logprobs_and_entropy(z, labels, 0.5, backend=backend) for z in (masked, dropped)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    uniform = torch.full((1, 1000), torch.finfo(dtype).min, dtype=dtype, device=device)
    entropy = entropy_from_logits(uniform, backend=backend)
    assert entropy.item() == pytest.approx(math.log(1000), rel=1e-6)


@pytest.mark.parametrize("position", [0, 999, 2999])
@pytest.mark.parametrize("bad", ["nan", "+inf", "nothing finite", "nan after +inf", "nan among -inf"])
def test_an_undefined_row_is_nan_and_alone(bad, position, backend, device):
    logits = make_logits(5, 3000, device=device)
    clean = logits.clone()
    row = logits[2]
    if bad in ("nothing finite", "nan among -inf"):
        row[:] = -torch.inf
    if bad == "nan after +inf":
        row[(position + 1) % 3000] = torch.inf
    if "nan" in bad:
        row[position] = torch.nan
    if bad == "+inf":
        row[position] = torch.inf
    labels = make_labels(clean)
    labels[2] = -100  # even the log-prob of an ignored token reports it

    def run(x):
        x = x.clone().requires_grad_()
        logprobs, entropy = logprobs_and_entropy(x, labels, backend=backend)
        (logprobs.sum() + entropy.sum()).backward()
        return logprobs.detach(), entropy.detach(), x.grad

    others = torch.arange(5, device=device) != 2
    for got, expected in zip(run(logits), run(clean), strict=True):
        assert got[2].isnan().all()
        assert torch.equal(got[others], expected[others])


def test_ties_of_the_maximum_count(backend, device):
    logits = torch.full((2, 4096), -torch.inf, device=device)
    logits[:, [1, 1023, 1024, 4095]] = torch.tensor([[5.0], [-1e4]], device=device)
    labels = torch.tensor([1024, 1], device=device)
    logprobs, entropy = logprobs_and_entropy(logits, labels, backend=backend)
    assert entropy.tolist() == pytest.approx([math.log(4)] * 2, rel=1e-6)
    assert logprobs.tolist() == pytest.approx([-math.log(4)] * 2, rel=1e-6)


def test_one_token_vocabulary_is_certain(backend, device):
    x = torch.tensor([[3.0], [-1e4]], device=device, requires_grad=True)
    labels = torch.zeros(2, dtype=torch.long, device=device)
    logprobs, entropy = logprobs_and_entropy(x, labels, backend=backend)
    (logprobs + entropy).sum().backward()
    assert logprobs.eq(0).all()
    assert entropy.eq(0).all()
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperatures_at_the_ends(dtype, temperature, backend, device):
    # At 1e-30 the maximum has all probability (shared by its ties), at 1e30 every finite logit the same.
    logits = make_logits(4, 1000, "normal", dtype)
    logits[1, :500] = -torch.inf
    logits[2, ::7] = logits[2].max()
    logits[3] *= 1e30
    labels = logits.argmax(-1)
    x = logits.to(device).requires_grad_()
    logprobs, entropy = logprobs_and_entropy(x, labels.to(device), temperature, backend=backend)
    # Gradients of the size of the inverse temperature, brought to the size of 1.
    ((logprobs.sum() + 0.5 * entropy.sum()) * temperature).backward()
    weights = (torch.full((4,), temperature, dtype=torch.float64), torch.full((4,), 0.5 * temperature).double())
    truth = eager_token_stats(logits, labels, temperature, *weights, dtype=torch.float64)
    assert_within_budget("logprobs", logprobs, truth.logprobs, scale=10)
    assert_within_budget("entropy", entropy, truth.entropy, scale=10)
    assert_within_budget("grad", x.grad, truth.grad, scale=10)
    assert x.grad[logits.isneginf()].eq(0).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38, 9e-31, 1.1e30, 1e300])
def test_temperatures_beyond_the_ends_are_refused(temperature, backend):
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    policy = (labels, torch.zeros(2), torch.zeros(2), torch.ones(2))
    calls = [
        lambda **kw: entropy_from_logits(logits, **kw),
        lambda **kw: selective_log_softmax(logits, labels, **kw),
        lambda **kw: logprobs_and_entropy(logits, labels, **kw),
        lambda **kw: linear_logprobs_and_entropy(logits, logits, labels, **kw),
        lambda **kw: logits_policy_loss(logits, *policy, objective=PolicyObjective(), **kw),
        lambda **kw: linear_policy_loss(logits, logits, *policy, objective=PolicyObjective(), **kw),
        lambda **kw: decode_entropy(logits, **kw),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"temperature must be in \[1e-30, 1e\+30\]; got"):
            call(temperature=temperature, backend=backend)


def test_temperatures_of_rows_at_the_ends_of_float32(backend, device):
    # Nothing reads them on a GPU, so they are right as far as float32 goes.
    temperatures = torch.tensor([1e-38, 1e-20, 1.0, 1e20, 3e38], device=device)
    logits = make_logits(1, 3000, "normal").repeat(5, 1)
    logits[:, ::2] = -torch.inf
    tokens = logits.argmax(-1)
    entropy, logprobs = decode_entropy(logits.to(device), temperatures, tokens=tokens.to(device), backend=backend)
    log_p = torch.log_softmax(logits.double() / temperatures.cpu().double()[:, None], -1)
    assert_within_budget("logprobs", logprobs, log_p.max(-1).values, scale=10)
    truth = -(log_p.exp() * log_p.masked_fill(log_p.exp() == 0, 0)).sum(-1)
    assert_within_budget("entropy", entropy, truth, scale=10)
