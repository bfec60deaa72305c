"""Claims about weights= and counts= of the policy losses: counts make loss, gradients and metrics those of the tokens
repeated so often, for every objective and aggregation; weights are the tokens' shares in the loss as they are;
from logits and from hidden states both are the same, and what does not fit is refused by name."""

import dataclasses

import pytest
import torch
from policy_oracle import make_batch

from aepo_kernels import PolicyObjective, linear_policy_loss, logits_policy_loss, policy_loss
from aepo_kernels.objective import AGGREGATIONS, PRESETS
from aepo_kernels.ops import linear
from aepo_kernels.testing import make_labels, make_logits

FULL = PolicyObjective.preset("aepo", entropy_bonus=0.05, kl_coef=0.1, importance_cap=2.0)
OBJECTIVES = {
    **{name: PolicyObjective.preset(name) for name in PRESETS},
    **{how: dataclasses.replace(FULL, aggregation=how) for how in AGGREGATIONS},
    "sequences": dataclasses.replace(FULL, ratio_level="sequence", aggregation="seq-mean-token-mean", kl_coef=0.0),
}


def arguments(b, o, denominator=None):
    """Keyword arguments of policy_loss."""
    return {
        "old_logprobs": b.old_logprobs,
        "advantages": b.advantages,
        "mask": b.mask,
        "objective": o,
        "ref_logprobs": b.ref_logprobs if o.kl_coef else None,
        "rollout_logprobs": b.rollout_logprobs if o.importance_cap else None,
        "cu_seqlens": b.cu_seqlens,
        "denominator": 7.0 if o.aggregation == "constant" and denominator is None else denominator,
    }


def repeated(b, counts):
    """The batch with every token as often as it counts; which token each of them was."""
    index = torch.arange(len(counts)).repeat_interleave(counts)
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))[b.cu_seqlens]
    fields = {f.name: getattr(b, f.name) for f in dataclasses.fields(b) if f.name != "cu_seqlens"}
    return dataclasses.replace(b, cu_seqlens=bounds, **{name: x[index] for name, x in fields.items()}), index


def run(b, backend, **call):
    logprobs, entropy = (x.clone().requires_grad_() for x in (b.logprobs, b.entropy))
    out = policy_loss(logprobs, entropy=entropy, backend=backend, **call)
    out.loss.backward()
    grad_entropy = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return out, logprobs.grad, grad_entropy


