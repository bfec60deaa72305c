"""Claims: a 16-bit gradient of the linear operations is rounded once, when every factor is known, however large or
small the loss's scale, a token's coefficient or the temperature; the 16-bit gradient of logits between two products
(CUDA) keeps the digits of every row."""

import contextlib

import pytest
import torch
from linear_oracle import Problem, make_problem, operands_of_a_gpu, policy_batch

from aepo_kernels import PolicyObjective, linear_logprobs_and_entropy, linear_policy_loss, logits_policy_loss
from aepo_kernels.objective import PRESETS
from aepo_kernels.ops import linear
from aepo_kernels.ops.scaled_cast import BLOCK, scaled_cast

SCHEDULES = ["keep", "recompute"]
SIXTEEN = [torch.float16, torch.bfloat16]
AEPO = PolicyObjective.preset("aepo", entropy_bonus=0.03)
STATS = (2.0, 0.7)
SHARED = {"denominator", "cu_seqlens", "ref_logprobs"}  # settings of both operations


def assert_close(name, ours, truth, error, scale=1.0):
    """Within `error` (what went before the rounding) and one ulp: the interpreter truncates where others round."""
    limits = torch.finfo(ours.dtype)
    step = limits.smallest_normal * limits.eps  # between subnormals
    budget = error + 2e-6 * scale * truth.abs().amax(-1, keepdim=True) + truth.abs() * limits.eps + step
    excess = (ours.detach().cpu().double() - truth).abs() - budget
    assert excess.max() <= 0, f"{name}: {excess.max()} over budget at {truth.flatten()[excess.argmax()]}"


def both(problem: Problem, backend, device, factor, batch, objective=AEPO, **settings):
    """Gradients of factor * loss: ours, and the float64 truth with that of the logits, d loss / dz."""
    leaves = problem.to(device)
    common = {"objective": objective, "temperature": problem.temperature}
    common["entropy_stats"] = STATS if objective.entropy_advantage else None
    common |= {name: settings.pop(name) for name in SHARED & settings.keys()}
    loss = linear_policy_loss(
        leaves.hidden, leaves.weight, leaves.labels, *(x.to(device) for x in batch),
        bias=leaves.bias, softcap=problem.softcap, backend=backend, **common, **settings,
    ).loss  # fmt: skip
    ours = torch.autograd.grad(loss, leaves.leaves, torch.tensor(factor, device=device))
    exact = problem.to("cpu", torch.float64)
    logits = exact.logits()
    truth = logits_policy_loss(logits, exact.labels, *batch, backend="reference", **common).loss
    *true_grads, of_logits = torch.autograd.grad(truth * factor, (*exact.leaves, logits))
    return ours, true_grads, of_logits


# float16 holds 6e-8 to 65504. A loss over 200,000 tokens has gradients of 1e-8 before its loss scale, 1e-3 behind it;
# bfloat16 has the range of float32 and may be scaled by anything.
FACTORS = [(torch.float16, 65536.0), (torch.float16, 1e9), (torch.float32, 1e-25)]
FACTORS += [(torch.bfloat16, factor) for factor in (1 / 3, 1e-28, 1e28)]


