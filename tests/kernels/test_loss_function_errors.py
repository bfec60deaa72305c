"""Claims about logits_loss and linear_loss: what a function does wrong is an error that names it, in every form of the
call, and a promise of per_token that does not hold is one too."""

import re

import pytest
import torch
from loss_problem import TOKENS, VOCAB, Problem, sapo

from aepo_kernels import PolicyObjective, linear_loss, linear_policy_loss, logits_loss
from aepo_kernels.ops import linear


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(linear.TILING, "cpu", linear.Tiling(recompute=(5, 16), keep=(5, 16), keep_from=TOKENS))


def in_place(logprobs, entropy):
    return logprobs.mul_(2).sum()


def in_place_without_grad(logprobs, entropy):
    with torch.no_grad():
        entropy.zero_()
    return logprobs.sum()


def in_place_and_back(logprobs, entropy):
    with torch.no_grad():  # the values are what they were
        logprobs.mul_(1)
    return logprobs.sum()


def in_place_behind_the_counter(logprobs, entropy):
    logprobs.data.mul_(2)
    return logprobs.sum()


FOREIGN = torch.ones(3, requires_grad=True)
WRONG = [
    (lambda a, b: a, ValueError, r"must return a loss of shape \(\), one number; got shape \(24,\)"),
    (lambda a, b: a.sum()[None], ValueError, r"must return a loss of shape \(\), one number; got shape \(1,\)"),
    (lambda a, b: None, TypeError, r"must return a loss \[\] or \(loss \[\], \{name: number\}\); got a NoneType"),
    (lambda a, b: (a.sum(), {}, 1), TypeError, r"must return a loss \[\] or .*; got a tuple"),
    (lambda a, b: 3.0, TypeError, r"must return a loss \[\] or .*; got a float"),
    (lambda a, b: (a > 0).sum(), TypeError, r"must return a floating-point loss on cpu; got torch\.int64"),
    (lambda a, b: (a.sum(), {"x": a}), TypeError, r"metric 'x' must be one number; got shape \(24,\)"),
    (lambda a, b: (a.sum(), {3: 1.0}), TypeError, r"names of metrics must be texts; got 3"),
    (lambda a, b: (a.sum(), {"loss": 1.0}), ValueError, r"metric 'loss' must have another name"),
    (
        lambda a, b: (a.sum(), {"x": torch.tensor(1j)}),
        TypeError,
        r"metric 'x' must be one number; got torch\.complex64",
    ),
    (lambda a, b: [a.sum(), {}], TypeError, r"must return a loss \[\] or .*; got a list"),
    (lambda a, b: (a.sum(), {"x": "y"}), TypeError, r"metric 'x' must be one number; got str"),
    (lambda a, b: torch.tensor(1.0), ValueError, r"depends on logprobs or entropy; its loss has no gradient"),
    (lambda a, b: a.detach().sum(), ValueError, r"depends on logprobs or entropy; its loss has no gradient"),
    (lambda a, b: a.sum() * torch.nan, ValueError, r"must be finite .* are; got a loss of nan$"),
    (lambda a, b: a.sum() * torch.inf, ValueError, r"must be finite .* are; got a loss of -?inf$"),
    (lambda a, b: (a - a.detach()).abs().sqrt().sum(), ValueError, r"got gradients that are not finite"),
    (in_place, RuntimeError, r"must not write over its arguments: a leaf"),
    (in_place_without_grad, RuntimeError, r"must not write over its arguments; it changed entropy in place"),
    (in_place_and_back, RuntimeError, r"must not write over its arguments; it changed logprobs in place"),
    (in_place_behind_the_counter, RuntimeError, r"must not write over its arguments; it changed logprobs in place"),
    (
        lambda a, b: a.sum() + FOREIGN.sum(),
        ValueError,
        r"uses another tensor that requires a gradient, of shape \(3,\)",
    ),
    (lambda a, b: a.sum() * (2 * FOREIGN)[0], ValueError, r"uses another tensor that requires a gradient"),
    (lambda a, b: FOREIGN.sum(), ValueError, r"uses another tensor that requires a gradient"),
]