@pytest.mark.parametrize("name", OBJECTIVES)
def test_counts_are_repeated_tokens(name, backend, device):
    o = OBJECTIVES[name]
    b = make_batch(seed=3).to(torch.float32 if backend == "triton" else torch.float64)
    counts = torch.randint(0, 4, b.mask.shape, generator=torch.Generator().manual_seed(1))
    more, index = repeated(b, counts)
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if backend == "triton" else {"rtol": 1e-11, "atol": 1e-13}
    b, more, counts, index = b.to(b.logprobs.dtype, device), more.to(b.logprobs.dtype, device), counts.to(device), index
    expected, *gradients = run(more, backend, **arguments(more, o))
    for given in (counts, counts.to(b.logprobs.dtype)):
        out, *got = run(b, backend, counts=given, **arguments(b, o))
        torch.testing.assert_close(out.loss, expected.loss, **tolerance)
        for x, of_copies in zip(got, gradients, strict=True):
            summed = torch.zeros_like(x).index_add_(0, index.to(device), of_copies)
            torch.testing.assert_close(x, summed, **tolerance)
        assert out.metrics.keys() == expected.metrics.keys()
        for key, value in out.metrics.items():
            torch.testing.assert_close(value, expected.metrics[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["aepo", "cispo", "gppo", "token-mean"])
def test_weights_are_shares(name, backend, device):
    """The loss is linear in them: the sum of the losses of single tokens."""
    o = OBJECTIVES[name]
    dtype = torch.float32 if backend == "triton" else torch.float64
    b = make_batch(seed=4).to(dtype, device)
    weights = torch.rand(b.mask.shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    weights[5], weights[~b.mask] = 0, torch.nan
    stats = (1.0, 2.0) if o.entropy_advantage else None
    call = arguments(b, o) | {"entropy_stats": stats}
    out, grad_logprobs, grad_entropy = run(b, backend, weights=weights, **call)
    loss, grads = 0, torch.zeros(2, *b.mask.shape, dtype=dtype, device=device)
    for t in b.mask.nonzero()[:, 0].tolist():
        only = torch.zeros_like(b.mask)
        only[t] = True
        one, *gradients = run(b, backend, **{**call, "mask": only, "denominator": 1.0})
        loss = loss + weights[t] * one.loss.detach()
        grads += weights[t] * torch.stack(gradients)
    tolerance = {"rtol": 3e-5, "atol": 1e-5} if backend == "triton" else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(out.loss.detach(), loss, **tolerance)
    torch.testing.assert_close(torch.stack((grad_logprobs, grad_entropy)), grads, **tolerance)
    assert out.metrics["valid_tokens"] == b.mask.sum()  # with the one of weight 0


def test_weights_and_counts_together(backend, device):
    """Weights are the whole share; counts say what is measured."""
    b = make_batch(seed=5).to(torch.float32, device)
    counts = torch.arange(len(b.mask), device=device) % 3
    weights = torch.where(counts > 0, 0.1 * counts + 0.3, 0.0)
    call = arguments(b, OBJECTIVES["dapo"])
    both, grad, _ = run(b, backend, weights=weights, counts=counts, **call)
    alone, expected, _ = run(b, backend, weights=weights, **call)
    measured, *_ = run(b, backend, counts=counts, **call)
    torch.testing.assert_close(both.loss, alone.loss)
    torch.testing.assert_close(grad, expected)
    for key, value in both.metrics.items():
        if key != "loss":
            torch.testing.assert_close(value, measured.metrics[key])
    assert both.metrics["valid_tokens"] == counts[b.mask].sum()


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(linear.TILING, "cpu", linear.Tiling(recompute=(4, 16), keep=(4, 16), keep_from=10**9))


@pytest.mark.parametrize("given", ["weights", "counts", "both"])
def test_from_logits_and_hidden_states(given, small_tiles):
    b = make_batch(seed=6)
    tokens = len(b.mask)
    hidden, weight = make_logits(tokens, 6, "normal", torch.float64), make_logits(40, 6, "normal", torch.float64, 1)
    logits = hidden @ weight.T
    labels = make_labels(logits)
    counts = torch.arange(tokens) % 3
    weights = torch.where(counts > 0, 0.1 * counts + 0.3, 0.0).double()
    options = {"weights": {"weights": weights}, "counts": {"counts": counts}}
    options = options.get(given, {"weights": weights, "counts": counts})
    logprobs = torch.log_softmax(logits, -1)
    call = arguments(b, OBJECTIVES["token-mean"]) | {"entropy_stats": (1.0, 2.0)} | options
    call |= {"old_logprobs": logprobs.gather(-1, labels[:, None])[:, 0] + 0.1 * b.logprobs}

    def stats(z):
        log_p = torch.log_softmax(z, -1)
        return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logp, entropy = stats(leaves[0] @ leaves[1].T)
    expected = policy_loss(logp, entropy=entropy, **call)
    gradients = torch.autograd.grad(expected.loss, leaves)
    losses = {
        "logits": lambda h, w: logits_policy_loss(h @ w.T, labels, **call),
        "in place": lambda h, w: logits_policy_loss(h @ w.T, labels, inplace_backward=True, **call),
        "single pass": lambda h, w: logits_policy_loss(h @ w.T, labels, single_pass=True, **call),
        "keep": lambda h, w: linear_policy_loss(h, w, labels, schedule="keep", **call),
        "recompute": lambda h, w: linear_policy_loss(h, w, labels, schedule="recompute", **call),
    }
    for name, loss in losses.items():
        out = loss(*leaves)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: name + m)
        for got, truth in zip(torch.autograd.grad(out.loss, leaves), gradients, strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: name + m)
        assert out.metrics["valid_tokens"] == expected.metrics["valid_tokens"]


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", ["grpo", "aepo", "gppo", "dapo", "cispo"])
def test_a_tree_is_its_paths(name, how):
    """Three paths share four tokens, two of them the next three, with advantages of both signs, as docs/kernels.md says
    it."""
    parts = [torch.arange(4), torch.arange(4, 7), torch.arange(7, 12), torch.arange(12, 17), torch.arange(17, 20)]
    paths = [torch.cat([parts[i] for i in which]) for which in ((0, 1, 2), (0, 1, 3), (0, 4))]
    path_advantages = torch.tensor([1.3, -0.9, 0.4], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(20, generator=g, dtype=torch.float64)
    logprobs = (old + 0.5 * torch.randn(20, generator=g, dtype=torch.float64)).requires_grad_()
    entropy = torch.rand(20, generator=g, dtype=torch.float64)
    o = PolicyObjective.preset(name, aggregation=how)

    every = torch.cat(paths)
    lengths = torch.tensor([len(path) for path in paths])
    stats = (entropy[every].mean(), entropy[every].std()) if o.entropy_advantage else None
    unrolled = policy_loss(
        logprobs[every], old[every], path_advantages.repeat_interleave(lengths), torch.ones_like(every),
        objective=o, entropy=entropy[every], entropy_stats=stats,
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
    )  # fmt: skip
    (expected,) = torch.autograd.grad(unrolled.loss, logprobs)

    share = 1 / (lengths.sum() if how == "token-mean" else len(paths) * lengths).double()
    advantages, counts = torch.zeros(2, 20, dtype=torch.float64), torch.zeros(2, 20)
    for path, advantage, weight in zip(paths, path_advantages, share.expand(3), strict=True):
        row = int(advantage < 0)
        advantages[row, path] += weight * advantage
        counts[row, path] += 1
    tree = policy_loss(
        logprobs.expand(2, 20).flatten(), old.repeat(2), advantages.flatten(), counts.flatten() > 0,
        objective=o, entropy=entropy.repeat(2), entropy_stats=stats,
        weights=(counts > 0).double().flatten(), counts=counts.flatten(),
        cu_seqlens=torch.tensor([0, 40]),
    )  # fmt: skip
    (got,) = torch.autograd.grad(tree.loss, logprobs)
    torch.testing.assert_close(tree.loss, unrolled.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    for key, value in tree.metrics.items():
        torch.testing.assert_close(value, unrolled.metrics[key], rtol=1e-12, atol=1e-14, msg=lambda m, k=key: k + m)


WRONG = [
    ({"counts": -1}, ValueError, r"counts must be whole numbers >= 0; got -1\.0 at position 3"),
    ({"counts": 0.5}, ValueError, r"counts must be whole numbers >= 0; got 0\.5 at position 3"),
    ({"counts": torch.nan}, ValueError, r"counts must be whole numbers >= 0; got nan at position 3"),
    ({"counts": torch.inf}, ValueError, r"counts must be whole numbers >= 0; got inf at position 3"),
    ({"counts": 0, "weights": -0.5}, ValueError, r"weights must be 0 where counts is 0; got -0\.5 at position 3"),
    ({"counts": 0, "weights": 0.5}, ValueError, r"weights must be 0 where counts is 0; got 0\.5 at position 3"),
    ({"weights": 1.0, "denominator": 3.0}, ValueError, "denominator is given, but weights say each token's share"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG)
def test_what_does_not_fit(changed, error, message, backend):
    b = make_batch().to(torch.float32)
    b.mask[3] = True
    call = arguments(b, OBJECTIVES["dapo"])
    for name, value in changed.items():
        call[name] = value
        if name != "denominator":
            call[name] = torch.ones(b.mask.shape)
            call[name][3] = value
    with pytest.raises(error, match=message):
        policy_loss(b.logprobs, backend=backend, **call)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("weights", torch.ones(3), ValueError, r"weights must have shape \(51,\)"),
        ("weights", torch.ones(51, dtype=torch.int64), TypeError, "weights must be bfloat16, float16"),
        ("counts", torch.ones(3), ValueError, r"counts must have shape \(51,\)"),
        ("counts", torch.ones(51, dtype=torch.bool), TypeError, "counts must hold whole numbers, .*; got torch.bool"),
        ("counts", 3, TypeError, "counts must be a tensor; got int"),
    ],
)
def test_wrong_tensors(name, value, error, message):
    b = make_batch().to(torch.float32)
    with pytest.raises(error, match=message):
        policy_loss(b.logprobs, **arguments(b, OBJECTIVES["dapo"]), **{name: value})


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean"])
def test_nothing_counts(how, backend):
    b = make_batch().to(torch.float32)
    call = arguments(b, dataclasses.replace(OBJECTIVES["dapo"], aggregation=how))
    out, grad, _ = run(b, backend, counts=torch.zeros(b.mask.shape), **call)
    assert out.loss == 0
    assert not grad.any()
    assert out.metrics["valid_tokens"] == 0


def test_masked_tokens_may_hold_anything(backend):
    b = make_batch().to(torch.float32)
    call = arguments(b, OBJECTIVES["dapo"])
    counts, weights = (torch.where(b.mask, 1.0, bad) for bad in (-3.5, torch.nan))
    expected, grad, _ = run(b, backend, weights=torch.ones(b.mask.shape), **call)
    out, got, _ = run(b, backend, weights=weights, counts=counts, **call)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(got, grad)
