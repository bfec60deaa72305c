"""Our linear operation in the place of TRL's head: at least as near to float64 as TRL's, alone, in models and in
trainers, where it is put and where it is taken away again."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import pytest
import torch
import trl_toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from aepo.integrations.trl import head
from aepo.integrations.trl.head import Head, linear_head, patch_trl, unpatch_trl

BOTH = ("log_probs", "entropy")
CHUNK = 32768  # entries of the vocabulary in a tile of TRL's
TRLS = (utils._ChunkedLogProbFunction, utils._use_triton)


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == TRLS


class Case(NamedTuple):
    """A call, and the weights of the sum of its results that is differentiated."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = BOTH
    autocast: bool = False


def make_case(
    tokens=9, size=33, vocab=61, *, dtypes=(torch.float32, torch.float32), bias=True, seed=0, **others
) -> Case:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, size, generator=g), torch.randn(vocab, size, generator=g) * 2 / size**0.5
    offset = torch.randn(vocab, generator=g).to(dtypes[1]) if bias else None
    targets = torch.randint(vocab, (tokens,), generator=g)
    return Case(hidden.to(dtypes[0]), weight.to(dtypes[1]), offset, targets, **others)


def of_sum(case: Case, leaves: dict[str, Tensor], logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
    """Results, and gradients of a sum of them with weights of different sizes and signs."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)
    total = (logprobs.double() * weights).sum()
    found = {"log_probs": logprobs.detach()}
    if entropy is not None:
        total = total + (entropy.double() * weights.flip(0) / 3).sum()
        found["entropy"] = entropy.detach()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    given = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    return {n: x.to(dtype or x.dtype).clone().requires_grad_() for n, x in given.items() if x is not None}


def truth(case: Case) -> dict[str, Tensor]:
    leaves = leaves_of(case, torch.float64)
    z = (leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", 0.0)) * case.logit_scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    logs = torch.log_softmax(z / case.temperature, -1)
    entropy = -(logs.exp() * logs).sum(-1) if "entropy" in case.outputs else None
    return of_sum(case, leaves, logs.gather(1, case.targets[:, None])[:, 0], entropy)


def by(function: Any, case: Case) -> dict[str, Tensor]:
    leaves = leaves_of(case)
    with torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext():
        logprobs, entropy, *others = function.apply(
            leaves["hidden"],
            leaves["weight"],
            leaves.get("bias"),
            case.targets,
            case.temperature,
            CHUNK,
            case.softcap,
            case.logit_scale,
            case.outputs,
        )
    assert others == [None, None, None]
    assert (entropy is None) == ("entropy" not in case.outputs)
    return of_sum(case, leaves, logprobs, entropy)


def errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == true.keys()
    return {name: float((found[name].double() - true[name]).abs().amax()) for name in true if true[name].numel()}


def assert_as_near(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Ours is no farther from the truth than TRL's, or than a floor: 4 roundings of the largest number of its kind (or
    of 1), to its own dtype and, times what multiplies the logits, to float32. Sums in two orders differ by about that.
    """
    true, ours = truth(case), by(Head(ChunkedLogProbFunction), case)
    mine, theirs = errors(ours, true), errors(by(ChunkedLogProbFunction, case), true)
    for name, error in mine.items():
        rounding = torch.finfo(ours[name].dtype).eps + 2.0**-23 * case.logit_scale / case.temperature
        floor = 4 * rounding * max(1.0, float(true[name].abs().amax()))
        assert error <= max(theirs[name], floor), (name, error, theirs[name], floor)
    kinds = {name: x.dtype for name, x in ours.items() if name.startswith("grad")}
    assert kinds == {f"grad_{name}": x.dtype for name, x in leaves_of(case).items()}
    assert ours["log_probs"].dtype == torch.float32
    return mine, theirs


BF16, F32 = torch.bfloat16, torch.float32
CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 2.0, "temperature": 1.3},
    "logit_scale": {"logit_scale": 0.25},
    "softcap after logit_scale": {"logit_scale": 3.0, "softcap": 2.0, "temperature": 0.7},
    "without bias": {"bias": False},
    "log-probs alone": {"outputs": ("log_probs",)},
    "one token": {"tokens": 1},
    "no token": {"tokens": 0},
    "several tiles": {"tokens": 600, "vocab": 5003, "size": 8},  # ours are 512 rows of 4096 entries
}
NARROW = {
    "bfloat16": {"dtypes": (BF16, BF16)},
    "bfloat16 hidden": {"dtypes": (BF16, F32)},
    "bfloat16 weight": {"dtypes": (F32, BF16)},
    "autocast": {"autocast": True},
    "autocast, bfloat16 hidden": {"autocast": True, "dtypes": (BF16, F32)},
}


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_near_to_the_truth_as_trl(name):
    assert_as_near(make_case(**CASES[name]))


