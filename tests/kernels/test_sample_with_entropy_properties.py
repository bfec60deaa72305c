"""Claims about the sampler for any input: a token that it draws is one that an oracle keeps, at every size, stride,
dtype and setting; rows far apart in memory; what does not fit is named; registered, and compiles into one graph."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sample_with_entropy import STAGE, oracle_kept

from aepo_kernels import sample_with_entropy
from aepo_kernels.testing import make_logits

__all__ = ["STAGE"]  # read by conftest.py

LOGITS = make_logits(3, 19)


@st.composite
def problems(draw):
    """(row [V] in any of three dtypes inside NaN, settings)"""
    vocab = draw(st.integers(1, 300))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread, shift = draw(st.sampled_from([0.0, 0.3, 3.0, 50.0])), draw(st.sampled_from([0.0, -300.0, 1e4]))
    row = torch.randn(vocab, generator=g) * spread + shift
    if draw(st.booleans()):
        row = row.round()  # ties
    masked = torch.rand(vocab, generator=g) < draw(st.sampled_from([0.0, 0.5]))
    masked[draw(st.integers(0, vocab - 1))] = False
    before = draw(st.integers(0, 9))
    wide = torch.full((1, before + vocab + 9), torch.nan)
    wide[0, before : before + vocab] = row.masked_fill(masked, -torch.inf)
    wide = wide.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    chosen = {
        "temperature": draw(st.sampled_from([0.3, 1.0, 4.0])),
        "top_k": draw(st.none() | st.integers(1, 20) | st.just(2**31)),
        "top_p": draw(st.none() | st.floats(0.01, 1.0)),
        "min_p": draw(st.none() | st.floats(0.0, 1.0)),
    }
    return wide[:, before : before + vocab], chosen


def test_what_is_drawn_is_kept(backend, device):
    @settings(
        max_examples=8 if (backend, device) == ("triton", "cpu") else 150,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(problems(), st.integers(-(2**63), 2**63 - 1))
    def check(problem, seed):
        logits, chosen = problem
        draws = 2 if backend == "triton" else 8
        offset = torch.arange(draws, device=device)
        tokens = sample_with_entropy(
            logits.to(device).expand(draws, -1), seed=seed, offset=offset, backend=backend, **chosen
        ).tokens
        # A bound may fall on a token's mass to the last digits of float32: then either answer is right.
        loose = dict(chosen)
        if chosen["top_p"] is not None:
            loose["top_p"] = chosen["top_p"] + 1e-5
        if chosen["min_p"] is not None:
            loose["min_p"] = chosen["min_p"] * (1 - 1e-5)
        kept = oracle_kept(logits[0], **loose)
        assert kept[tokens.cpu()].all()

    check()


def test_rows_beyond_two_to_the_31_elements(backend):
    stride = 2**31 + 8
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture would touch all of it
    rows = torch.empty(stride + 19, dtype=torch.bfloat16).as_strided((2, 19), (stride, 1))
    rows.copy_(LOGITS[:2])
    far = sample_with_entropy(rows, seed=5, top_k=4, backend=backend)
    near = sample_with_entropy(rows.clone(), seed=5, top_k=4, backend=backend)
    assert torch.equal(far.tokens, near.tokens)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must be \[B, V\]; got shape \(2, 3, 4\)"),
        ({"logits": LOGITS.long()}, TypeError, "logits must be bfloat16.*; got torch.int64"),
        ({"logits": LOGITS.t()}, ValueError, "logits must have a contiguous last dimension"),
        ({"temperature": -0.1}, ValueError, "temperature must be >= 0 and finite; got -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be >= 0 and finite; got nan"),
        ({"temperature": "1"}, TypeError, r"temperature must be a number or a tensor \[B\]; got str"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must have shape \(3,\) like the rows.*; got \(2,\)"),
        ({"temperature": torch.tensor([1.0, torch.inf, 1.0])}, ValueError, "temperature must be >= 0.*inf for row 1"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1; got 0"),
        ({"top_k": 3.0}, TypeError, r"top_k must be an integer or a tensor \[B\]; got float"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k must have an integer dtype; got torch.float32"),
        ({"top_k": torch.tensor([3, -1, 0])}, ValueError, "top_k must be >= 1; got -1 for row 1"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": torch.tensor([0.5, 1.0, 1.1])}, ValueError, r"top_p must be in \(0, 1\]; got 1.1.* for row 2"),
        ({"top_p": torch.ones(3).long()}, TypeError, "top_p must be bfloat16.*; got torch.int64"),
        ({"min_p": 1.5}, ValueError, r"min_p must be in \[0, 1\]; got 1.5"),
        ({"min_p": True}, TypeError, r"min_p must be a number or a tensor \[B\]; got bool"),
        ({"seed": 2**63}, ValueError, "seed must be a 64-bit integer; got 9223372036854775808"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        (
            {"offset": torch.zeros(3, device="meta").long()},
            ValueError,
            "offset must be on cpu like the rows.*; got meta",
        ),
        ({"backend": "gpu"}, ValueError, "backend must be None or one of"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    arguments = {"logits": LOGITS, "seed": 0, **change}
    with pytest.raises(error, match=message):
        sample_with_entropy(arguments.pop("logits"), **arguments)


def test_opcheck():
    numbers = torch.full((3,), 0.7, dtype=torch.float64)
    integers = torch.arange(3) + 1
    args = (LOGITS, numbers, integers, numbers, numbers, integers, integers, None)
    torch.library.opcheck(torch.ops.aepo.sample_with_entropy.default, args)


def test_compiles_into_one_graph():
    def draw(logits, offset):
        return sample_with_entropy(logits, temperature=0.8, top_k=5, top_p=0.9, seed=3, offset=offset)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(LOGITS, LOGITS.argmax(-1)), draw(LOGITS, LOGITS.argmax(-1)), strict=True):
        assert torch.equal(got, expected)
