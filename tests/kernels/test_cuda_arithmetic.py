"""Claims about the arithmetic of the CUDA decode kernels, which a host compiler can run: the header that holds it is
compiled with the blocks, warps and lanes of the kernel as loops (cuda_emulation.cpp).

Wherever a row begins and ends, into however many parts it is cut and in whatever order they are done, the results are
those of float64, the same bits in every order; what lies beside a row is not read into it.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from aepo_kernels.reference import token_stats
from aepo_kernels.testing import REGIMES, make_logits

CXX = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
ROOT = Path(__file__).parents[2]
LANES, WORDS = 128, 4  # kThreads and kWords of csrc/cuda/lane_softmax.h
TILE = {torch.float32: LANES * WORDS * 4, torch.bfloat16: LANES * WORDS * 8}
# float32 sums of up to 4e4 terms in 128 lanes: a lane adds a few hundred terms one by one, which costs a few ulp.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}
WHOLE, SPLIT, SHREDDED = 1, 6, 10**6  # resident blocks: one per row; a few; as many as there are tiles


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("emulation") / "emulation.so"
    source = Path(__file__).with_name("cuda_emulation.cpp")
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run([CXX, *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


def emulate(library, logits, temperature=1.0, blocks=WHOLE, order=0):
    """(entropy, maximum, log_sum), each [B], as the kernel computes them."""
    rows, vocab = logits.shape
    temperatures = torch.as_tensor(temperature, dtype=torch.float32).expand(rows).contiguous()
    entropy, maximum, log_sum = torch.full((3, rows), torch.nan).unbind()
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(vocab), ctypes.c_int64(logits.stride(0)))
    results = [pointer(x) for x in (maximum, log_sum, entropy)]
    library.emulate(
        ctypes.c_bool(logits.dtype == torch.float32), pointer(logits), *sizes, pointer(temperatures),
        ctypes.c_int64(blocks), ctypes.c_uint(order), *results,
    )  # fmt: skip
    return entropy, maximum, log_sum


def check(library, logits, temperature=1.0, blocks=WHOLE):
    truth = token_stats(logits.double(), None, temperature, -100, False)[1:]
    for name, ours, true in zip(
        ("entropy", "maximum", "log_sum"), emulate(library, logits, temperature, blocks), truth, strict=True
    ):
        if name != "maximum":  # that of an undefined row goes nowhere
            torch.testing.assert_close(
                ours.double(), true, **TOLERANCE, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("blocks", [WHOLE, SPLIT, SHREDDED])
@pytest.mark.parametrize("dtype", TILE, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_in_whole_and_split_rows(library, regime, dtype, blocks):
    check(library, make_logits(3, 5 * TILE[dtype] + 19, regime, dtype), 0.7, blocks)


@pytest.mark.parametrize("dtype", TILE, ids=str)
def test_every_length_and_every_place_in_a_word(library, dtype):
    tile = TILE[dtype]
    vec = tile // LANES // WORDS
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
    torch.testing.assert_close(emulate(library, logits, blocks=blocks)[0].double(), truth, rtol=1e-5, atol=0)


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
    entropy = emulate(library, logits, blocks=blocks)[0]
    assert entropy[2] == 0
    assert entropy[6].item() == pytest.approx(0.6931471805599453, rel=1e-6)


@pytest.mark.parametrize("place", [0, 2 * 2048 + 1, 3 * 2048 + 18])
@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
def test_an_undefined_row_is_nan(library, place, blocks):
    logits = make_logits(4, 3 * 2048 + 19)
    logits[0, place] = torch.nan
    logits[1, place] = torch.inf
    logits[2] = -torch.inf
    entropy, _, log_sum = emulate(library, logits, blocks=blocks)
    assert entropy.isnan().tolist() == log_sum.isnan().tolist() == [True, True, True, False]


def test_each_row_has_its_temperature(library):
    logits = make_logits(1, 3000).repeat(10, 1)
    valid = torch.tensor([1e-3, 0.05, 0.7, 1.0, 50.0, 1e-39])  # the last is not normal: 1 / temperature overflows
    wrong = torch.tensor([0.0, -1.0, torch.nan, torch.inf])
    entropy, _, _ = emulate(library, logits, torch.cat((valid, wrong)), SPLIT)
    truth = token_stats(logits[:6].double(), None, valid.double()[:, None], -100, False)[1]
    torch.testing.assert_close(entropy[:6].double(), truth, rtol=5e-6, atol=1e-7)
    assert entropy[6:].isnan().all()


def test_the_order_of_the_blocks_does_not_show(library):
    logits = make_logits(3, 300_000)  # 147 parts: more than a warp has lanes
    first = emulate(library, logits, 0.7, SHREDDED)
    for order in range(1, 6):
        for one, other in zip(first, emulate(library, logits, 0.7, SHREDDED, order), strict=True):
            assert torch.equal(one, other)
    check(library, logits, 0.7, SHREDDED)


@pytest.mark.parametrize("rows", [1, 7, 64, 512, 100_000])
@pytest.mark.parametrize("vocab", [1, 2048, 50_257, 151_936, 262_144, 2**30])
@pytest.mark.parametrize("dtype", TILE, ids=str)
def test_parts_cover_every_row_and_fit_the_gpu(library, dtype, vocab, rows):
    blocks, parts, tiles = 132 * 8, ctypes.c_int(), ctypes.c_int()  # of an H100
    arguments = [ctypes.c_int64(x) for x in (rows, vocab, blocks)]
    library.split(ctypes.c_bool(dtype == torch.float32), *arguments, ctypes.byref(parts), ctypes.byref(tiles))
    size, vec = TILE[dtype], TILE[dtype] // LANES // WORDS
    assert parts.value * tiles.value * size >= vocab + vec - 1  # a row may start vec - 1 into its first word
    assert (parts.value - 1) * tiles.value * size < vocab + vec - 1  # and no block is idle
    assert parts.value == 1 or parts.value * rows <= blocks
