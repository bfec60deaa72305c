"""Claims: log-prob and entropy from hidden states equal those of whole float64 logits, with every gradient; logits
exist as tiles only and are never rounded; rows without a gradient and gradients nobody needs cost no product."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_oracle import make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from aepo_kernels import linear_logprobs_and_entropy
from aepo_kernels.ops import linear
from aepo_kernels.testing import DTYPES, assert_within_budget, eager_token_stats

VARIANTS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "softcap": 3.0, "temperature": 0.7},
}


def ours(problem, backend, **others):
    return linear_logprobs_and_entropy(
        problem.hidden,
        problem.weight,
        problem.labels,
        problem.bias,
        problem.temperature,
        problem.softcap,
        backend=backend,
        **others,
    )


def coefficients(tokens, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


def through_logits(problem, dtype, weights):
    """(logprobs, entropy), gradients of the leaves: whole logits computed in `dtype`."""
    leaves = problem.to("cpu", dtype)
    logits = leaves.logits()
    stats = eager_token_stats(logits, leaves.labels, problem.temperature, *weights, dtype=dtype)
    return stats[:2], torch.autograd.grad(logits, leaves.leaves, stats.grad)


def check(problem, backend, device, weights=None):
    acc = torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32
    weights = coefficients(len(problem.labels), acc) if weights is None else weights
    leaves = problem.to(device)
    stats = ours(leaves, backend)
    grads = torch.autograd.grad(stats, leaves.leaves, [w.to(device) for w in weights])
    true_stats, true_grads = through_logits(problem, torch.float64, weights)
    eager_stats, eager_grads = through_logits(problem, acc, weights)
    # A logit is a sum of D products: its rounding is that of the sum of their magnitudes.
    size = (problem.hidden.double().abs() @ problem.weight.double().abs().T).max().item() / problem.temperature + 10
    for name, x, truth, eager in zip(("logprobs", "entropy"), stats, true_stats, eager_stats, strict=True):
        assert x.dtype == acc
        assert_within_budget(name, x, truth, eager, scale=size)
    for name, x, truth, eager in zip(("hidden", "weight", "bias"), grads, true_grads, eager_grads, strict=False):
        assert x.dtype == problem.hidden.dtype
        assert_within_budget(name, x, truth, eager, scale=size * (truth.abs().max() + 1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, variant, backend, device):
    if backend in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip("no float64 kernels")
    slow = backend == "triton" and device == "cpu"
    check(make_problem(3 if slow else 40, 4096 + 300, 24, dtype, **VARIANTS[variant]), backend, device)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4097, 3), (513, 50, 2), (1025, 4095, 8), (600, 9000, 5)], ids=str)
def test_shapes_around_the_tiles(shape):
    check(make_problem(*shape, torch.float32, bias=True), "cpu", "cpu")


@st.composite
def tilings(draw):
    size = st.integers(1, 12)
    return draw(st.integers(1, 30)), draw(st.integers(1, 40)), (draw(size), draw(size)), draw(st.integers(0, 99))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_any_tiling(monkeypatch, name):
    @settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @given(tilings())
    def run(case):
        tokens, vocab, tile, seed = case
        monkeypatch.setitem(linear.TILING, "cpu", linear.Tiling(tile, tile, 0))
        check(make_problem(tokens, vocab, 4, torch.float64, bias=True, softcap=8.0, seed=seed), name, "cpu")

    run()


def test_gradcheck():
    problem = make_problem(5, 40, 3, torch.float64, bias=True, softcap=3.0, temperature=0.8).to()
    problem.labels[2] = -100

    def run(*leaves):
        return ours(problem._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2]), None)

    assert torch.autograd.gradcheck(run, problem.leaves)


def test_leading_dimensions_and_ignored_labels(backend, device):
    problem = make_problem(6, 30, 4).to(device)
    problem.labels[1::3] = -7
    flat = ours(problem, backend, ignore_index=-7)
    cube = problem._replace(hidden=problem.hidden.view(2, 3, 4), labels=problem.labels.view(2, 3))
    for x, y in zip(ours(cube, backend, ignore_index=-7), flat, strict=True):
        assert x.shape == (2, 3)
        assert torch.equal(x.flatten(), y)
    assert flat[0][1::3].tolist() == [0, 0]
    assert flat[1][1::3].gt(0).all()
    (grad,) = torch.autograd.grad(flat[0].sum(), problem.hidden)
    assert grad[1::3].eq(0).all()


def test_logits_are_never_rounded_to_16_bits(backend, device):
    # Logits around 80 in bfloat16 are 0.25 apart: whoever rounds them is off by up to that much.
    problem = make_problem(4, 500, 64, torch.bfloat16)
    problem = problem._replace(hidden=problem.hidden * 3)
    (true_logprobs, _), _ = through_logits(problem, torch.float64, coefficients(4))
    logprobs, _ = ours(problem.to(device), backend)
    rounded = problem.logits().double().log_softmax(-1).gather(1, problem.labels[:, None])[:, 0]
    assert (rounded - true_logprobs).abs().max() > 0.05
    assert (logprobs.cpu() - true_logprobs).abs().max() < 1e-4


def test_minus_inf_bias_and_bad_rows(backend, device, monkeypatch):
    monkeypatch.setitem(linear.TILING, "cpu", linear.Tiling((2, 8), (2, 8), 0))
    problem = make_problem(4, 30, 4, bias=True)
    problem.bias[:17] = -torch.inf  # more than two whole tiles have no probability
    problem = problem._replace(labels=torch.tensor([20, 3, 29, 25]))
    problem.hidden[2] = torch.nan
    leaves = problem.to(device)
    logprobs, entropy = ours(leaves, backend)
    kept = problem.hidden.double() @ problem.weight[17:].double().T + problem.bias[17:].double()
    truth = kept.log_softmax(-1)
    assert logprobs[1] == -torch.inf
    assert logprobs[2].isnan()
    assert entropy[2].isnan()
    for row in (0, 3):
        torch.testing.assert_close(logprobs[row].item(), truth[row, problem.labels[row] - 17].item(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            entropy[row].item(), -(truth[row].exp() * truth[row]).sum().item(), rtol=1e-5, atol=0
        )
    grads = torch.autograd.grad(entropy[[0, 3]].sum(), leaves.leaves)
    assert grads[0][[1, 2]].eq(0).all()  # not even the NaN row is touched by the others' gradient
    assert grads[1][:17].eq(0).all()


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_whole_logits_never_exist():
    problem = make_problem(1200, 9000, 16)
    head = linear.Head(problem.weight, None, 1.0, None, "cpu")
    with LargestTensor() as largest:
        stats = linear.statistics(head, problem.hidden, problem.labels)
        given = linear.Coefficients(*coefficients(1200))
        linear.gradients(head, problem.hidden, problem.labels, stats, given, linear.Wanted(True, True, False))
    assert largest.numel <= max(512 * 4096, 9000 * 16)


@pytest.fixture
def products(monkeypatch):
    """(rows, columns, inner size) of every matrix product."""
    seen, multiply = [], linear.multiply

    def counted(out, a, b, add=False):
        seen.append((*out.shape, a.shape[1]))
        multiply(out, a, b, add)

    monkeypatch.setattr(linear, "multiply", counted)
    return seen


def operations(products):
    return sum(rows * columns * inner for rows, columns, inner in products)


@pytest.mark.parametrize(("frozen", "expected"), [((), 3), (("weight",), 2), (("hidden",), 2)], ids=str)
def test_one_product_forward_and_only_needed_ones_backward(frozen, expected, products):
    problem = make_problem(30, 5000, 8).to()
    for name in frozen:
        getattr(problem, name).requires_grad_(False)
    unit = 30 * 5000 * 8
    logprobs, _ = ours(problem, "cpu")
    assert operations(products) == unit
    products.clear()
    used = torch.arange(30) % 3 == 0  # the gradient of the others is 0
    (logprobs * used).sum().backward()
    assert operations(products) == expected * unit // 3
    for name in frozen:
        assert getattr(problem, name).grad is None


def test_equal_inputs_give_equal_bits(backend, device):
    def run():
        problem = make_problem(5, 5000, 16, torch.bfloat16).to(device)
        stats = ours(problem, backend)
        return [*stats, *torch.autograd.grad(sum(x.sum() for x in stats), problem.leaves)]

    for x, y in zip(run(), run(), strict=True):
        assert torch.equal(x, y)


def test_no_tokens(backend, device):
    problem = make_problem(0, 30, 4, bias=True).to(device)
    logprobs, entropy = ours(problem, backend)
    assert logprobs.shape == entropy.shape == (0,)
    grads = torch.autograd.grad(logprobs.sum() + entropy.sum(), problem.leaves)
    assert [grad.abs().sum().item() for grad in grads] == [0, 0, 0]


@pytest.mark.parametrize("softcap", [1e-30, 1e-12, 1e12, 1e30])
def test_softcaps_at_the_ends(softcap, backend, device):
    problem = make_problem(5, 40, 3, softcap=softcap)
    check(problem, backend, device)


HIDDEN, WEIGHT, LABELS = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"hidden must be \[\.\., D\]", {"hidden": torch.zeros(3, 5)}),
        (ValueError, r"weight \[V, D\]", {"weight": torch.zeros(7)}),
        (ValueError, r"V, D >= 1", {"weight": torch.zeros(0, 4)}),
        (TypeError, "weight must have the dtype of hidden", {"weight": WEIGHT.bfloat16()}),
        (TypeError, "hidden must be bfloat16", {"hidden": HIDDEN.long()}),
        (ValueError, r"bias must have shape \(7,\)", {"bias": torch.zeros(8)}),
        (TypeError, "bias must have the dtype of hidden", {"bias": torch.zeros(7).double()}),
        (ValueError, "labels must have shape", {"labels": LABELS[:2]}),
        (TypeError, "labels must have an integer dtype", {"labels": LABELS.float()}),
        (ValueError, "label 7 at position", {"labels": torch.tensor([0, 7, 1])}),
        (ValueError, "softcap must be a number > 0", {"softcap": 0}),
        (ValueError, r"softcap must be in \[1e-30, 1e\+30\]; got 1e-38", {"softcap": 1e-38}),
        (ValueError, r"softcap must be in \[1e-30, 1e\+30\]; got 1e\+300", {"softcap": 1e300}),
        (ValueError, "temperature must be > 0", {"temperature": 0.0}),
        (ValueError, "backend must be", {"backend": "mps"}),
    ],
)
def test_bad_input(error, words, change):
    with pytest.raises(error, match=words):
        linear_logprobs_and_entropy(**({"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | change))
