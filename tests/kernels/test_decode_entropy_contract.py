"""Claims about how decode_entropy is called: input that does not fit is an error that names it, gradients are refused
and never lost, and it works under torch.compile, opcheck and inference mode."""

import pytest
import torch

from aepo_kernels.ops.decode_entropy import decode_entropy
from aepo_kernels.testing import make_labels, make_logits

STAGE = "decode_entropy"
LOGITS = torch.zeros(4, 9)
SLOTS = torch.arange(4)
OUT = torch.zeros(6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": LOGITS.long()}, TypeError, "logits must be bfloat16.*; got torch.int64"),
        ({"logits": LOGITS[None]}, ValueError, r"logits must be \[B, V\]; got shape \(1, 4, 9\)"),
        ({"logits": LOGITS[:, ::2]}, ValueError, r"logits must have a contiguous last dimension; got strides \(9, 2\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0 and finite; got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \(4,\) like the rows"),
        ({"temperature": torch.ones(4, dtype=int)}, TypeError, "temperature must be bfloat16"),
        ({"temperature": torch.tensor([1, 1, 0.0, 1])}, ValueError, "temperature must be > 0 and finite.*; got 0.0"),
        ({"temperature": "1"}, TypeError, "temperature must be a float; got str"),
        (
            {"out": torch.zeros(4, 1)},
            ValueError,
            r"out must be a 1-D torch.float32 .*got torch.float32 of shape \(4, 1",
        ),
        ({"out": OUT.double()}, ValueError, "out must be a 1-D torch.float32 .*; got torch.float64"),
        ({"out": torch.zeros(1).expand(6)}, ValueError, r"out must be .* a place of its own.* strides \(0,\)"),
        ({"out": OUT.to("meta")}, ValueError, "out must be on cpu like logits; got meta"),
        ({"out": OUT[:3], "slots": None}, ValueError, "out must have a place for each of the 4 rows.*; got 3"),
        ({"out": None}, ValueError, "slots was given without out"),
        ({"out": None, "slots": None, "logprobs_out": OUT}, ValueError, "logprobs_out was given without out"),
        ({"slots": SLOTS.float()}, TypeError, "slots must have an integer dtype; got torch.float32"),
        ({"slots": SLOTS[:3]}, ValueError, r"slots must have shape \(4,\) like the rows of logits; got \(3,\)"),
        ({"slots": SLOTS + 3}, ValueError, "slots must be below N = 6 of out .*; got 6"),
        ({"slots": SLOTS // 2}, ValueError, "slots must differ from row to row; got 0 more than once"),
        ({"tokens": SLOTS}, ValueError, "tokens and logprobs_out must be given together"),
        ({"logprobs_out": OUT}, ValueError, "tokens and logprobs_out must be given together"),
        ({"tokens": SLOTS + 6, "logprobs_out": OUT}, ValueError, r"tokens must be in \[0, V\) with V = 9; got 9"),
        ({"tokens": SLOTS, "logprobs_out": OUT[:5]}, ValueError, r"logprobs_out must have shape \(6,\) like out"),
        ({"tokens": [0] * 4, "logprobs_out": OUT}, TypeError, "tokens must be a tensor; got list"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve this call: it serves CUDA tensors"),
        ({"backend": "none"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        decode_entropy(**{"logits": LOGITS, "out": OUT, "slots": SLOTS, **changes})
    assert OUT.eq(0).all()


def test_values_of_rows_that_nobody_wants_are_not_checked(backend):
    slots = torch.tensor([-1, -1, 0, 1])
    tokens = torch.tensor([-5, 9, 3, 3])
    temperature = torch.tensor([0.0, -1.0, 1.0, 1.0])
    out = torch.zeros(2)
    decode_entropy(LOGITS, temperature, out, slots, tokens=tokens, logprobs_out=torch.zeros(2), backend=backend)
    torch.testing.assert_close(out, torch.tensor(9.0).log().expand(2))


def test_a_gradient_is_refused_and_never_lost():
    logits = make_logits(4, 9).requires_grad_()
    with pytest.raises(ValueError, match=r"logits requires a gradient, and decode_entropy has none.*no_grad"):
        decode_entropy(logits)
    with pytest.raises(ValueError, match="temperature requires a gradient"):
        decode_entropy(LOGITS, torch.ones(4, requires_grad=True))
    with torch.no_grad():
        assert not decode_entropy(logits).requires_grad
    out = torch.ones(4)
    scale = torch.ones(4, requires_grad=True)
    loss = (out * scale).sum()  # needs `out` as it is for its backward
    decode_entropy(LOGITS, None, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(backend):
    logits, outside = make_logits(4, 9), torch.zeros(4)
    with torch.inference_mode():
        inside = decode_entropy(logits, backend=backend)
        assert decode_entropy(logits.clone(), None, inside.clone(), backend=backend).is_inference()
        decode_entropy(logits, None, outside, backend=backend)
    assert torch.equal(outside, inside)


def operations():
    logits = make_logits(4, 23)
    tokens, temperatures, slots = make_labels(logits), torch.ones(4), torch.tensor([5, -1, 0, 2])
    yield "decode_entropy", (logits, None, 0.7, None, None)
    yield "decode_entropy", (logits, temperatures, 1.0, tokens, None)
    yield "decode_entropy_", (logits, None, 0.7, None, None, torch.zeros(4), None, None)
    yield "decode_entropy_", (logits, temperatures, 1.0, slots, tokens, torch.zeros(6), torch.zeros(6), None)


@pytest.mark.parametrize("case", range(4))
def test_opcheck(case):
    name, args = list(operations())[case]
    torch.library.opcheck(getattr(torch.ops.aepo, name).default, args)


def test_another_batch_does_not_recompile():
    # Batches grow and shrink with every finished request.
    def step(logits, temperature, out, slots):
        return decode_entropy(logits, temperature, out, slots) + decode_entropy(logits).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    def inputs(rows):
        return make_logits(rows, 23), torch.ones(rows), torch.zeros(64), torch.arange(rows, dtype=torch.int32)

    for rows in (8, 7):  # the second call makes the batch dynamic
        compiled(*inputs(rows))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 12):
            assert torch.equal(compiled(*inputs(rows)), step(*inputs(rows)))


def test_compiles_into_one_graph():
    logits = make_logits(4, 23)
    tokens, slots = make_labels(logits), torch.tensor([5, -1, 0, 2])

    def step(logits, temperature, out, logprobs_out):
        decode_entropy(logits * 1, temperature, out, slots, tokens=tokens, logprobs_out=logprobs_out)
        return out + decode_entropy(logits, 0.7).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outputs = []
    for function in (step, compiled):
        buffers = torch.zeros(6), torch.zeros(6)
        outputs.append((function(logits, torch.full((4,), 0.5), *buffers), *buffers))
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)
    assert outputs[0][1].ne(0).sum() == 3


def test_buffers_that_are_written_are_known_to_autograd(backend):
    buffers = torch.zeros(6), torch.zeros(6)
    before = [buffer._version for buffer in buffers]
    tokens = torch.zeros(4, dtype=torch.int64)
    decode_entropy(LOGITS, out=buffers[0], slots=SLOTS, tokens=tokens, logprobs_out=buffers[1], backend=backend)
    assert all(buffer._version > version for buffer, version in zip(buffers, before, strict=True))
