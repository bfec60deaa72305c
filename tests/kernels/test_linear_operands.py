"""Claims about operand_dtype: results are those of float64 with rounded hidden states and weight, and bit for bit those
of a call with 16-bit tensors, whose gradients alone are rounded in the end; the weight is never rounded as a whole."""

import contextlib

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_oracle import make_problem, operands_of_a_gpu, policy_batch
from torch.utils._python_dispatch import TorchDispatchMode

from aepo_kernels import (
    LinearHead,
    PolicyObjective,
    linear_logprobs_and_entropy,
    linear_loss,
    linear_policy_loss,
    logits_policy_loss,
)
from aepo_kernels.ops import linear

SIXTEEN = [torch.bfloat16, torch.float16]
AEPO = PolicyObjective.preset("aepo", entropy_bonus=0.03)
STATS = (2.0, 0.7)
OPERATIONS = ["statistics", "recompute", "keep", "function, recompute", "function, keep"]


def run(operation, problem, batch, backend, operand_dtype=None):
    """Results and gradients of the leaves."""
    hidden, weight, bias = (*problem.leaves, None)[:3]
    given = {"bias": bias, "temperature": problem.temperature, "softcap": problem.softcap}
    given |= {"operand_dtype": operand_dtype, "backend": backend}
    kind, schedule = (*operation.split(", "), None)[:2]
    old, advantages, mask = batch
    if kind == "statistics":
        labels = problem.labels.masked_fill(~mask, -100)
        outputs = linear_logprobs_and_entropy(hidden, weight, labels, **given)
        upstream = (advantages.to(outputs[0].dtype), old.to(outputs[0].dtype))
        return outputs, torch.autograd.grad(outputs, problem.leaves, upstream)
    if kind == "function":

        def loss_fn(logprobs, entropy):
            return (-((logprobs - old).exp() * advantages) - 0.1 * entropy.square())[mask].sum()

        out = linear_loss(
            hidden, weight, problem.labels, mask, loss_fn, per_token=True, schedule=schedule, **given
        )  # fmt: skip
    else:
        out = linear_policy_loss(
            hidden, weight, problem.labels, *batch, objective=AEPO, entropy_stats=STATS, schedule=kind, **given
        )
    return (out.loss.detach(), *out.metrics.values()), torch.autograd.grad(0.3 * out.loss, problem.leaves)


def on(device, batch):
    return [x.to(device) for x in batch]


def through_logits(operation, problem, batch, operand_dtype):
    """The same from whole logits in float64, of rounded hidden states and weight and the bias as it is."""
    exact = problem.rounded(operand_dtype).to("cpu", torch.float64)
    logits, (old, advantages, mask) = exact.logits(), batch
    if operation == "statistics":
        log_p = (logits / problem.temperature).log_softmax(-1)
        logprobs = log_p.gather(1, problem.labels[:, None])[:, 0] * mask
        outputs = logprobs, -(log_p.exp() * log_p).sum(-1)
        total = (logprobs * advantages + outputs[1] * old).sum()
    else:
        out = logits_policy_loss(
            logits, exact.labels, *batch, objective=AEPO, temperature=exact.temperature, entropy_stats=STATS,
            backend="reference",
        )  # fmt: skip
        outputs, total = (out.loss, *out.metrics.values()), 0.3 * out.loss
    return [x.detach() for x in outputs], torch.autograd.grad(total, exact.leaves)


@pytest.fixture
def small_tiles(monkeypatch):
    for place in ("cpu", "cuda"):
        monkeypatch.setitem(linear.TILING, place, linear.Tiling((5, 48), (7, linear.WHOLE_VOCABULARY), 0))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("operation", ["statistics", "keep", "recompute"])
