"""Claims about decode_entropy that only a GPU can show: nothing waits for the device, a call can be captured in a CUDA
graph and replayed beside other work, launches on several streams do not meet in the workspace, and rows agree with
float64 however they are split. The backend cuda needs one launch."""

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels.ops.decode_entropy import decode_entropy
from aepo_kernels.testing import make_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
KERNELS = [
    name
    for name in ("triton", "cuda")
    if torch.cuda.is_available() and backends.unserved(name, torch.zeros(1, device=DEVICE), "decode_entropy") is None
]
VOCAB = 151_936


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def arguments(rows, vocab=VOCAB, dtype=torch.float32, seed=0):
    """(logits, temperature, out, slots) and keywords of a call that fills every second slot."""
    logits = make_logits(rows, vocab, dtype=dtype, seed=seed).to(DEVICE)
    temperature = torch.linspace(0.5, 1.5, rows, device=DEVICE)
    slots = 2 * torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    out, logprobs_out = torch.zeros(2, 2 * rows, device=DEVICE).unbind()
    tokens = torch.arange(rows, device=DEVICE)
    return (logits, temperature, out, slots), {"tokens": tokens, "logprobs_out": logprobs_out}


def call(positional, keywords, kernel):
    decode_entropy(*positional, **keywords, backend=kernel)
    return positional[2], keywords["logprobs_out"]


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300, 1200])
def test_every_way_to_split_rows_agrees_with_float64(rows, kernel):
    positional, keywords = arguments(rows, VOCAB if rows <= 64 else 20_011)
    ours = [x.clone() for x in call(positional, keywords, kernel)]
    truth = call((positional[0].double(), positional[1], torch.zeros_like(ours[0], dtype=torch.float64), positional[3]),
                 {**keywords, "logprobs_out": torch.zeros_like(ours[1], dtype=torch.float64)}, "reference")  # fmt: skip
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=5e-6, atol=1e-6)
        assert got[1::2].eq(0).all()


def test_nothing_waits_for_the_gpu(kernel):
    positional, keywords = arguments(7)
    call(positional, keywords, kernel)  # compiles, and makes the workspace
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(positional, keywords, kernel)
        decode_entropy(positional[0], 0.7, backend=kernel)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("cuda" not in KERNELS, reason="the extension was built without CUDA code")
@pytest.mark.parametrize("rows", [1, 64, 1200])
def test_the_cuda_backend_is_one_launch(rows):
    positional, keywords = arguments(rows, 50_257)
    call(positional, keywords, "cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(positional, keywords, "cuda")
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1, launched
    assert "decode_entropy_kernel" in launched[0]


def capture(positional, keywords, kernel):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(positional, keywords, kernel)
    return graph


@pytest.mark.parametrize("rows", [1, 64])
def test_a_captured_call_sees_new_inputs_at_every_replay(rows, kernel):
    positional, keywords = arguments(rows)
    call(positional, keywords, kernel)
    graph = capture(positional, keywords, kernel)
    for seed in (1, 2, 3):
        positional[0].copy_(make_logits(rows, VOCAB, seed=seed))
        positional[3].copy_(positional[3].flip(0))
        expected = [x.clone() for x in call(positional, keywords, kernel)]
        for buffer in (positional[2], keywords["logprobs_out"]):
            buffer.zero_()
        graph.replay()
        for got, want in zip((positional[2], keywords["logprobs_out"]), expected, strict=True):
            assert torch.equal(got, want)


def test_streams_and_graphs_do_not_meet_in_the_workspace(kernel):
    problems = [arguments(rows, seed=rows) for rows in (1, 2, 3, 5)]
    expected = [[x.clone() for x in call(*problem, kernel)] for problem in problems]
    for problem in problems[2:]:  # the kernels are compiled; graphs are captured before the streams run
        problem[0][2].zero_()
    graphs = [capture(*problem, kernel) for problem in problems[2:]]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(200):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 2:
                    call(*problems[i], kernel)
                else:
                    graphs[i - 2].replay()
    torch.cuda.synchronize()
    for (positional, keywords), want in zip(problems, expected, strict=True):
        assert torch.equal(positional[2], want[0])
        assert torch.equal(keywords["logprobs_out"], want[1])


def test_equal_inputs_give_equal_bits_whoever_finishes_last(kernel):
    positional, _ = arguments(3)
    first = decode_entropy(positional[0], backend=kernel)
    for _ in range(100):
        assert torch.equal(decode_entropy(positional[0], backend=kernel), first)


def test_offsets_have_64_bits(kernel):
    stride = 2**31 + 8
    memory = torch.zeros(stride + 1000, dtype=torch.bfloat16, device=DEVICE)
    rows = memory.as_strided((2, 1000), (stride, 1))
    logits = make_logits(2, 1000, dtype=torch.bfloat16).to(DEVICE)
    rows.copy_(logits)
    torch.testing.assert_close(
        decode_entropy(rows, backend=kernel), decode_entropy(logits, backend=kernel), rtol=1e-6, atol=1e-6
    )
