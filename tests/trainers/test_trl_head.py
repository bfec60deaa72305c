"""Our linear operation in the place of TRL's head: at least as near to float64 as TRL's, alone and in models;
where it is put and where it is taken away again."""

from __future__ import annotations

import contextlib

import pytest
import torch
import trl_toys
from head_cases import BOTH, CHUNK, Case, by, leaves_of, make_case, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from aepo.integrations.trl import head
from aepo.integrations.trl.head import Head, linear_head, patch_trl, unpatch_trl

TRLS = (utils._ChunkedLogProbFunction, utils._use_triton)


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == TRLS


def errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == true.keys()
    return {name: float((found[name].double() - true[name]).abs().amax()) for name in true if true[name].numel()}


def largest_logit(case: Case) -> float:
    z = case.hidden.double() @ case.weight.double().T * (case.logit_scale / case.temperature)
    return float(z.abs().max()) if len(z) else 0.0


def assert_as_near(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Ours is no farther from the truth than TRL's, or than a floor of 2 roundings: of the result to its dtype, and of
    the largest logit to float32, which is an absolute error of log-probs and a relative one of gradients."""
    true, ours = truth(case), by(Head(ChunkedLogProbFunction), case)
    mine, theirs = errors(ours, true), errors(by(ChunkedLogProbFunction, case), true)
    for name, error in mine.items():
        rounding = torch.finfo(ours[name].dtype).eps + torch.finfo(torch.float32).eps * largest_logit(case)
        floor = 2 * rounding * max(1.0, float(true[name].abs().amax()))
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


F16, F64 = torch.float16, torch.float64


@pytest.mark.parametrize(
    ("device", "autocast", "tensors", "expected"),
    [
        ("cuda", BF16, (F32, F32, F32), (F32, BF16)),  # TRL's default on a GPU
        ("cuda", BF16, (BF16, F32), (F32, BF16)),
        ("cuda", F16, (F32, F32), (F32, F16)),
        ("cuda", BF16, (BF16, BF16), (BF16, BF16)),
        ("cuda", None, (BF16, BF16), (BF16, BF16)),
        ("cuda", None, (BF16, F32), (F32, BF16)),
        ("cuda", None, (F32, F32), (F32, F32)),
        ("cuda", None, (F32, BF16), (F32, F32)),
        ("cuda", None, (BF16, BF16, F32), (F32, BF16)),
        ("cuda", F16, (BF16, BF16), (F32, F16)),  # neither holds the other's numbers
        ("cuda", BF16, (F64, F64), (F64, None)),
        ("cuda", BF16, (F32, F64), (F64, None)),
        ("cpu", BF16, (F32, F32), (F32, None)),
        ("cpu", BF16, (BF16, F32), (F32, None)),
        ("cpu", None, (BF16, BF16), (BF16, None)),
    ],
    ids=str,
)
def test_the_operation_is_told_what_to_round_and_takes_it(device, autocast, tensors, expected, monkeypatch):
    """On this CPU with the dtypes of a GPU: log-probs then have TRL's operands and float32 sums."""
    assert head.dtypes(device, autocast, *tensors) == expected
    given, operand_dtype = expected
    calls, operation = [], head.linear_logprobs_and_entropy
    monkeypatch.setattr(head, "dtypes", lambda *_: expected)
    monkeypatch.setattr(
        head,
        "linear_logprobs_and_entropy",
        lambda *args, **others: (calls.append((args, others)), operation(*args, **others))[1],
    )
    case = make_case(dtypes=tensors[:2])
    case = case._replace(bias=case.bias.to(tensors[-1]))
    found = by(Head(ChunkedLogProbFunction), case)
    ((args, others),) = calls
    assert {x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()} == {given}
    assert others == {"operand_dtype": operand_dtype}
    rounded = operand_dtype or given
    narrow = case._replace(hidden=case.hidden.to(rounded), weight=case.weight.to(rounded))
    for name in BOTH:
        assert (found[name] - truth(narrow)[name]).abs().max() < 5e-6
    assert {found[f"grad_{name}"].dtype for name in ("hidden", "weight")} == set(tensors[:2])


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


def test_masked_positions_are_not_multiplied(monkeypatch):
    """Six of ten have a label. On a CPU TRL multiplies all, so a NaN in the others reaches its gradients."""
    model, ids, labels = model_and_batch()
    counts = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    model.model.norm.register_forward_hook(lambda _, __, x: x.masked_fill(~counts[..., None], torch.nan))
    rows, operation = [], head.linear_logprobs_and_entropy
    monkeypatch.setattr(
        head,
        "linear_logprobs_and_entropy",
        lambda hidden, *args, **others: (rows.append(len(hidden)), operation(hidden, *args, **others))[1],
    )
    for block, finite in ((contextlib.nullcontext(), False), (linear_head(), True)):
        model.zero_grad()
        with block:
            out = model(ids, labels=labels, fused_lm_head=True)
        (out.log_probs.sum() + out.entropy.sum()).backward()
        assert out.log_probs[0, :3].tolist() == [0, 0, 0]
        assert out.log_probs[0, 3] < 0
        assert bool(model.lm_head.weight.grad.isfinite().all()) == finite
    assert rows == [6]


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
