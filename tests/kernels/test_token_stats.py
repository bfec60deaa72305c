"""Claims about log-prob, entropy and their gradient, for every backend:

never worse than twice eager's error plus a rounding against float64 truth, in every regime and dtype; the entropy is
>= 0 and right to 1e-5 relative from 1e-8 nats to ln V, shifted or not; ignored labels have no gradient; an output that
is not used costs none; equal inputs give equal bits.
"""

import math

import pytest
import torch

from aepo_kernels import entropy_from_logits, logprobs_and_entropy, selective_log_softmax
from aepo_kernels.testing import (
    DTYPES,
    REGIMES,
    assert_within_budget,
    eager_token_stats,
    make_labels,
    make_logits,
)

TOKENS = 5


def served(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64 kernels")
    return dtype


def check_against_truth(logits, labels, temperature, backend, ignore_index=-100):
    g = torch.Generator().manual_seed(1)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = [torch.randn(logits.shape[:-1], generator=g, dtype=acc).to(logits.device) for _ in range(2)]
    x = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(x, labels, temperature, ignore_index, backend=backend)
    torch.autograd.backward((logprobs, entropy), weights)

    settings = (temperature, *weights)
    truth = eager_token_stats(logits, labels, *settings, dtype=torch.float64, ignore_index=ignore_index)
    eager = eager_token_stats(logits, labels, *settings, ignore_index=ignore_index)
    assert logprobs.dtype == entropy.dtype == acc
    assert x.grad.dtype == logits.dtype
    # logprob = d_label - log S, so the largest number that is rounded on the way is the log-prob itself or log V.
    log_vocab = math.log(logits.shape[-1]) + 1
    assert_within_budget("logprobs", logprobs, truth.logprobs, eager.logprobs, scale=log_vocab)
    assert_within_budget("entropy", entropy, truth.entropy, eager.entropy, scale=log_vocab)
    # 1 - p is rounded at 1, p (log p + H) at log V; both are multiplied by their coefficient and 1 / temperature.
    scale = (weights[0].abs() + weights[1].abs() * log_vocab).cpu().double() / temperature
    assert_within_budget("grad", x.grad, truth.grad, eager.grad, scale=scale[..., None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_against_float64_truth(regime, dtype, backend, device):
    # 8191 is prime and spans more than one block of every kernel.
    logits = make_logits(TOKENS, 8191, regime, served(backend, dtype), device=device)
    check_against_truth(logits, make_labels(logits), 0.7, backend)


@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 257, 1024, 4097])  # one entry, below / at / one past a vector or block
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_edge_of_the_vocabulary(vocab, dtype, backend, device):
    logits = make_logits(TOKENS, vocab, "normal", dtype, device=device)
    check_against_truth(logits, make_labels(logits), 1.3, backend)


def test_ignored_labels_have_logprob_0_and_no_gradient_but_an_entropy(backend, device):
    logits = make_logits(TOKENS, 50, device=device)
    labels = make_labels(logits)
    labels[[0, 4]] = 7
    check_against_truth(logits, labels, 1.0, backend, ignore_index=7)
    x = logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(x, labels, ignore_index=7, backend=backend)
    logprobs.sum().backward()
    assert logprobs[[0, 4]].eq(0).all()
    assert entropy[[0, 4]].gt(0.1).all()
    assert x.grad[[0, 4]].eq(0).all()
    assert x.grad[1].ne(0).all()


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_entropy_is_relatively_exact_from_1e_8_to_ln_v(shift, backend, device):
    # Written in units of 2^-9, so that adding 1e4 to a float32 logit is exact and truth belongs to what is stored.
    vocab = 4099
    logits = (make_logits(16, vocab, "tiny_entropy") * 512).round() / 512
    logits = torch.cat((logits, torch.zeros(1, vocab))) + shift
    truth = eager_token_stats(logits, make_labels(logits), dtype=torch.float64).entropy
    assert truth.min() < 1e-7
    assert truth[-1] == pytest.approx(math.log(vocab))
    entropy = entropy_from_logits(logits.to(device), backend=backend)
    assert entropy.ge(0).all()
    torch.testing.assert_close(entropy.cpu().double(), truth, rtol=1e-5, atol=0)


def test_confident_rows_keep_a_clean_gradient(backend, device):
    # Far from 0, exp(x - logsumexp) has 4e-6 of noise where p is 1 to 1e-9; eager subtracts the maximum and has none.
    logits = torch.full((1, 300), 30.0)
    logits[0, 5] = 55.0
    x = logits.to(device, copy=True).requires_grad_()
    logprobs, entropy = logprobs_and_entropy(x, torch.tensor([5], device=device), backend=backend)
    (logprobs + entropy).sum().backward()
    truth = eager_token_stats(logits, torch.tensor([5]), 1.0, torch.ones(1), torch.ones(1), dtype=torch.float64)
    torch.testing.assert_close(x.grad.cpu().double(), truth.grad, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("temperature", [1e-3, 0.05, 50.0])
def test_extreme_temperatures(temperature, backend, device):
    logits = make_logits(TOKENS, 300, device=device)
    check_against_truth(logits, make_labels(logits), temperature, backend)


def test_the_three_functions_agree_and_single_outputs_have_single_gradients(backend, device):
    logits = make_logits(TOKENS, 100, device=device).requires_grad_()
    labels = make_labels(logits.detach())
    logprobs, entropy = logprobs_and_entropy(logits, labels, 0.9, backend=backend)
    alone_logprobs = selective_log_softmax(logits, labels, 0.9, backend=backend)
    alone_entropy = entropy_from_logits(logits, 0.9, backend=backend)
    assert torch.equal(alone_logprobs, logprobs)
    assert torch.equal(alone_entropy, entropy)
    for both, alone in ((logprobs, alone_logprobs), (entropy, alone_entropy)):
        (from_both,) = torch.autograd.grad(both.sum(), logits, retain_graph=True)
        (from_alone,) = torch.autograd.grad(alone.sum(), logits, retain_graph=True)
        assert torch.equal(from_both, from_alone)
        assert from_both.abs().max() > 1e-3


def test_equal_inputs_give_equal_bits(backend, device):
    def run():
        x = make_logits(5, 3001, "normal", torch.bfloat16, device=device).requires_grad_()
        outputs = logprobs_and_entropy(x, make_labels(x.detach()), backend=backend)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        return (*outputs, x.grad)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_gradcheck(backend, device):
    served(backend, torch.float64)
    logits = make_logits(4, 6, "normal", torch.float64, device=device)
    logits[0, :3] = -torch.inf
    labels = torch.tensor([3, 0, -100, 5], device=device)
    finite = logits[:, 3:].clone().requires_grad_()  # numerical differences cannot perturb a -inf

    def function(x):
        return logprobs_and_entropy(torch.cat((logits[:, :3], x), 1), labels, 0.8, backend=backend)

    assert torch.autograd.gradcheck(function, finite)
