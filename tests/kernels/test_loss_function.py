"""Claims about logits_loss and linear_loss: native objectives written as functions give the same loss and gradients in
float64, on every backend and schedule; published losses of other kinds equal autograd through log_softmax; what is off
the mask is neither read nor differentiated. What a function does wrong is in test_loss_function_errors.py."""

import pytest
import torch
from loss_problem import (
    HIDDEN,
    OTHERS,
    PRESETS,
    TOKENS,
    VOCAB,
    Problem,
    assert_equal,
    run_linear,
    run_logits,
    sapo,
    through_autograd,
    trust_region,
)
from torch.utils.checkpoint import checkpoint

from aepo_kernels import PolicyObjective, linear_loss, linear_policy_loss, logits_loss, logits_policy_loss, policy_loss
from aepo_kernels.ops import linear
from aepo_kernels.testing import make_logits


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_native_objective_written_as_a_function(name, inplace, backend):
    if backend == "triton":
        pytest.skip("Triton has no float64 kernels")
    p = Problem()
    native = run_logits(
        p, lambda x: logits_policy_loss(x, p.labels, p.old, p.advantages, p.mask, backend=backend, **p.native(name))
    )
    options = {"inplace_backward": inplace, "backend": backend}
    written = run_logits(p, lambda x: logits_loss(x, p.labels, p.mask, p.written(name), **options))
    assert_equal(written, native)
    assert native[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_a_native_objective_as_the_papers_print_it(name, backend):
    if backend == "triton":
        pytest.skip("Triton has no float64 kernels")
    p = Problem()
    inputs = (p.labels, p.old, p.advantages, p.mask)
    native = run_logits(p, lambda x: logits_policy_loss(x, *inputs, backend=backend, **p.native(name)))
    written = run_logits(p, lambda x: logits_loss(x, p.labels, p.mask, p.as_printed(name), backend=backend))
    assert_equal(written, native)


@pytest.mark.parametrize("name", OTHERS)
def test_another_loss_equals_autograd(name, backend, device):
    dtype = torch.float32 if backend == "triton" else torch.float64
    p = Problem(dtype, device=device)
    loss_fn = OTHERS[name](p)
    got = run_logits(p, lambda x: logits_loss(x, p.labels, p.mask, loss_fn, temperature=0.8, backend=backend), dtype)
    in_double = Problem(torch.float64, device=device)
    if dtype != torch.float64:
        in_double.logits, in_double.old, in_double.advantages = p.logits.double(), p.old.double(), p.advantages.double()
    expected = through_autograd(p, OTHERS[name](in_double), in_double.logits, temperature=0.8)
    assert_equal(got, expected, rtol=1e-11 if dtype == torch.float64 else 2e-5)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(linear.TILING, "cpu", linear.Tiling(recompute=(5, 16), keep=(5, 16), keep_from=TOKENS))


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
@pytest.mark.parametrize("name", [*PRESETS, "sapo", "trust region"])
def test_from_hidden_states(name, schedule, small_tiles):
    p = Problem()
    options = {"temperature": 0.8, "softcap": 4.0}
    if name in PRESETS:
        if schedule == "keep" and name == "gspo":
            pytest.skip("one ratio per sequence needs whole sequences")
        stats = {"entropy_stats": (1.0, 0.5)} if name != "gspo" else {}
        inputs = (p.labels, p.old, p.advantages, p.mask)
        expected = run_linear(p, lambda h, w: linear_policy_loss(h, w, *inputs, **p.native(name, **stats), **options))
        loss_fn = p.written(name, **stats)
    else:
        loss_fn = OTHERS[name](p)
        expected = through_autograd(p, loss_fn, p.hidden, p.weight, **options)
    options |= {"schedule": schedule, "per_token": schedule == "keep"}
    got = run_linear(p, lambda h, w: linear_loss(h, w, p.labels, p.mask, loss_fn, **options))
    assert_equal(got, expected, rtol=1e-11)


def test_keep_is_taken_by_itself_only_for_a_promise(small_tiles, monkeypatch):
    p, calls = Problem(), []

    def loss_fn(logprobs, entropy):
        calls.append((logprobs != 0).sum().item())
        return (logprobs * p.advantages)[p.mask].sum()

    p.hidden.requires_grad_()

    def count(**options):
        calls.clear()
        linear_loss(p.hidden, p.weight, p.labels, p.mask, loss_fn, **options)
        return list(calls)

    counted = p.mask.sum().item()
    assert count() == [counted]
    assert count(per_token=True) == [*(min(5 * (i + 1), counted) for i in range(-(-counted // 5))), counted]
    assert count(per_token=True, schedule="recompute") == [counted]
    monkeypatch.setitem(linear.TILING, "cpu", linear.TILING["cpu"]._replace(keep_from=TOKENS + 1))
    assert count(per_token=True) == [counted]
    p.hidden.requires_grad_(False)
    assert count(per_token=True, schedule="keep") == [counted]  # nobody needs a gradient


def test_only_needed_gradients_are_made(small_tiles):
    p = Problem()
    loss_fn = sapo(p)
    for schedule in ("keep", "recompute"):
        out = linear_loss(
            p.hidden.requires_grad_(), p.weight, p.labels, p.mask, loss_fn, per_token=True, schedule=schedule
        )
        assert [x is None for x in torch.autograd.grad(out.loss, (p.hidden,))] == [False]
        assert out.loss.grad_fn.next_functions  # the weight, which needs none, is no error


def test_upstream_gradient_and_metrics(backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    p = Problem(dtype)

    def loss_fn(logprobs, entropy):
        ratio = (logprobs - p.old).exp()
        return (ratio * p.advantages)[p.mask].mean(), {"ratio": ratio[p.mask].mean(), "n": 3, "share": 0.5}

    x = p.logits.clone().requires_grad_()
    out = logits_loss(x, p.labels, p.mask, loss_fn, backend=backend)
    assert set(out.metrics) == {"loss", "ratio", "n", "share"}
    assert not any(value.requires_grad or value.shape for value in out.metrics.values())
    assert out.metrics["loss"] == out.loss
    assert out.metrics["n"] == 3
    (once,) = torch.autograd.grad(out.loss, x, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * out.loss, x)
    torch.testing.assert_close(thrice, 3 * once)


def test_what_is_masked_has_no_part(backend, device):
    """NaN logits, labels out of range, and gradients of inf and NaN off the mask."""
    p = Problem(torch.float32, device=device)
    logits, labels = p.logits.clone(), p.labels.clone()
    off = ~p.mask
    logits[off], labels[off] = torch.nan, 10**6
    seen = []

    def loss_fn(logprobs, entropy):
        seen.append((logprobs[off], entropy[off]))
        return logprobs.sum() + (entropy * 0.1).sum() + (logprobs - logprobs.detach())[off].abs().sqrt().sum()

    x = logits.requires_grad_()
    logits_loss(x, labels, p.mask, loss_fn, backend=backend).loss.backward()
    assert all(not part.any() for pair in seen for part in pair)
    assert not x.grad[off].any()
    assert x.grad[p.mask].isfinite().all()
    assert x.grad[p.mask].any(-1).all()


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.float64])
def test_masks_of_zeros_and_ones(kind, backend):
    p = Problem(torch.float32)
    run = lambda mask: run_logits(  # noqa: E731
        p, lambda x: logits_loss(x, p.labels, mask, trust_region(p), backend=backend), torch.float32
    )
    for got, expected in zip(run(p.mask.to(kind)), run(p.mask), strict=True):
        assert torch.equal(got, expected)
    if kind.is_floating_point:
        with pytest.raises(ValueError, match=r"mask must hold 0 and 1 alone where it is floating point; got 0\.5"):
            run(p.mask.to(kind) * 0.5)


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4)])
def test_leading_dimensions_reach_the_function(shape):
    p = Problem()

    def loss_fn(logprobs, entropy):
        assert logprobs.shape == entropy.shape == shape
        return (logprobs * p.advantages.view(shape) * p.mask.view(shape)).sum() - entropy.sum() / 7

    flat = run_logits(
        p,
        lambda x: logits_loss(x, p.labels, p.mask, lambda a, b: loss_fn(a.view(shape), b.view(shape))),
    )
    labels, mask = p.labels.view(shape), p.mask.view(shape)
    shaped = run_logits(p, lambda x: logits_loss(x.view(*shape, VOCAB), labels, mask, loss_fn))
    assert_equal(shaped, flat, 0)
    hidden = p.hidden.view(*shape, HIDDEN)
    for schedule in ("keep", "recompute"):
        out = linear_loss(hidden, p.weight.requires_grad_(), labels, mask, loss_fn, per_token=True, schedule=schedule)
        torch.testing.assert_close(out.loss.detach(), flat[0])


def test_a_single_token_without_dimensions():
    """logits [V], label []: the log-prob itself is a loss."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    label, mask = torch.tensor(3), torch.tensor(True)
    logits_loss(logits, label, mask, lambda logprob, entropy: logprob).loss.backward()
    truth = torch.autograd.functional.jacobian(lambda x: torch.log_softmax(x, -1)[3], logits.detach())
    torch.testing.assert_close(logits.grad, truth)


def test_no_tokens():
    empty = torch.zeros(0)
    logits = torch.zeros(0, 5, requires_grad=True)
    out = logits_loss(logits, empty.long(), empty.bool(), lambda logprobs, entropy: logprobs.sum())
    out.loss.backward()
    assert out.loss == 0
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_bias(schedule, small_tiles):
    p = Problem()
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    loss_fn = trust_region(p)
    options = {"bias": bias, "per_token": True, "schedule": schedule, "temperature": 0.8}
    out = linear_loss(p.hidden, p.weight, p.labels, p.mask, loss_fn, **options)
    log_p = ((p.hidden @ p.weight.T + bias) / 0.8).log_softmax(-1)
    expected = loss_fn(log_p.gather(-1, p.labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))
    assert_equal(torch.autograd.grad(out.loss, bias), torch.autograd.grad(expected, bias), rtol=1e-11)


def test_a_compiled_call_is_one_graph_also_where_keep_begins(small_tiles):
    p = Problem()
    loss_fn = sapo(p)

    def loss(h):
        return linear_loss(h, p.weight, p.labels, p.mask, loss_fn, per_token=True).loss

    torch._dynamo.reset()
    hidden = p.hidden.requires_grad_()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="eager")(hidden), loss(hidden))


def test_what_comes_back_has_the_dtype_of_the_sums():
    p = Problem(torch.float32)
    logits = p.logits.requires_grad_()
    assert logits_loss(logits, p.labels, p.mask, lambda a, b: a.sum().double()).loss.dtype == torch.float32
    assert logits_loss(logits, p.labels, p.mask, lambda a, b: a.sum().bfloat16()).loss.dtype == torch.float32
    p = Problem()
    out = logits_loss(p.logits.requires_grad_(), p.labels, p.mask, lambda a, b: (a.sum(), {"tenth": 0.1}))
    assert out.metrics["tenth"] == 0.1
    assert out.metrics["tenth"].dtype == torch.float64


def test_grad_mode_is_the_callers():
    p, seen = Problem(), []

    def loss_fn(logprobs, entropy):
        seen.append((torch.is_grad_enabled(), logprobs.requires_grad))
        return logprobs.sum()

    logits = p.logits.requires_grad_()
    with torch.no_grad():
        logits_loss(logits, p.labels, p.mask, loss_fn)
    with torch.inference_mode():
        logits_loss(logits, p.labels, p.mask, loss_fn)
        linear_loss(p.hidden, p.weight, p.labels, p.mask, loss_fn)
    logits_loss(logits, p.labels, p.mask, loss_fn)
    assert seen == [(False, False)] * 3 + [(True, True)]


def test_a_graph_of_many_paths_is_walked_once():
    p = Problem()

    def doubled(logprobs, entropy):
        y = logprobs.sum()
        for _ in range(60):  # 2^60 paths
            y = y / 2 + y / 2
        return y

    assert logits_loss(p.logits.requires_grad_(), p.labels, p.mask, doubled).loss.isfinite()


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoints(schedule, reentrant, small_tiles):
    p = Problem()
    loss_fn = sapo(p)

    def loss(h, w):
        return linear_loss(h, w, p.labels, p.mask, loss_fn, per_token=True, schedule=schedule).loss

    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    assert_equal([x.grad for x in leaves], expected)


def test_the_gradient_of_16_bit_logits_is_that_of_the_preset(backend, device):
    """Bit for bit: the function's part is the same float32 numbers."""
    logits = make_logits(TOKENS, VOCAB, "normal", torch.bfloat16, device=device)
    p = Problem(torch.float32, device=device)
    native = logits.clone().requires_grad_()
    inputs = (p.labels, p.old, p.advantages, p.mask)
    objective = PolicyObjective.preset("dapo")
    logits_policy_loss(native, *inputs, objective=objective, backend=backend).loss.backward()

    def loss_fn(logprobs, entropy):
        return policy_loss(logprobs, *inputs[1:], objective=objective, backend=backend)

    written = logits.clone().requires_grad_()
    logits_loss(written, p.labels, p.mask, loss_fn, inplace_backward=True, backend=backend).loss.backward()
    assert torch.equal(written.grad, native.grad)
    assert written.grad.data_ptr() == written.data_ptr()


def test_keep_breaks_a_compiled_graph_and_is_right():
    p = Problem()
    loss_fn = sapo(p)

    def run(h, w):
        return linear_loss(h * 2, w, p.labels, p.mask, loss_fn, per_token=True, schedule="keep").loss * 3

    leaves = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    expected = torch.autograd.grad(run(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(run, backend="aot_eager")(*leaves), leaves)
    assert_equal(got, expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="_keep"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves)