def test_against_float64_of_rounded_operands(operation, dtype, backend, device, small_tiles):
    problem = make_problem(12, 130, 6, bias=True, softcap=9.0, temperature=0.8)
    batch = policy_batch(problem)
    ours, grads = run(operation, problem.to(device), on(device, batch), backend, dtype)
    truth, true_grads = through_logits(operation, problem, batch, dtype)
    unrounded, other_grads = through_logits(operation, problem, batch, None)
    # Logits are float32 sums of magnitudes up to 50. On a GPU the gradient of the logits is an operand as well.
    error, grad_error = 2e-5, 2e-5 + (4 * torch.finfo(dtype).eps if device == "cuda" else 0.0)
    for x, y in zip(ours, truth, strict=True):
        assert (x.cpu() - y).abs().max() <= error * (1 + y.abs().max())
    assert (ours[0].cpu() - unrounded[0]).abs().max() > 2 * error * (1 + unrounded[0].abs().max())
    for x, y, other in zip(grads, true_grads, other_grads, strict=True):
        assert x.dtype == torch.float32
        assert (x.cpu() - y).abs().max() <= grad_error * y.abs().max()
        assert device == "cuda" or (x - other).abs().max() > 4 * grad_error * y.abs().max()


def check_against_narrow_tensors(operation, problem, batch, backend, dtype):
    """`problem` is float32, its bias as numbers of `dtype`."""
    wide = run(operation, problem.to(), batch, backend, dtype)
    narrow = run(operation, problem.to(None, dtype), batch, backend)
    for x, y in zip(wide[0], narrow[0], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(wide[1], narrow[1], strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x.to(dtype), y)
    return wide[1]


@pytest.mark.parametrize(
    ("name", "where"),
    [("reference", contextlib.nullcontext), ("cpu", contextlib.nullcontext), ("reference", operands_of_a_gpu)],
)
def test_bit_for_bit_what_16_bit_tensors_give(name, where):
    @settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @given(
        operation=st.sampled_from(OPERATIONS),
        dtype=st.sampled_from(SIXTEEN),
        shape=st.tuples(st.integers(0, 30), st.integers(1, 60), st.integers(1, 9)),
        tile=st.tuples(st.integers(1, 12), st.integers(1, 40)),
        softcap=st.none() | st.just(6.0),
        bias=st.booleans(),
        seed=st.integers(0, 99),
    )
    def check(operation, dtype, shape, tile, softcap, bias, seed):
        problem = make_problem(*shape, bias=bias, softcap=softcap, temperature=0.8, seed=seed)
        if bias:
            problem = problem._replace(bias=problem.bias.to(dtype).float())
        batch = policy_batch(problem, seed)
        with where(), pytest.MonkeyPatch.context() as patch:
            patch.setitem(linear.TILING, "cpu", linear.Tiling(tile, tile, 0))
            check_against_narrow_tensors(operation, problem, batch, name, dtype)

    check()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("operation", ["statistics", "keep", "recompute"])
def test_the_real_tiles(operation, dtype):
    problem = make_problem(600, 5000, 8)
    grads = check_against_narrow_tensors(operation, problem, policy_batch(problem), "cpu", dtype)
    for x in grads:  # not rounded on their way, nor in the end
        assert (x.to(dtype).float() != x).float().mean() > 0.5


def test_the_tensors_own_dtype_means_nothing():
    for dtype in (*SIXTEEN, torch.float32, torch.float64):
        problem = make_problem(12, 40, 6, dtype, bias=True)
        batch = policy_batch(problem)
        for operation in OPERATIONS:
            given, none = (run(operation, problem.to(), batch, None, x) for x in (dtype, None))
            assert all(torch.equal(x, y) for x, y in zip(given[0] + given[1], none[0] + none[1], strict=True))


class Largest16BitTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype in SIXTEEN:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("where", [contextlib.nullcontext, operands_of_a_gpu])
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_the_weight_is_never_rounded_as_a_whole(schedule, where, monkeypatch):
    """Also where `keep` takes the vocabulary whole (CUDA): then a weight that is rounded is cut as for `recompute`."""
    monkeypatch.setitem(linear.TILING, "cpu", linear.Tiling((16, 96), (12, linear.WHOLE_VOCABULARY), 0))
    problem, wanted = make_problem(20, 500, 32), linear.Wanted(True, True, True)
    with where(), Largest16BitTensor() as largest:
        head = linear.Head(problem.weight, None, 1.0, None, "reference", schedule=schedule, operand_dtype=SIXTEEN[0])
        ones = linear.Coefficients(torch.ones(20), None)
        if schedule == "keep":
            linear.statistics_and_gradients(
                head, problem.hidden, problem.labels, torch.arange(20),
                lambda chunk, stats: ones.of_rows(chunk), None, wanted,
            )  # fmt: skip
        else:
            stats = linear.statistics(head, problem.hidden, problem.labels)
            linear.gradients(head, problem.hidden, problem.labels, stats, ones, wanted)
    assert largest.numel == 96 * 32  # a tile of the weight; [V, D] is 500 * 32, a tile of logits 16 * 96


def test_only_a_weight_that_is_rounded_is_cut(monkeypatch):
    monkeypatch.setitem(linear.TILING, "cpu", linear.Tiling((16, 96), (12, linear.WHOLE_VOCABULARY), 0))
    for dtype, operand_dtype, columns in (
        (torch.float32, None, 500),
        (*SIXTEEN[:1] * 2, 500),
        (torch.float32, *SIXTEEN[:1], 96),
    ):
        head = linear.Head(
            torch.zeros(500, 2, dtype=dtype), None, 1.0, None, "cpu", schedule="keep", operand_dtype=operand_dtype
        )
        assert head.tile == (12, columns)


def test_ignored_rows_and_frozen_tensors():
    problem = make_problem(6, 40, 4).to()
    old, advantages, mask = policy_batch(problem)
    mask[1::3] = False
    problem.hidden.data[1::3] = torch.nan
    problem.weight.requires_grad_(False)
    for schedule in ("keep", "recompute"):
        loss = linear_policy_loss(
            problem.hidden, problem.weight, problem.labels, old, advantages, mask, objective=AEPO,
            entropy_stats=STATS, schedule=schedule, operand_dtype=torch.bfloat16,
        ).loss  # fmt: skip
        (grad,) = torch.autograd.grad(loss, problem.hidden)
        assert grad[1::3].eq(0).all()
        assert grad[~mask].eq(0).all()
        assert grad[mask].ne(0).any()
        assert loss.isfinite()


def test_a_head_and_checkpointing_pass_it_on():
    head = LinearHead(4, 7)
    hidden, labels = torch.randn(3, 4, requires_grad=True), torch.arange(3)

    def logprobs(hidden):
        return head(
            hidden, lambda h, w, b: linear_logprobs_and_entropy(h, w, labels, b, operand_dtype=torch.bfloat16)
        )[0]  # fmt: skip

    grads = [
        torch.autograd.grad(f(hidden).sum(), (hidden, head.weight, head.bias))
        for f in (logprobs, lambda h: torch.utils.checkpoint.checkpoint(logprobs, h, use_reentrant=False))
    ]
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)
    assert head.weight.grad is None


