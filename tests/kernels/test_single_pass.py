"""Claims about single_pass=True of logits_policy_loss: loss, metrics and gradient are those of two passes, on every
backend; the gradient lies over the logits after the forward; and whoever needs the logits then gets an error."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from aepo_kernels import PolicyObjective, logits_policy_loss
from aepo_kernels.objective import PRESETS
from aepo_kernels.testing import DTYPES, make_labels, make_logits

TOKENS, VOCAB = 14, 131
PER_TOKEN = [name for name in PRESETS if PolicyObjective.preset(name).ratio_level == "token"]


def problem(dtype=torch.float32, objective=None, seed=0, device="cpu"):
    """Logits, and keyword arguments of logits_policy_loss."""
    g = torch.Generator().manual_seed(seed)
    logits = make_logits(TOKENS, VOCAB, "normal", dtype, seed)
    labels = make_labels(logits, seed)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, labels[:, None])[:, 0]
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def noise(scale):
        return (scale * torch.randn(TOKENS, generator=g, dtype=torch.float64)).to(acc)

    o = objective or PolicyObjective.preset("dapo")
    tensors = {
        "labels": labels,
        "old_logprobs": exact.to(acc) + noise(0.4),
        "advantages": noise(1.0),
        "mask": torch.rand(TOKENS, generator=g) < 0.7,
        "ref_logprobs": exact.to(acc) + noise(0.3) if o.kl_coef else None,
        "rollout_logprobs": exact.to(acc) + noise(0.3) if o.importance_cap else None,
        "cu_seqlens": torch.tensor([0, 3, 9, 14]) if o.needs_sequences else None,
    }
    tensors = {name: x if x is None else x.to(device) for name, x in tensors.items()}
    return logits.to(device), {
        **tensors,
        "objective": o,
        "entropy_stats": (1.5, 0.7) if o.entropy_advantage else None,
    }


def loss_of(logits, call, factor=1.0, **options):
    leaf = logits.clone().requires_grad_()
    out = logits_policy_loss(leaf * 1, **call, **options)
    (factor * out.loss).backward()
    return out, leaf.grad


FULL = {"entropy_bonus": 0.05, "kl_coef": 0.1, "importance_cap": 2.0}


@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float16], ids=str)
@pytest.mark.parametrize("name", [*PER_TOKEN, "everything"])
def test_the_same_as_two_passes(name, dtype, factor, backend, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no float64 kernels")
    o = PolicyObjective.preset("aepo", **FULL) if name == "everything" else PolicyObjective.preset(name)
    logits, call = problem(dtype, o, device=device)
    logits[~call["mask"]] = torch.nan  # such rows are not read
    two, expected = loss_of(logits, call, factor, backend=backend)
    one, grad = loss_of(logits, call, factor, backend=backend, single_pass=True)
    assert one.metrics.keys() == two.metrics.keys()
    if backend == "cpu":  # the same sums; a gradient's exponentials stand about another maximum
        assert torch.equal(one.loss, two.loss)
        assert all(torch.equal(value, two.metrics[key]) for key, value in one.metrics.items())
    # A gradient that the backward scales has been rounded once before.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad, expected, rtol=3 * eps, atol=3 * eps * expected.abs().max().item())
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-6)
    assert not grad[~call["mask"]].any()
    assert grad[call["mask"]].any()


def test_the_gradient_lies_over_the_logits_after_the_forward(backend, device):
    logits, call = problem(device=device)
    expected = loss_of(logits, call, backend=backend)[1]
    x = logits.clone().requires_grad_()
    z = x * 1
    out = logits_policy_loss(z, **call, single_pass=True, backend=backend)
    torch.testing.assert_close(z.detach(), expected, rtol=1e-5, atol=1e-8)
    (grad,) = torch.autograd.grad(out.loss, x)
    assert torch.equal(grad, z.detach())


def test_a_leaf_is_overwritten_too(backend):
    logits, call = problem()
    x = logits.clone().requires_grad_()
    logits_policy_loss(x, **call, single_pass=True, backend=backend).loss.backward()
    assert x.grad.data_ptr() == x.data_ptr()


def test_a_slice_of_a_batch(backend, device):
    """[B, L, V] without its last position has no single row stride."""
    logits, call = problem(device=device)
    per_token = {name: x for name, x in call.items() if isinstance(x, torch.Tensor)}
    call = call | {name: x.view(2, 7) for name, x in per_token.items()}
    whole = torch.cat((logits.view(2, 7, VOCAB), torch.full((2, 1, VOCAB), 7.0, device=device)), 1)
    expected = loss_of(whole[:, :-1].contiguous(), call, backend=backend)[1]
    x = whole.clone().requires_grad_()
    z = x * 1
    logits_policy_loss(z[:, :-1], **call, single_pass=True, backend=backend).loss.backward()
    torch.testing.assert_close(x.grad[:, :-1], expected, rtol=1e-5, atol=1e-8)
    assert not x.grad[:, -1].any()
    assert (z[:, -1] == 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": PolicyObjective.preset("aepo")},
            "entropy_stats with an entropy-aware advantage, and ratio_level",
        ),
        (
            {"objective": PolicyObjective.preset("gspo"), "cu_seqlens": torch.tensor([0, TOKENS])},
            "single_pass=True needs coefficients that follow from each token alone",
        ),
    ],
)
def test_a_token_must_stand_for_itself(options, message):
    logits, call = problem()
    for x in (logits, logits.clone().requires_grad_()):
        with pytest.raises(ValueError, match=message):
            logits_policy_loss(x, **{**call, **options}, single_pass=True)


def test_float16_is_refused():
    """The gradient of a mean over 65,536 tokens, to be scaled by as much, would have lost all but its labels."""
    logits, call = problem(torch.float16)
    with pytest.raises(
        ValueError, match="rounds the gradient before the loss scale is known, which float16 cannot carry"
    ):
        logits_policy_loss(logits.requires_grad_(), **call, single_pass=True)


def test_what_is_no_flag_and_no_label():
    logits, call = problem()
    with pytest.raises(TypeError, match="single_pass must be a bool; got str"):
        logits_policy_loss(logits, **call, single_pass="no")
    call["labels"] = call["labels"].masked_fill(call["mask"], VOCAB)
    with pytest.raises(ValueError, match=f"label {VOCAB} at position"):
        logits_policy_loss(logits.requires_grad_(), **call, single_pass=True)


def test_metrics_are_numbers_of_their_own(backend):
    logits, call = problem()
    for options in ({}, {"single_pass": True}):
        out = logits_policy_loss(logits.clone().requires_grad_() * 1, **call, backend=backend, **options)
        before = {key: value.clone() for key, value in out.metrics.items()}
        assert not any(value.requires_grad for value in out.metrics.values())
        loss = out.loss
        loss /= 4
        assert all(torch.equal(value, before[key]) for key, value in out.metrics.items())


def test_without_a_gradient_nothing_is_written(backend):
    logits, call = problem()
    before = logits.clone()
    out = logits_policy_loss(logits, **call, single_pass=True, backend=backend)
    with torch.no_grad():
        again = logits_policy_loss(logits.requires_grad_(), **call, single_pass=True, backend=backend)
    assert torch.equal(logits, before)
    assert torch.equal(out.loss, again.loss)
    assert not again.loss.requires_grad


def test_who_saved_the_logits_before_gets_an_error():
    logits, call = problem()
    x = logits.clone().requires_grad_()
    loss = logits_policy_loss(x.tanh(), **call, single_pass=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("view", [lambda z: z, lambda z: z[None][0], lambda z: z.view(-1, VOCAB)])
def test_who_uses_the_logits_afterwards_gets_an_error(view):
    logits, call = problem()
    x = logits.clone().requires_grad_()
    z = x * 1
    loss = logits_policy_loss(view(z), **call, single_pass=True).loss
    with pytest.raises(RuntimeError, match=r"used after logits_policy_loss\(single_pass=True\)"):
        (loss + z.logsumexp(-1).sum()).backward()


def test_views_that_cannot_be_marked_work():
    logits, call = problem()
    expected = loss_of(logits, call)[1]
    x = logits.clone().requires_grad_()
    part, _ = torch.cat((x, x.detach())).split(TOKENS)
    logits_policy_loss(part, **call, single_pass=True).loss.backward()
    torch.testing.assert_close(x.grad, expected)


def test_a_second_backward_is_an_error():
    logits, call = problem()
    x = logits.clone().requires_grad_()
    loss = logits_policy_loss(x * 1, **call, single_pass=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_change_between_forward_and_backward_is_an_error():
    logits, call = problem()
    z = logits.clone().requires_grad_() * 1
    loss = logits_policy_loss(z, **call, single_pass=True).loss
    z.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_hooks_the_gradient_gets_a_tensor_of_its_own():
    logits, call = problem()
    expected = loss_of(logits, call)[1]
    x = logits.clone().requires_grad_()

    def loss(x):
        z = x.exp().log()  # the logarithm saves z's source, the exponential z's own values
        return logits_policy_loss(z, **call, single_pass=True).loss

    with pytest.warns(UserWarning, match="single_pass=True: saved-tensor hooks are active"):
        checkpoint(loss, x, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)


def test_hooks_and_a_second_backward():
    """Nobody checks versions there, and the gradient has been scaled in place."""
    logits, call = problem()
    x = logits.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu(), pytest.warns(UserWarning, match="saved-tensor hooks are active"):
        loss = logits_policy_loss(x * 1, **call, single_pass=True).loss
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="scaled by an inplace operation and handed out"):
        loss.backward()


def test_under_hooks_the_logits_are_left_alone():
    logits, call = problem()
    expected = loss_of(logits, call)[1]
    x = logits.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        z = x * 1
        with pytest.warns(UserWarning, match="saved-tensor hooks are active"):
            loss = logits_policy_loss(z, **call, single_pass=True).loss
        (loss + 0 * z.sum()).backward()
    torch.testing.assert_close(x.grad, expected)


def test_parameters_and_overlapping_rows_are_refused():
    logits, call = problem()
    table = torch.nn.Parameter(logits)
    for x in (table, table.view(TOKENS, VOCAB), table[:, :], table[None][0]):
        with pytest.raises(ValueError, match="single_pass=True would write the gradient over a parameter"):
            logits_policy_loss(x, **call, single_pass=True)
    with pytest.raises(ValueError, match="single_pass=True needs rows of their own"):
        logits_policy_loss(logits[:1].expand(TOKENS, VOCAB), **call, single_pass=True)


def test_equal_inputs_give_equal_bits(backend, device):
    logits, call = problem(torch.bfloat16, device=device)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out, grad = loss_of(logits, call, backend=backend, single_pass=True)
        runs.append((out.loss.detach(), grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_on_a_token_that_counts_shows(backend):
    logits, call = problem()
    logits[call["mask"].nonzero()[0]] = torch.nan
    out, grad = loss_of(logits, call, backend=backend, single_pass=True)
    assert out.loss.isnan()
    assert grad[call["mask"].nonzero()[0]].isnan().all()