@pytest.mark.parametrize(("dtype", "factor"), FACTORS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gradient_is_rounded_once_and_last(schedule, dtype, factor, backend, device, monkeypatch):
    for place in ("cpu", "cuda"):
        monkeypatch.setitem(linear.TILING, place, linear.Tiling((5, 16), (5, 16), 0))
    problem = make_problem(12, 40, 6, dtype, bias=True)
    settings = {"schedule": schedule, "denominator": 200_000}
    ours, truth, _ = both(problem, backend, device, factor, policy_batch(problem), **settings)
    for name, grad, true_grad in zip(("hidden", "weight", "bias"), ours, truth, strict=True):
        assert grad.dtype == dtype
        operands = 2.0**-7 if dtype == torch.bfloat16 and device == "cuda" else 2.0**-10 if device == "cuda" else 0.0
        assert_close(name, grad, true_grad, operands * true_grad.abs().max(), scale=20)


def test_the_schedule_that_is_chosen_by_itself_does_not_underflow():
    problem = make_problem(2100, 300, 8, torch.float16)
    ours, truth, _ = both(problem, None, "cpu", 65536.0, policy_batch(problem), denominator=200_000)
    for grad, true_grad in zip(ours, truth, strict=True):
        assert (grad.double() - true_grad).norm() < 3e-4 * true_grad.norm()
        assert grad[true_grad.abs() > 6e-8].ne(0).all()


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("factor", [65536.0, 3e-4])
def test_the_gradient_of_16_bit_logits_is_rounded_once_too(factor, dtype, backend, device):
    problem = make_problem(12, 40, 6, torch.float64)
    logits = problem.logits().to(dtype)
    batch = policy_batch(problem)
    settings = {"objective": AEPO, "entropy_stats": STATS, "denominator": 200_000.0 if factor > 1 else 1.0}

    def grad(logits, backend, device):
        z = logits.to(device).requires_grad_()
        given = (x.to(device) for x in (problem.labels, *batch))
        loss = logits_policy_loss(z, *given, **settings, backend=backend).loss
        return torch.autograd.grad(loss, z, torch.tensor(factor, device=device, dtype=loss.dtype))[0]

    assert_close("logits", grad(logits, backend, device), grad(logits.double(), "reference", "cpu"), 0, scale=5)


@pytest.fixture
def narrow_operands():
    """The gradient of logits exists in 16 bits between the products, on a CPU too."""
    with contextlib.nullcontext() if torch.cuda.is_available() else operands_of_a_gpu():
        yield


def extremes(tokens):
    """Advantages from 1e-6 to 1e5 in one batch."""
    return torch.logspace(-6, 5, tokens, dtype=torch.float64).float() * torch.tensor([1.0, -1.0]).repeat(tokens // 2)


@pytest.mark.parametrize("temperature", [1.0, 1e-3, 50.0])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_16_bit_gradients_of_logits_keep_every_row(schedule, dtype, temperature, device, narrow_operands, monkeypatch):
    # Rows of all sizes share one product; flat distributions, whose entries are 1 / V of their row's coefficient.
    for place in ("cpu", "cuda"):
        monkeypatch.setitem(linear.TILING, place, linear.Tiling((7, 900), (5, 900), 0))
    problem = make_problem(12, 3000, 6, dtype, bias=True, temperature=temperature)
    problem = problem._replace(hidden=problem.hidden * min(1.0, temperature) * 0.25)
    problem.bias.mul_(min(1.0, temperature))
    old, _, _ = policy_batch(problem)
    batch = (old, extremes(12), torch.ones(12, dtype=torch.bool))
    objective = PolicyObjective.preset("reinforce++", eps_low=1.0, eps_high=1e9, entropy_bonus=0.0)
    backend = "triton" if device == "cuda" else "reference"
    # The largest entries end up at 6e4 at most, the end of float16.
    factor = 1e-2 * temperature
    ours, truth, of_logits = both(problem, backend, device, factor, batch, objective, schedule=schedule)
    # Each entry of the logits' gradient was rounded once, whatever its row's coefficient.
    eps, size = torch.finfo(dtype).eps, of_logits.abs()
    hidden, weight = problem.hidden.double(), problem.weight.double()
    assert_close("hidden", ours[0], truth[0], eps * size @ weight.abs(), scale=50)
    assert_close("weight", ours[1], truth[1], eps * size.T @ hidden.abs(), scale=50)
    assert_close("bias", ours[2], truth[2], eps * size.sum(0), scale=50)
    if dtype == torch.bfloat16:
        assert ours[0].ne(0).any(1).all()


@pytest.mark.parametrize(("log_ratio", "fits"), [(0.0, True), (7.0, True), (12.0, False)])
def test_keep_has_room_for_ratios_that_it_cannot_foresee(log_ratio, fits, narrow_operands, device):
    # Its scale is chosen from advantages and weights; e^7 is inside the 2^12 left in float16, e^12 is not, visibly.
    problem = make_problem(12, 100, 6, torch.float16)
    old, advantages, mask = policy_batch(problem)
    old[3] -= log_ratio
    mask[3], advantages[3] = True, -2.0
    objective = PolicyObjective(dual_clip=None)  # an unbounded ratio where A < 0
    backend = "triton" if device == "cuda" else "reference"
    ours, truth, of_logits = both(problem, backend, device, 1e-2, (old, advantages, mask), objective, schedule="keep")
    if not fits:
        assert not ours[1].isfinite().all()
        return
    eps, size = torch.finfo(torch.float16).eps, of_logits.abs()
    assert_close("hidden", ours[0], truth[0], eps * size @ problem.weight.double().abs(), scale=50)
    assert_close("weight", ours[1], truth[1], eps * size.T @ problem.hidden.double().abs(), scale=50)


@pytest.mark.parametrize("term", [{"entropy_bonus": 0.1}, {"kl_coef": 0.1, "kl_estimator": "k1"}], ids=str)
def test_keep_foresees_what_does_not_come_from_advantages(term, narrow_operands, device):
    problem = make_problem(12, 100, 6, torch.float16)
    old, advantages, mask = policy_batch(problem)
    objective = PolicyObjective(**term)
    settings = {"schedule": "keep", "ref_logprobs": old if objective.kl_coef else None}
    backend = "triton" if device == "cuda" else "reference"
    ours, truth, of_logits = both(problem, backend, device, 10.0, (old, 0 * advantages, mask), objective, **settings)
    eps, size = torch.finfo(torch.float16).eps, of_logits.abs()
    assert_close("hidden", ours[0], truth[0], eps * size @ problem.weight.double().abs(), scale=50)
    assert_close("weight", ours[1], truth[1], eps * size.T @ problem.hidden.double().abs(), scale=50)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_softcap_with_16_bit_gradients_of_logits(schedule, dtype, device, narrow_operands):
    # The slope of the cap comes behind the stage, so these entries are rounded twice.
    problem = make_problem(12, 60, 6, dtype, bias=True, softcap=4.0)
    backend = "triton" if device == "cuda" else "reference"
    ours, truth, _ = both(problem, backend, device, 8.0, policy_batch(problem), schedule=schedule)
    exact = problem.to("cpu", torch.float64)
    uncapped = torch.nn.functional.linear(exact.hidden, exact.weight, exact.bias)
    logits = 4 * torch.tanh(uncapped / 4)
    loss = logits_policy_loss(
        logits, exact.labels, *policy_batch(problem), objective=AEPO, entropy_stats=STATS, backend="reference"
    ).loss
    (of_logits,) = torch.autograd.grad(8.0 * loss, uncapped)
    eps, size = 2 * torch.finfo(dtype).eps, of_logits.abs()
    for name, grad, true_grad, error in zip(
        ("hidden", "weight", "bias"), ours, truth,
        (size @ exact.weight.abs(), size.T @ exact.hidden.abs(), size.sum(0)), strict=True,
    ):  # fmt: skip
        assert_close(name, grad, true_grad, eps * error.detach(), scale=50)


@pytest.mark.parametrize("weights", [(1e-9, 1e-9), (1e9, 0.0), (0.0, 1e9), (1e-30, 1e-36)], ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_statistics_with_any_upstream_gradient(dtype, weights, device, narrow_operands):
    problem = make_problem(6, 500, 5, dtype, temperature=0.01)
    problem = problem._replace(hidden=problem.hidden * 0.01)
    leaves, exact = problem.to(device), problem.to("cpu", torch.float64)
    backend = "triton" if device == "cuda" else "reference"
    upstream = [torch.linspace(0.1, 1, 6) * w for w in weights]
    outputs = linear_logprobs_and_entropy(
        leaves.hidden, leaves.weight, leaves.labels, temperature=0.01, backend=backend
    )
    # The gradients come back to the order of 1 by a loss scale, as they would in training.
    grads = torch.autograd.grad(outputs, leaves.leaves, [x.to(device) for x in upstream])
    logits = exact.logits()
    log_p = (logits / 0.01).log_softmax(-1)
    total = (log_p.gather(1, exact.labels[:, None])[:, 0] * upstream[0]).sum()
    total = total - ((log_p.exp() * log_p).sum(-1) * upstream[1]).sum()
    *truth, of_logits = torch.autograd.grad(total, (*exact.leaves, logits))
    eps, size = torch.finfo(dtype).eps, of_logits.abs()
    if dtype == torch.float16 and max(weights) == 1e9:
        assert all(grad.isinf().any() and not grad.isnan().any() for grad in grads)  # beyond float16, and says so
        return
    assert_close("hidden", grads[0], truth[0], eps * size @ exact.weight.abs(), scale=500)
    assert_close("weight", grads[1], truth[1], eps * size.T @ exact.hidden.abs(), scale=500)


def test_a_token_without_gradient_beside_others_is_0_times_something_finite(narrow_operands):
    # Coefficient 0 has no power of two; whatever stands for it must not overflow the float16 hidden states.
    problem = make_problem(4, 50, 4, torch.float16)
    old, _, mask = policy_batch(problem)
    advantages = torch.tensor([0.0, 1e-3, 0.0, 1e-5])
    ours, truth, of_logits = both(
        problem, "reference", "cpu", 1e3, (old, advantages, torch.ones_like(mask)), PolicyObjective.preset("aepo"),
        schedule="keep", denominator=100,
    )  # fmt: skip
    assert ours[0][[0, 2]].eq(0).all()
    for grad, true_grad in zip(ours, truth, strict=True):
        assert_close("gradient", grad, true_grad, 2.0**-10 * of_logits.abs().sum(), scale=10)


@pytest.mark.parametrize("name", [name for name in PRESETS if PolicyObjective.preset(name).ratio_level == "token"])
def test_keep_is_as_exact_as_recompute_for_every_objective(name):
    objective = PolicyObjective.preset(name)
    problem = make_problem(60, 200, 8, torch.float16)
    settings = {"denominator": 200_000, "cu_seqlens": torch.tensor([0, 20, 60])}
    errors = []
    for schedule in SCHEDULES:
        ours, truth, _ = both(
            problem, None, "cpu", 65536.0, policy_batch(problem), objective, schedule=schedule, **settings
        )
        errors.append([(x.double() - y).norm() / y.norm() for x, y in zip(ours, truth, strict=True)])
    for keep, recompute in zip(*errors, strict=True):
        assert keep <= 1.01 * recompute < 1e-3


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_a_compiled_graph_rounds_once_too(dtype):
    problem = make_problem(12, 40, 6, dtype)
    batch = policy_batch(problem)

    def run(hidden, weight):
        loss = linear_policy_loss(
            hidden, weight, problem.labels, *batch, objective=AEPO, entropy_stats=STATS, denominator=200_000,
            schedule="keep",
        ).loss  # fmt: skip
        return loss * 65536

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = problem.to().leaves
    for x, y in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (run, compiled)), strict=True):
        assert torch.equal(x, y)
        assert x.count_nonzero() > 0.9 * x.numel() * (policy_batch(problem)[2].float().mean() if len(x) == 12 else 1)


def test_two_backward_passes_give_the_same():
    problem = make_problem(12, 40, 6).to()
    loss = linear_policy_loss(
        problem.hidden, problem.weight, problem.labels, *policy_batch(problem), objective=AEPO, entropy_stats=STATS,
        schedule="keep",
    ).loss  # fmt: skip
    first = torch.autograd.grad(loss, problem.leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()  # what an optimizer may do with gradients that it owns
    for x, y in zip(torch.autograd.grad(loss, problem.leaves), kept, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 2047, 2048, 2 * 8192, 8192 + 2049])
def test_scaled_cast(numel, dtype, backend, device):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device)
    factor = torch.tensor(1 / 3, device=device)
    canvas = torch.full((numel + 8,), 7.0, dtype=dtype, device=device)
    out = scaled_cast(backend, x, factor, canvas[:numel])
    truth = x.cpu().double() * factor.item()
    eps = torch.finfo(dtype).eps * (1 if backend == "triton" and device == "cpu" else 0.5)  # the interpreter truncates
    assert ((out.cpu().double() - truth).abs() <= truth.abs() * (eps + 1e-7) + 6e-8).all()
    assert canvas[numel:].eq(7).all()