@pytest.mark.parametrize("name", NARROW)
def test_logits_are_not_rounded_to_16_bits(name):
    mine, theirs = assert_as_near(make_case(**NARROW[name]))
    for result in BOTH:
        assert mine[result] < 5e-6  # float32, whatever the operands are
        if name != "bfloat16 weight":  # which TRL widens, as hidden is float32
            assert theirs[result] > 1e-3  # TRL rounds these logits: the difference is there to be seen


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, F32)])
def test_no_gradient_is_rounded_on_its_way_to_a_float32_parameter(dtypes):
    mine, _ = assert_as_near(make_case(dtypes=dtypes, autocast=True))
    assert mine["grad_weight"] < 1e-5  # one rounding to bfloat16 is 2e-3 of it


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 7), st.integers(1, 9), st.integers(1, 40)),
    temperature=st.floats(0.3, 3),
    softcap=st.none() | st.floats(0.5, 20),
    logit_scale=st.floats(0.05, 4),
    bias=st.booleans(),
    outputs=st.sampled_from([BOTH, ("log_probs",), ("entropy", "log_probs")]),
    dtypes=st.tuples(*[st.sampled_from([F32, BF16])] * 2),
    seed=st.integers(0, 99),
)
def test_any_shape_is_as_near_to_the_truth_as_trl(shape, **case):
    assert_as_near(make_case(*shape, **case))


def test_what_ours_does_not_do_is_trls():
    """In bfloat16, where the two differ in the third digit."""
    case = make_case(dtypes=(BF16, BF16))
    call = [case.hidden, case.weight, case.bias, case.targets, 1.0, CHUNK, None, 1.0, BOTH]
    cut = case.weight.clone()
    cut.ds_id = 7
    everything = (*BOTH, "log_sum_sq_probs", "mean_logits", "is_top1")
    changes = {"outputs": (8, everything), "scale 0": (7, 0.0), "scale < 0": (7, -0.5), "ZeRO-3": (1, cut)}
    for name, (place, value) in changes.items():
        changed = [*call[:place], value, *call[place + 1 :]]
        ours, theirs = (f.apply(*changed) for f in (Head(ChunkedLogProbFunction), ChunkedLogProbFunction))
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name
    assert not torch.equal(Head(ChunkedLogProbFunction).apply(*call)[0], ChunkedLogProbFunction.apply(*call)[0])
    assert not head.serves(case.weight.to("meta"), None, 1.0, BOTH)


def model_and_batch():
    model = trl_toys.make_model(trl_toys.make_tokenizer())
    utils.add_fused_lm_head(model, temperature=0.7, outputs=BOTH)
    ids = torch.arange(12).view(2, 6) + 40
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 5:] = -100
    return model, ids, labels


@pytest.mark.parametrize("ours", [True, False])
def test_masked_positions_are_not_multiplied(ours):
    """Theirs are, on a CPU: a NaN there comes back with the gradient of the head."""
    model, ids, labels = model_and_batch()
    counts = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    model.model.norm.register_forward_hook(lambda _, __, x: x.masked_fill(~counts[..., None], torch.nan))
    with linear_head() if ours else contextlib.nullcontext():
        out = model(ids, labels=labels, fused_lm_head=True)
    (out.log_probs.sum() + out.entropy.sum()).backward()
    assert out.log_probs[0, :3].tolist() == [0, 0, 0]
    assert out.log_probs[0, 3] < 0
    assert bool(model.lm_head.weight.grad.isfinite().all()) == ours


def test_a_micro_batch_without_a_label_is_a_differentiable_zero():
    model, ids, labels = model_and_batch()
    with linear_head():
        out = model(ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0
    assert model.lm_head.weight.grad.count_nonzero() == 0


def in_place() -> bool:
    ours = [isinstance(utils._ChunkedLogProbFunction, Head), utils._use_triton(torch.device("cpu"))]
    assert ours[0] == ours[1]
    assert not utils._use_triton(torch.device("meta"))
    return ours[0]


def test_a_block_ends_as_it_began():
    with linear_head() as outer:
        assert outer
        assert in_place()
        with pytest.raises(KeyError), linear_head():
            raise KeyError
        assert in_place()
    assert not in_place()


def test_a_patch_outlives_blocks():
    assert [patch_trl(), patch_trl()] == [True, True]
    theirs = utils._ChunkedLogProbFunction.theirs
    with linear_head():
        assert utils._ChunkedLogProbFunction.theirs is theirs is TRLS[0]  # not ours in ours
    assert in_place()
    unpatch_trl()
    unpatch_trl()
    assert not in_place()
    with linear_head():
        patch_trl()
    assert in_place()
    with linear_head():
        unpatch_trl()
        assert in_place()
    assert not in_place()
