"""Claims about the CUDA decode kernel, shown without a GPU: its source is compiled for the host, where the threads of a
block are fibers and blocks run one after another (cuda_on_host/cuda_runtime.h).

Wherever a row begins and ends, into however many parts it is cut and in whatever order they are done, the results are
those of float64, the same bits in every order; what lies beside a row is not read into it; slots, tokens, temperatures
and the workspace are what cuda_kernels.h says.
"""

import ctypes

import pytest
import torch
from cuda_host import (
    SHREDDED,
    SPLIT,
    TILE,
    TOLERANCE,
    TYPES,
    VEC,
    WHOLE,
    WORDS,
    compile_for_host,
    make_workspace,
    needs_compiler,
    pointer,
    tickets,
)

from aepo_kernels.reference import token_stats
from aepo_kernels.testing import REGIMES, make_logits

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_for_host("decode_entropy.cpp", tmp_path_factory.mktemp("cuda_on_host"))


def launch(
    library, logits, temperature=1.0, blocks=WHOLE, order=0, slots=None, tokens=None, out=None, workspace=None
):  # fmt: skip
    """(entropy, logprobs), each [N] like `out`, which says what was there before."""
    rows, vocab = logits.shape
    entropy = torch.full((rows,), torch.nan) if out is None else out
    logprobs = None if tokens is None else torch.empty_strided(entropy.shape, entropy.stride()).copy_(entropy)
    workspace = make_workspace(blocks) if workspace is None else workspace
    per_row = temperature if isinstance(temperature, torch.Tensor) else None
    number = ctypes.c_float(1.0 if per_row is not None else temperature)
    is_64_bit = any(x is not None and x.dtype == torch.int64 for x in (slots, tokens))
    sizes = [ctypes.c_int64(x) for x in (rows, vocab, logits.stride(0))]
    library.decode_entropy_on_host(
        TYPES[logits.dtype], pointer(logits), *sizes, pointer(per_row), number, pointer(slots), pointer(tokens),
        ctypes.c_bool(is_64_bit), pointer(entropy), pointer(logprobs), ctypes.c_int64(len(entropy)),
        ctypes.c_int64(entropy.stride(0)), pointer(workspace), ctypes.c_int64(blocks), ctypes.c_uint(order),
    )  # fmt: skip
    assert tickets(workspace).eq(0).all()
    return entropy, logprobs