def test_scaled_cast_goes_through_all_blocks():
    x = torch.ones(2, BLOCK // 2 + 3)
    out = scaled_cast("cpu", x, torch.tensor(3.0), torch.empty_like(x, dtype=torch.bfloat16))
    assert out.eq(3).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scaled_cast_in_float64(backend):
    x = torch.randn(50, dtype=torch.float64)
    factor = torch.tensor(1 / 3, dtype=torch.float64)
    assert torch.equal(scaled_cast(backend, x, factor, torch.empty_like(x)), x * factor)


def test_power_of_two():
    x = torch.tensor([1.0, 1.99, 2.0, 0.3, -5.0, 0.0, torch.nan, torch.inf, 1e-44, 3e38])
    exponents = [0, 0, 1, -2, 2, -100, -100, -100, -100, 100]
    assert linear.power_of_two(x, 0).tolist() == [2.0**e for e in exponents]
    assert linear.power_of_two(x[:5], -13).tolist() == [2.0 ** (e - 13) for e in exponents[:5]]
    assert linear.power_of_two(x.double(), 0).dtype == torch.float64


def test_scales_bring_the_largest_hidden_state_near_the_top_of_float16():
    hidden = torch.tensor([[-8.0, 1.0], [2.0, 0.5]])
    assert linear.scales(hidden, torch.tensor(0.5)) == (0.5 * 8 / 2**13, 0.5 / 2**13)
    assert linear.scales(hidden[:0], torch.tensor(0.5)).weight > 0