FLOAT, LABELS, MASK = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
CALLS = {
    "statistics": lambda x, **given: linear_logprobs_and_entropy(x, x, LABELS, **given),
    "policy": lambda x, **given: linear_policy_loss(
        x, x, LABELS, FLOAT[:, 0], FLOAT[:, 0], MASK, objective=AEPO, **given
    ),
    "function": lambda x, **given: linear_loss(x, x, LABELS, MASK, lambda logprobs, entropy: logprobs.sum(), **given),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("dtype", "operand_dtype", "words"),
    [
        (torch.float32, "bfloat16", "operand_dtype must be a torch.dtype or None; got 'bfloat16'"),
        (torch.float32, torch.float64, "got torch.float64 for torch.float32"),
        (torch.float32, torch.int8, "got torch.int8 for torch.float32"),
        (torch.float64, torch.bfloat16, "got torch.bfloat16 for torch.float64"),
        (torch.float64, torch.float32, "got torch.float32 for torch.float64"),
        (torch.bfloat16, torch.float16, "got torch.float16 for torch.bfloat16"),
        (torch.bfloat16, torch.float32, "operand_dtype must be None, the dtype of hidden, or bfloat16"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_operand_dtypes(call, dtype, operand_dtype, words):
    with pytest.raises(TypeError, match=words):
        call(FLOAT.to(dtype), operand_dtype=operand_dtype)
