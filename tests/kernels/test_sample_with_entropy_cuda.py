"""Claims about the sampler that only a GPU can show: nothing waits for the device, a call can be captured in a CUDA
graph and replayed beside other work, launches on several streams do not meet in the workspace, and however rows are
split they draw the reference's tokens. The backend cuda needs one launch."""

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels import decode_entropy, sample_with_entropy
from aepo_kernels.testing import make_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE, STAGE = "cuda", "sample_with_entropy"
KERNELS = [
    name
    for name in ("triton", "cuda")
    if torch.cuda.is_available() and backends.unserved(name, torch.zeros(1, device=DEVICE), STAGE) is None
]
VOCAB = 151_936
FILTERS = {"none": {}, "top_k": {"top_k": 50}, "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.02}}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def arguments(rows, vocab=VOCAB, dtype=torch.float32, seed=0, **filters):
    """Logits and keywords of a call, all of them tensors on the GPU, which a call takes as they are."""
    logits = make_logits(rows, vocab, dtype=dtype, seed=seed).to(DEVICE)
    keywords = {
        "temperature": torch.linspace(0.5, 1.5, rows, dtype=torch.float64, device=DEVICE),
        "seed": torch.arange(rows, device=DEVICE),
        "offset": torch.full((rows,), 2**40 + seed, device=DEVICE),
    }
    for name, value in filters.items():
        keywords[name] = torch.full(
            (rows,), value, dtype=torch.int64 if name == "top_k" else torch.float64, device=DEVICE
        )
    return logits, keywords


def call(logits, keywords, kernel):
    return sample_with_entropy(logits, **keywords, backend=kernel)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300, 1200])
def test_every_way_to_split_rows_draws_the_tokens_of_the_reference(rows, filters, kernel):
    logits, keywords = arguments(rows, VOCAB if rows <= 64 else 20_011, **FILTERS[filters])
    ours, truth = call(logits, keywords, kernel), call(logits.double(), keywords, "reference")
    assert torch.equal(ours.tokens, truth.tokens)
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(ours.entropy.double(), truth.entropy, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_may_begin_anywhere(dtype, kernel):
    padded = torch.full((8, 50_263), torch.nan, dtype=dtype, device=DEVICE)  # odd: on all places in a word
    rows = padded[:, 3:50_260]
    rows.copy_(make_logits(8, 50_257, dtype=dtype))
    _, keywords = arguments(8, 8, top_p=0.9)
    assert torch.equal(call(rows, keywords, kernel).tokens, call(rows.double(), keywords, "reference").tokens)


@pytest.mark.skipif("cuda" not in KERNELS, reason="the extension was built without CUDA code")
def test_statistics_are_those_of_decode_entropy():
    logits, keywords = arguments(5)
    keywords["temperature"] = keywords["temperature"].float()
    drawn = call(logits, keywords, "cuda")
    entropy, logprobs = decode_entropy(logits, keywords["temperature"], tokens=drawn.tokens, backend="cuda")
    torch.testing.assert_close(drawn.entropy, entropy, rtol=1e-6, atol=1e-6)  # the same code on the same parts
    torch.testing.assert_close(drawn.logprobs, logprobs, rtol=1e-6, atol=1e-6)


def test_nothing_waits_for_the_gpu(kernel):
    logits, keywords = arguments(7, **FILTERS["all"])
    call(logits, keywords, kernel)  # compiles, and makes the workspace
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(logits, keywords, kernel)
        sample_with_entropy(logits, temperature=0.7, top_p=0.9, seed=3, backend=kernel)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("cuda" not in KERNELS, reason="the extension was built without CUDA code")
@pytest.mark.parametrize("rows", [1, 64, 1200])
def test_the_cuda_backend_is_one_launch(rows):
    logits, keywords = arguments(rows, 50_257, **FILTERS["all"])
    # conftest.py poisons new memory, with a launch of its own for each of the results.
    torch.utils.deterministic.fill_uninitialized_memory = False
    call(logits, keywords, "cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(logits, keywords, "cuda")
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1, launched
    assert "sample_with_entropy_kernel" in launched[0]


def capture(logits, keywords, kernel):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(logits, keywords, kernel)
    return graph, results


@pytest.mark.parametrize("rows", [1, 64])
def test_a_captured_call_sees_new_inputs_at_every_replay(rows, kernel):
    logits, keywords = arguments(rows, **FILTERS["all"])
    call(logits, keywords, kernel)
    graph, results = capture(logits, keywords, kernel)
    for seed in (1, 2, 3):
        logits.copy_(make_logits(rows, VOCAB, seed=seed))
        keywords["offset"] += 1
        expected = call(logits, keywords, kernel)
        results.tokens.zero_()
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def test_streams_and_graphs_do_not_meet_in_the_workspace(kernel):
    problems = [arguments(rows, seed=rows, **FILTERS["all"]) for rows in (1, 2, 3, 5)]
    expected = [call(*problem, kernel) for problem in problems]
    graphs = [capture(*problem, kernel) for problem in problems[2:]]
    streams = [torch.cuda.Stream() for _ in problems]
    results = [None, None, *(each for _, each in graphs)]
    torch.cuda.synchronize()
    for _ in range(200):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 2:
                    results[i] = call(*problems[i], kernel)
                else:
                    graphs[i - 2][0].replay()
    torch.cuda.synchronize()
    for ours, want in zip(results, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, want, strict=True))


def test_equal_inputs_give_equal_bits_whoever_finishes_last(kernel):
    logits, keywords = arguments(3, top_p=0.5)
    first = call(logits, keywords, kernel)
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(call(logits, keywords, kernel), first, strict=True))