def check(library, logits, temperature=1.0, blocks=WHOLE):
    tokens = torch.arange(len(logits)) % logits.shape[1]
    logprobs, entropy, _, _ = token_stats(logits.double(), tokens, temperature, -100, False)
    ours = launch(library, logits, temperature, blocks, tokens=tokens)
    for name, got, true in zip(("entropy", "logprobs"), ours, (entropy, logprobs), strict=True):
        torch.testing.assert_close(
            got.double(), true, **TOLERANCE, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("blocks", [WHOLE, SPLIT, SHREDDED])
@pytest.mark.parametrize("dtype", TILE, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_in_whole_and_split_rows(library, regime, dtype, blocks):
    check(library, make_logits(3, 5 * TILE[dtype] + 19, regime, dtype), 0.7, blocks)


@pytest.mark.parametrize("dtype", TILE, ids=str)
def test_every_length_and_every_place_in_a_word(library, dtype):
    tile, vec = TILE[dtype], VEC[dtype]
    for vocab in (1, 2, vec - 1, vec, vec + 1, 1000, tile - 1, tile, tile + 1, 2 * tile - 1, 3 * tile + 13):
        logits = make_logits(2, vocab, dtype=dtype, seed=vocab)
        # Beside the rows stands what must not be read into the result. An odd stride moves each row within a word.
        padded = torch.full((2 * vec, (vocab + 2 * vec) | 1), torch.nan, dtype=dtype)
        padded[1::2] = torch.inf
        rows = padded[:, vec : vec + vocab]
        rows.copy_(logits.repeat(vec, 1))
        assert len({row.data_ptr() % 16 for row in rows}) == vec
        for blocks in (WHOLE, SHREDDED):
            check(library, rows, 1.3, blocks)


# Where the maximum sits decides which words are read twice: both ends, both sides of a step, of a tile and of a part.
@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
@pytest.mark.parametrize("dtype", TILE, ids=str)
def test_confident_rows_keep_their_entropy_wherever_the_maximum_is(library, dtype, blocks):
    tile = TILE[dtype]
    step, vocab = tile // WORDS, 3 * tile + 19
    places = torch.tensor([0, 3, 4, step - 1, step, 2 * step + 5, tile - 1, tile, 2 * tile + 77, 3 * tile, vocab - 1])
    gap = torch.tensor([31.0, 22.0, 15.0]).repeat(4)[: len(places), None]  # H of about 1e-8, 6e-5 and 0.1 nats
    logits = make_logits(len(places), vocab).mul(0.5).scatter(1, places[:, None], gap).to(dtype)
    truth = token_stats(logits.double(), None, 1.0, -100, False)[1]
    assert 1e-9 < truth.min() < 1e-7
    torch.testing.assert_close(launch(library, logits, blocks=blocks)[0].double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
def test_minus_inf_ties_and_the_lowest_number(library, blocks):
    tile = TILE[torch.float32]
    vocab = 3 * tile + 19
    logits = make_logits(8, vocab)
    logits[0, : 2 * tile] = -torch.inf  # whole parts of nothing
    logits[1, tile:] = -torch.inf
    logits[2] = -torch.inf
    logits[2, tile] = -300.0
    logits[3, :] = torch.finfo(torch.float32).min  # finite: ln V
    logits[4, : 2 * tile] = torch.finfo(torch.float32).min
    logits[5] = 7.0  # every logit is the maximum
    logits[6] = -20.0
    logits[6, [5, vocab - 1]] = 10.0  # two maxima, in the first and last part
    logits[7] -= 300.0
    check(library, logits, 1.0, blocks)
    entropy, _ = launch(library, logits, blocks=blocks)
    assert entropy[2] == 0
    assert entropy[6].item() == pytest.approx(0.6931471805599453, rel=1e-6)


@pytest.mark.parametrize("place", [0, 2 * 2048 + 1, 3 * 2048 + 18])
@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
def test_an_undefined_row_is_nan(library, place, blocks):
    logits = make_logits(4, 3 * 2048 + 19)
    logits[0, place] = torch.nan
    logits[1, place] = torch.inf
    logits[2] = -torch.inf
    entropy, logprobs = launch(library, logits, blocks=blocks, tokens=torch.zeros(4, dtype=torch.int32))
    assert entropy.isnan().tolist() == logprobs.isnan().tolist() == [True, True, True, False]


def test_each_row_has_its_temperature(library):
    logits = make_logits(1, 3000).repeat(10, 1)
    valid = torch.tensor([1e-3, 0.05, 0.7, 1.0, 50.0, 1e-39])  # the last is not normal: 1 / temperature overflows
    wrong = torch.tensor([0.0, -1.0, torch.nan, torch.inf])
    entropy, _ = launch(library, logits, torch.cat((valid, wrong)), SPLIT)
    truth = token_stats(logits[:6].double(), None, valid.double()[:, None], -100, False)[1]
    torch.testing.assert_close(entropy[:6].double(), truth, rtol=5e-6, atol=1e-7)
    assert entropy[6:].isnan().all()


def test_the_order_of_the_blocks_does_not_show_and_the_workspace_is_left_as_it_was_found(library):
    logits = make_logits(3, 100_000)  # 49 parts: more than a warp has lanes
    tokens = torch.tensor([0, 5, 99_999])
    workspace = make_workspace(SHREDDED)
    first = launch(library, logits, 0.7, SHREDDED, tokens=tokens, workspace=workspace)
    for order in range(1, 4):
        again = launch(library, logits, 0.7, SHREDDED, order, tokens=tokens, workspace=workspace)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    check(library, logits, 0.7, SHREDDED)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
def test_results_land_in_their_slots_and_nowhere_else(library, blocks, index):
    logits = make_logits(6, 5000)
    logits[1] = torch.nan  # nobody wants it
    slots = torch.tensor([3, -1, 0, 9, 2, -(2**31)], dtype=index)  # 9 is outside of out
    tokens = torch.tensor([0, 10**9, 4999, 3, 5000, -1], dtype=index)  # 5000 is outside of the vocabulary
    ring = torch.full((9, 4), 42.0)
    entropy, logprobs = launch(library, logits, blocks=blocks, slots=slots, tokens=tokens, out=ring[:, 1])
    wanted = [0, 2, 4]
    truth = token_stats(logits[wanted].double(), tokens[wanted].long(), 1.0, -100, False)
    torch.testing.assert_close(entropy[[3, 0, 2]].double(), truth[1], **TOLERANCE)
    torch.testing.assert_close(logprobs[[3, 0, 2]].double(), truth[0], **TOLERANCE, equal_nan=True)
    assert logprobs[2].isnan()
    assert ring[[1, 4, 5, 6, 7, 8]].eq(42).all()
    assert ring[:, [0, 2, 3]].eq(42).all()
    assert logprobs[[1, 4, 5, 6, 7, 8]].eq(42).all()


@pytest.mark.parametrize("rows", [1, 7, 64, 512, 100_000])
@pytest.mark.parametrize("vocab", [1, 2048, 50_257, 151_936, 262_144, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_cover_every_row_and_fit_the_gpu(library, dtype, vocab, rows):
    blocks, parts, tiles = 132 * 8, ctypes.c_int(), ctypes.c_int()  # of an H100
    arguments = [ctypes.c_int64(x) for x in (rows, vocab, blocks)]
    library.split_rows_on_host(
        ctypes.c_bool(dtype == torch.float32), *arguments, ctypes.byref(parts), ctypes.byref(tiles)
    )
    size, vec = TILE[dtype], VEC[dtype]
    assert parts.value * tiles.value * size >= vocab + vec - 1  # a row may start vec - 1 into its first word
    assert (parts.value - 1) * tiles.value * size < vocab + vec - 1  # and no block is idle
    assert parts.value == 1 or parts.value * rows <= blocks
