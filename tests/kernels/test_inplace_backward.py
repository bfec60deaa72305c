"""Claims about inplace_backward and single_pass, which write over the logits: whoever else needs them gets an error or
the right gradient, never a wrong one; eagerly, in a compiled graph, with compiled autograd, and under saved-tensor
hooks, which switch PyTorch's version check off. Where nobody else does, no second tensor of their size exists."""

import warnings

import pytest
import torch
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch.utils.checkpoint import checkpoint

from aepo.bench.clock import CpuClock
from aepo_kernels import PolicyObjective, logits_loss, logits_policy_loss
from aepo_kernels.testing import make_labels, make_logits

LEAF = make_logits(7, 301, "normal")
LABELS = make_labels(LEAF)
GENERATOR = torch.Generator().manual_seed(0)
OLD, ADVANTAGES = torch.randn(7, generator=GENERATOR) - 5, torch.randn(7, generator=GENERATOR)
POLICY = (LABELS, OLD, ADVANTAGES, torch.ones(7, dtype=torch.bool))
OBJECTIVE = PolicyObjective.preset("aepo", entropy_bonus=0.1)


MODES = ["inplace_backward", "single_pass"]


def policy_loss_of(logits, policy, mode):
    """mode: the option that allows to write over the logits, or None."""
    options = {} if mode is None else {mode: True}
    return logits_policy_loss(logits, *policy, objective=OBJECTIVE, entropy_stats=(1.5, 0.7), **options).loss


# Who else needs the logits: their maker, whose derivative is made of its result, or another user of them, which comes
# before or after the loss.
def made_by(function):
    def loss(x, policy, mode):
        return policy_loss_of(function(x), policy, mode)

    return loss


def saved_before(auxiliary):
    def loss(x, policy, mode):
        logits = 1.5 * x
        other = auxiliary(logits)
        return policy_loss_of(logits, policy, mode) + other

    return loss


def saved_after(x, policy, mode):
    logits = 1.5 * x
    loss = policy_loss_of(logits, policy, mode)
    return loss + logits.logsumexp(-1).square().mean()


def two_losses(x, policy, mode):
    labels, old, advantages, mask = policy
    logits = 1.5 * x
    first = policy_loss_of(logits, policy, mode)
    return first + policy_loss_of(logits, (labels, old + 0.1, advantages, mask), mode)


OTHERS = {
    "exp": made_by(lambda x: x.clamp(max=2).exp()),
    "relu": made_by(torch.relu),
    "sigmoid": made_by(torch.sigmoid),
    "tanh": made_by(torch.tanh),
    "softmax": made_by(lambda x: x.softmax(-1)),
    "sqrt": made_by(lambda x: (x * x + 1).sqrt()),
    "logsumexp before": saved_before(lambda z: z.logsumexp(-1).square().mean()),
    "square before": saved_before(lambda z: (z * z).mean()),
    "view before": saved_before(lambda z: z.view(-1).square().mean()),
    "logsumexp after": saved_after,
    "two losses": two_losses,
}


def gradient(loss, mode, policy=POLICY):
    x = LEAF.clone().requires_grad_()
    loss(x, policy, mode).backward()
    return x.grad


def under_hooks(loss, mode):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        return gradient(loss, mode)


def checkpointed(loss, mode):
    return gradient(lambda *args: checkpoint(loss, *args, use_reentrant=False), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", OTHERS)
def test_eagerly_an_error_says_so(other, mode):
    if (other, mode) == ("logsumexp after", "inplace_backward"):  # whose backward finds the logits still there
        assert torch.equal(gradient(OTHERS[other], mode), gradient(OTHERS[other], None))
        return
    with pytest.raises(RuntimeError, match="by an inplace operation"):
        gradient(OTHERS[other], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_compiled_graph_gives_the_right_gradient(other, compiler, mode):
    torch.compiler.reset()
    compiled = torch.compile(OTHERS[other], fullgraph=True, backend=compiler)
    torch.testing.assert_close(gradient(compiled, mode), gradient(OTHERS[other], None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_other_tracers_give_the_right_gradient(mode):
    def traced(x, *policy):
        return OTHERS["logsumexp before"](x, policy, mode)

    expected = gradient(OTHERS["logsumexp before"], None)
    x = LEAF.clone().requires_grad_()
    aot_function(traced, lambda graph, inputs: make_boxed_func(graph))(x, *POLICY).backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("surroundings", [under_hooks, checkpointed])
@pytest.mark.parametrize("other", OTHERS)
def test_hooks_on_saved_tensors_give_the_right_gradient_and_a_warning(other, surroundings, mode):
    with pytest.warns(UserWarning, match=f"{mode}=True: saved-tensor hooks are active"):
        found = surroundings(OTHERS[other], mode)
    torch.testing.assert_close(found, gradient(OTHERS[other], None), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_where_nobody_else_needs_them_no_second_tensor_exists(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = LEAF.clone().requires_grad_()
        logits = 1.5 * x
        received = []
        logits.register_hook(received.append)
        policy_loss_of(logits, POLICY, mode).backward()
    assert received[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("compiler", ["none", "inductor"])
def test_peak_memory_in_tensors_of_logits(compiler):
    tokens, vocab = 64, 150_000
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 8, generator=g).requires_grad_()
    weight = torch.randn(8, vocab, generator=g)
    zeros = torch.zeros(tokens)
    policy = (torch.randint(vocab, (tokens,), generator=g), zeros - 10, zeros + 1, zeros == 0)
    labels, old, advantages, mask = policy

    def of_a_function(x):
        def loss_fn(logprobs, entropy):
            return -((logprobs - old).exp() * advantages * mask).sum() - entropy.sum()

        return logits_loss(x @ weight, labels, mask, loss_fn, inplace_backward=True).loss

    def peak(loss):
        torch.compiler.reset()
        run = loss if compiler == "none" else torch.compile(loss, fullgraph=True)
        run(x).backward()
        grown = CpuClock().extra_memory(lambda: run(x).backward())
        return pytest.skip("this system does not tell") if grown is None else grown / (tokens * vocab * 4)

    assert peak(lambda x: policy_loss_of(x @ weight, policy, None)) == pytest.approx(2, abs=0.3)
    assert peak(lambda x: policy_loss_of(x @ weight, policy, "inplace_backward")) == pytest.approx(1, abs=0.3)
    assert peak(of_a_function) == pytest.approx(1, abs=0.3)
    assert peak(lambda x: policy_loss_of(x @ weight, policy, "single_pass")) == pytest.approx(1, abs=0.3)
