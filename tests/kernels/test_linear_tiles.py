"""Claims about how the linear operations cut the logits: any tiling gives the gradients of the whole, `keep` on CUDA
takes one launch of everything per chunk, a stage knows where its tile begins, rows lie on boundaries of 16 bytes."""

import pytest
import torch
from linear_oracle import losses, make_problem

from aepo_kernels import PolicyObjective, linear_policy_loss
from aepo_kernels import backend as backends
from aepo_kernels.ops import linear, rows
from aepo_kernels.testing import assert_within_budget, make_labels, make_logits

AEPO = PolicyObjective.preset("aepo", entropy_bonus=0.03)
SETTINGS = {"schedule": "keep", "entropy_stats": (2.0, 0.7)}
CUDA_LIKE = linear.Tiling((16, 96), (12, linear.WHOLE_VOCABULARY), 0)


@pytest.mark.parametrize("vocab_start", [0, 30, 70])
def test_a_stage_takes_the_labels_of_the_whole_vocabulary(vocab_start, backend, device):
    logits = make_logits(12, 40).to(device)
    local = make_labels(logits.cpu()).to(device)
    local[5] = 39
    local[6] = 0
    labels = local + vocab_start
    labels[7], labels[8] = vocab_start - 1, vocab_start + 40  # in the tiles beside this one
    labels[9], labels[10] = rows.NO_LABEL, torch.iinfo(torch.int64).max
    local[7:9], local[9], local[10] = -7, rows.NO_LABEL, -7
    stats_stage, grad_stage = (backends.stage(backend, name) for name in ("token_stats", "logits_grad"))
    stats = stats_stage(logits, labels, 0.7, rows.NO_LABEL, False, vocab_start)
    expected = stats_stage(logits, local, 0.7, rows.NO_LABEL, False)
    for x, y in zip(stats, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert stats[0].isnan().nonzero()[:, 0].tolist() == [7, 8, 10]

    coefficients = [torch.linspace(-1, 2, 12, device=device), torch.linspace(1, -2, 12, device=device)]
    _, entropy, maximum, log_sum = stats
    grads = [torch.empty_like(logits) for _ in range(2)]
    given = (maximum, log_sum, entropy, *coefficients, 0.7, rows.NO_LABEL)
    grad_stage(logits, labels, *given, grads[0], vocab_start)
    grad_stage(logits, local, *given, grads[1])
    assert torch.equal(*grads)


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_the_whole_vocabulary_in_one_tile(schedule, softcap, backend, device, monkeypatch):
    # The constants of CUDA on any device, against float64 and against small tiles.
    few = backend == "triton" and device == "cpu"
    problem = make_problem(13 if few else 40, 201, 6, bias=True, softcap=softcap, temperature=0.8)
    settings = SETTINGS | {"schedule": schedule}
    grads = []
    for tiling in (CUDA_LIKE, linear.Tiling((7, 64), (5, 64), 0)):
        for place in ("cpu", "cuda"):
            monkeypatch.setitem(linear.TILING, place, tiling)
        (out, ours), (truth, true_grads) = losses(problem, AEPO, backend, device, **settings)
        assert_within_budget("loss", out.loss, truth.loss.detach(), scale=500)
        for x, y in zip(ours, true_grads, strict=True):
            assert_within_budget("gradient", x, y, scale=500 * y.abs().max())
        grads.append(ours)
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5 * y.abs().max().item())


@pytest.fixture
def calls(monkeypatch):
    """Names of the products (by their output) and stages that were called, in order."""
    names, multiply, stage = [], linear.multiply, backends.stage

    def counted(out, a, b, add=False):
        names.append((tuple(out.shape), add))
        multiply(out, a, b, add)

    def named(backend, name):
        names.append(name)
        return stage(backend, name)

    monkeypatch.setattr(linear, "multiply", counted)
    monkeypatch.setattr(linear.backends, "stage", named)
    return names


def test_keep_on_cuda_takes_three_products_and_two_launches_over_the_logits_per_chunk(calls, monkeypatch):
    monkeypatch.setitem(linear.TILING, "cpu", CUDA_LIKE)
    problem = make_problem(20, 201, 6)
    head = linear.Head(problem.weight, None, 1.0, None, "reference", schedule="keep")

    def coefficients(chunk, stats):
        return linear.Coefficients(torch.ones_like(stats.logprobs), None)

    linear.statistics_and_gradients(
        head, problem.hidden, problem.labels, torch.arange(20), coefficients, torch.tensor(1.0),
        linear.Wanted(True, True, False),
    )  # fmt: skip
    assert calls == [
        ((12, 201), False), "token_stats", "logits_grad", ((12, 6), False), ((201, 6), False),
        ((8, 201), False), "token_stats", "logits_grad", ((8, 6), False), ((201, 6), True),
    ]  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 8, 201, 4097])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_begin_on_boundaries_of_16_bytes(vocab, dtype):
    head = linear.Head(torch.zeros(vocab, 2), None, 1.0, None, "cpu")
    room = head.room(3, vocab, dtype)
    assert room.shape == (3, vocab)
    assert room.stride(0) * room.element_size() % 16 == 0


def test_the_constants_of_cuda_are_those_of_the_prediction():
    # docs/kernels.md: 39.4 ms at T = 8192, V = 131072 on an H100 are two chunks of 4096 whole rows.
    assert linear.TILING["cuda"].keep == (4096, linear.WHOLE_VOCABULARY)
    assert linear.TILING["cuda"].keep_from == 8192


@pytest.mark.parametrize("widens", [True, False])
def test_16_bit_products_are_added_in_float32_with_every_pytorch(widens, monkeypatch):
    """With stand-ins for torch.mm and torch.addmm with out_dtype, which CUDA has; some versions refuse the second."""
    mm, attempts = torch.mm, []

    def fake_mm(a, b, out_dtype=None, out=None):
        product = mm(a.to(out_dtype), b.to(out_dtype))
        return product if out is None else out.copy_(product)

    def fake_addmm(x, a, b, out_dtype, out):
        attempts.append(tuple(out.shape))
        if not widens:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        return out.copy_(x + mm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(torch, "mm", fake_mm)
    monkeypatch.setattr(torch, "addmm", fake_addmm)
    linear._addmm_widens.cache_clear()
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(17000, 3, generator=g).bfloat16(), torch.randn(3, 5, generator=g).bfloat16()
    out = torch.ones(17000, 5)
    for _ in range(2):
        linear.multiply(out, a, b, add=True)
    linear._addmm_widens.cache_clear()
    torch.testing.assert_close(out, 1 + 2 * (a.float() @ b.float()))
    assert attempts == [(16, 16), *([(17000, 5)] * 2 if widens else [])]  # asked once, not per call


@pytest.mark.parametrize(("tokens", "keeps"), [(2047, False), (2048, True)])
def test_the_schedule_follows_from_the_number_of_tokens(tokens, keeps, monkeypatch):
    taken = []
    monkeypatch.setattr(linear, "statistics", lambda *args: taken.append("recompute") or 1 / 0)
    monkeypatch.setattr(linear, "statistics_and_gradients", lambda *args: taken.append("keep") or 1 / 0)
    hidden, weight = torch.zeros(tokens, 1, requires_grad=True), torch.zeros(2, 1)
    zeros = torch.zeros(tokens)
    with pytest.raises(ZeroDivisionError):
        linear_policy_loss(hidden, weight, zeros.long(), zeros, zeros, zeros == 0, objective=PolicyObjective())
    assert taken == ["keep" if keeps else "recompute"]