@pytest.mark.parametrize("through", ["logits", "recompute", "keep"])
@pytest.mark.parametrize(("loss_fn", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_what_a_function_does_wrong_names_it(loss_fn, error, message, through):
    p = Problem()
    match = re.escape(f"loss_fn {loss_fn.__module__}.{loss_fn.__qualname__}") + ".*" + message
    mask = torch.ones_like(p.mask)
    call, inputs, options = logits_loss, (p.logits.requires_grad_(),), {}
    if through != "logits":
        call, inputs, options = linear_loss, (p.hidden.requires_grad_(), p.weight), {"schedule": through}
        options["per_token"] = True
    with pytest.raises(error, match=match):
        call(*inputs, p.labels, mask, loss_fn, **options)


def test_an_error_of_its_own_comes_through():
    p = Problem()

    def loss_fn(logprobs, entropy):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        logits_loss(p.logits.requires_grad_(), p.labels, p.mask, loss_fn)


def test_nothing_counts():
    p = Problem()
    none = torch.zeros_like(p.mask)
    with pytest.raises(ValueError, match="no token counts in this call: divide by at least 1"):
        logits_loss(p.logits.requires_grad_(), p.labels, none, lambda a, b: (a * none).sum() / none.sum())
    out = logits_loss(p.logits, p.labels, none, lambda a, b: (a * none).sum() / none.sum().clamp(min=1))
    out.loss.backward()
    assert out.loss == 0
    assert not p.logits.grad.any()


def test_nan_in_the_logits_is_not_the_functions_fault(backend):
    p = Problem(torch.float32)
    logits = p.logits.clone()
    logits[p.mask.nonzero()[0]] = torch.nan
    x = logits.requires_grad_()
    loss = logits_loss(x, p.labels, p.mask, lambda a, b: a[p.mask].sum(), backend=backend).loss
    assert loss.isnan()


def test_without_gradients_only_the_loss_is_made():
    p = Problem()
    with torch.no_grad():
        out = logits_loss(p.logits.requires_grad_(), p.labels, p.mask, lambda a, b: a[p.mask].sum())
    assert not out.loss.requires_grad
    out = logits_loss(p.logits.detach(), p.labels, p.mask, lambda a, b: torch.tensor(1.0))
    assert out.loss == 1  # nothing to differentiate, so nothing to miss


def faintly_broken(logprobs, entropy):
    """Only the first token depends on others, and its gradient is a thousandth of theirs."""
    first = torch.zeros_like(logprobs)
    first[0] = 1e-3
    return (logprobs * (1 - first * 1e3)).sum() + (first * logprobs * entropy.sum().detach()).sum()


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda a, b: a.softmax(0).square().sum(),
        lambda a, b: (a * (b - b.mean().detach())).sum(),
        lambda a, b: a.sum().square(),
        lambda a, b: (a * (1 + 0.01 * b.mean().detach())).sum(),  # by a percent
        faintly_broken,
    ],
)
def test_a_broken_promise_is_noticed(loss_fn, small_tiles):
    p = Problem()
    with pytest.raises(ValueError, match=r"must act on each token alone, as per_token=True promises: the gradient of"):
        linear_loss(p.hidden.requires_grad_(), p.weight, p.labels, p.mask, loss_fn, per_token=True, schedule="keep")


@pytest.mark.parametrize("label", [-1, VOCAB])
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_a_label_out_of_range(schedule, label):
    p = Problem()
    labels = p.labels.masked_fill(p.mask, label)
    hidden, options = p.hidden.requires_grad_(), {"schedule": schedule}
    with pytest.raises(ValueError, match=f"label {label} at position"):
        linear_loss(hidden, p.weight, labels, p.mask, sapo(p), per_token=True, **options)
    dapo = PolicyObjective.preset("dapo")
    with pytest.raises(ValueError, match=f"label {label} at position"):
        linear_policy_loss(hidden, p.weight, labels, p.old, p.advantages, p.mask, objective=dapo, **options)


def test_bad_arguments():
    p = Problem()
    logits, hidden = p.logits.requires_grad_(), p.hidden
    with pytest.raises(TypeError, match=r"loss_fn must be a function \(logprobs, entropy\) -> loss; got int"):
        logits_loss(logits, p.labels, p.mask, 3)
    with pytest.raises(ValueError, match=r"mask must have shape \(24,\)"):
        logits_loss(logits, p.labels, p.mask[1:], sapo(p))
    with pytest.raises(ValueError, match=r"schedule='keep' needs .*: per_token=True promises that of loss_fn"):
        linear_loss(hidden, p.weight, p.labels, p.mask, sapo(p), schedule="keep")
    with pytest.raises(TypeError, match="per_token must be a bool; got str"):
        linear_loss(hidden, p.weight, p.labels, p.mask, sapo(p), per_token="yes")
    with pytest.raises(ValueError, match="label 61 at position"):
        logits_loss(logits, p.labels.masked_fill(p.mask, VOCAB), p.mask, sapo(p))
