"""Claim: the three logits functions can replace those of the same names in TRL and verl, and on the logits where those
go wrong they stay right. The peers' formulas are restated here; each class of mistake was seen in a released kernel."""

import math

import pytest
import torch

from aepo_kernels import entropy_from_logits, logprobs_and_entropy, selective_log_softmax
from aepo_kernels.testing import eager_token_stats, make_labels, make_logits


def eager_entropy(logits):  # verl: logsumexp - sum p z
    p = torch.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - (p * logits).sum(-1)


def test_shapes_and_values_of_trl_and_verl(backend, device):
    logits = make_logits(12, 50, device=device).view(3, 4, 50)
    index = make_labels(logits.view(-1, 50)).view(3, 4)
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(
        selective_log_softmax(logits, index, backend=backend), log_p.gather(-1, index[..., None]).squeeze(-1)
    )
    torch.testing.assert_close(entropy_from_logits(logits, backend=backend), eager_entropy(logits))
    torch.testing.assert_close(
        entropy_from_logits(logits, temperature=2.0, backend=backend), eager_entropy(logits / 2.0)
    )
    labels32 = index.to(torch.int32)
    assert torch.equal(
        selective_log_softmax(logits, labels32, backend=backend), selective_log_softmax(logits, index, backend=backend)
    )


@pytest.mark.parametrize("vocab", [128, 130, 1000, 1056])
def test_columns_beyond_the_vocabulary_do_not_exist(vocab, backend, device):
    # A kernel that pads the vocabulary to its tile with 0 counts ghost columns: flat negative logits show them at once.
    logits = torch.full((2, vocab), -20.0, device=device)
    labels = torch.tensor([0, vocab - 1], device=device)
    logprobs, entropy = logprobs_and_entropy(logits, labels, backend=backend)
    assert entropy.tolist() == pytest.approx([math.log(vocab)] * 2, rel=1e-6)
    assert logprobs.tolist() == pytest.approx([-math.log(vocab)] * 2, rel=1e-6)


@pytest.mark.parametrize("level", [-101.0, -150.0, -3e4, 3e4])
def test_a_maximum_far_from_zero(level, backend, device):
    # A running maximum that starts at 0 instead of -inf underflows every term: NaN below about -100.
    logits = make_logits(3, 300, device=device) + level
    labels = make_labels(logits)
    truth = eager_token_stats(logits, labels, dtype=torch.float64)
    logprobs, entropy = logprobs_and_entropy(logits, labels, backend=backend)
    torch.testing.assert_close(logprobs.cpu().double(), truth.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.cpu().double(), truth.entropy, rtol=1e-5, atol=0)


def test_one_minus_inf_does_not_poison_entropy_or_gradient(backend, device):
    # The usual eager formula gives NaN here, and so do several released kernels: 0 * -inf.
    logits = make_logits(2, 3000, device=device)
    logits[:, 7] = -torch.inf
    assert eager_entropy(logits).isnan().all()
    x = logits.requires_grad_()
    entropy = entropy_from_logits(x, backend=backend)
    entropy.sum().backward()
    assert entropy.isfinite().all()
    assert x.grad.isfinite().all()
    assert x.grad[:, 7].eq(0).all()


def test_small_entropies_do_not_cancel_or_turn_negative(backend, device):
    # At H = 1e-6 the textbook difference is wrong by 100 % in float32, and may be negative.
    logits = torch.zeros(8, 4096)
    logits[:, 0] = torch.linspace(22, 29, 8)
    truth = eager_token_stats(logits, torch.zeros(8, dtype=torch.long), dtype=torch.float64).entropy
    textbook = eager_entropy(logits).double()
    assert ((textbook - truth).abs() / truth).max() > 0.5
    entropy = entropy_from_logits(logits.to(device), backend=backend)
    torch.testing.assert_close(entropy.cpu().double(), truth, rtol=1e-5, atol=0)


def test_results_are_not_rounded_to_the_logits_dtype(backend, device):
    # bfloat16 outputs cost up to 3e-2 in the log-prob, which the ratio exp(new - old) then carries.
    logits = make_logits(16, 3000, "normal", torch.bfloat16, device=device)
    labels = make_labels(logits)
    truth = eager_token_stats(logits, labels, dtype=torch.float64)
    logprobs, entropy = logprobs_and_entropy(logits, labels, backend=backend)
    assert (logprobs.cpu().double() - truth.logprobs).abs().max() < 5e-6
    assert (entropy.cpu().double() - truth.entropy).abs().max() < 5e-6


def test_more_rows_than_a_grid_dimension(backend, device):
    # A launch grid's second and third dimension end at 65535: more rows than that must not depend on them.
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("65537 programs take minutes in Triton's interpreter")
    logits = make_logits(1, 3, device=device).expand(65537, 3)
    entropy = entropy_from_logits(logits, backend=backend)
    assert entropy.eq(entropy[0]).all()
