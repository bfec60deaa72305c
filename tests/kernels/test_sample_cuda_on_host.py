"""Claims about the CUDA sampler, shown without a GPU: its source is compiled for the host, where the threads of a block
are fibers and blocks run one after another (cuda_on_host/cuda_runtime.h).

It draws what the float64 reference draws, with its log-probs and entropies, wherever a row begins and ends, into
however many parts it is cut, in whatever order they are done, whatever the filters reject; what lies beside a row is
not read.
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
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from aepo_kernels.reference.sample_with_entropy import gumbel_noise, kept_tokens
from aepo_kernels.reference.sample_with_entropy import sample_with_entropy as reference_sample
from aepo_kernels.testing import REGIMES, make_logits

pytestmark = needs_compiler
FLOATS, FILTERS = ("temperature", "top_p", "min_p"), ("top_k", "top_p", "min_p")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_for_host("sample_with_entropy.cpp", tmp_path_factory.mktemp("cuda_on_host"))


def columns(rows, **settings):
    """The arguments of a stage [B] in their order, None for filters that are not given."""
    values = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "seed": torch.arange(rows), "offset": 0}
    for name, value in (values | settings).items():
        dtype = torch.float64 if name in FLOATS else torch.int64
        values[name] = None if value is None else torch.as_tensor(value, dtype=dtype).expand(rows).contiguous()
    return list(values.values())


def launch(library, logits, arguments, blocks=WHOLE, order=0, workspace=None):
    """(tokens, logprobs, entropy), each [B]."""
    rows, vocab = logits.shape
    out = torch.full((rows,), -7), torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)
    workspace = make_workspace(blocks) if workspace is None else workspace
    sizes = [ctypes.c_int64(x) for x in (rows, vocab, logits.stride(0))]
    library.sample_with_entropy_on_host(
        TYPES[logits.dtype], pointer(logits), *sizes, *map(pointer, arguments), *map(pointer, out), pointer(workspace),
        ctypes.c_int64(blocks), ctypes.c_uint(order),
    )  # fmt: skip
    assert tickets(workspace).eq(0).all()
    return out


def check(library, logits, blocks=WHOLE, order=0, **settings):
    """The kernel's tokens, equal to the reference's, and their statistics, close to its in float64."""
    arguments = columns(len(logits), **settings)
    ours = launch(library, logits, arguments, blocks, order)
    tokens, logprobs, entropy = reference_sample(logits.double(), *arguments)
    assert ours[0].tolist() == tokens.tolist()
    for name, got, true in (("logprobs", ours[1], logprobs), ("entropy", ours[2], entropy)):
        torch.testing.assert_close(
            got.double(), true, **TOLERANCE, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    return tokens


@pytest.mark.parametrize("first", [0, 1, 2, 3, -3, 4 * 37988 - 1])
def test_the_noise_is_that_of_the_reference(library, first):
    # From the complement of the word where 1 - v has lost digits: 3e-7 beside numbers up to 33.
    words, noise, most = (ctypes.c_uint32 * 4)(), (ctypes.c_float * 4)(), (ctypes.c_float * 4)()
    for seed, offset in ((0, 0), (-1, 2**40 + 3), (2**63 - 1, -(2**63)), (12345, 2**32)):
        library.random_words_on_host(ctypes.c_int64(seed), ctypes.c_int64(offset), first, words, noise, most)
        if first < 0:
            continue  # beside the row: nothing is asked of them but to be made
        true = gumbel_noise(torch.tensor([seed]), torch.tensor([offset]), first + 4)[0, first:]
        true = (true / torch.tensor(2.0).double().log()) + torch.tensor(2.0).double().log().log2()
        ours = torch.tensor(list(noise)).double()
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-6)
        assert (ours <= torch.tensor(list(most)) + 1e-4).all()


@pytest.mark.parametrize("blocks", [WHOLE, SPLIT, SHREDDED])
@pytest.mark.parametrize("dtype", TILE, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_in_whole_and_split_rows(library, regime, dtype, blocks):
    logits = make_logits(3, 2 * TILE[dtype] + 19, regime, dtype)
    check(library, logits, blocks, temperature=0.7)
    check(library, logits, blocks, top_k=7, top_p=0.8, offset=3)


@pytest.mark.parametrize("dtype", TILE, ids=str)
def test_every_length_and_every_place_in_a_word(library, dtype):
    tile, vec = TILE[dtype], VEC[dtype]
    for vocab in (1, 2, vec - 1, vec, vec + 1, 301, tile - 1, tile, tile + 1, 2 * tile + 13):
        # Beside the rows stands what must not be read. An odd stride moves each row within a word.
        padded = torch.full((2 * vec, (vocab + 2 * vec) | 1), torch.nan, dtype=dtype)
        padded[1::2] = torch.inf
        rows = padded[:, vec : vec + vocab]
        rows.copy_(make_logits(2, vocab, dtype=dtype, seed=vocab).repeat(vec, 1))
        assert len({row.data_ptr() % 16 for row in rows}) == vec
        check(library, rows[vec:], WHOLE, temperature=1.3)
        check(library, rows[:vec], SHREDDED, top_k=2)


# The winner far above all others: both ends, both sides of a step, of a tile and of a part.
@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
@pytest.mark.parametrize("dtype", TILE, ids=str)
def test_the_winner_is_found_wherever_it_is(library, dtype, blocks):
    tile = TILE[dtype]
    step, vocab = tile // WORDS, 3 * tile + 19
    places = [0, 3, 4, step - 1, step, 2 * step + 5, tile - 1, tile, 2 * tile + 77, 3 * tile, vocab - 1]
    logits = make_logits(len(places), vocab).scatter(1, torch.tensor(places)[:, None], 60.0).to(dtype)
    assert check(library, logits, blocks).tolist() == places


@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
@pytest.mark.parametrize(
    "filters",
    [{"top_k": 1}, {"top_k": 40}, {"top_p": 0.05}, {"min_p": 0.7}, {"top_k": 2000, "top_p": 0.2, "min_p": 0.3}],
    ids=str,
)
def test_a_rejected_token_is_drawn_again_above_it(library, filters, blocks):
    tile = TILE[torch.float32]
    logits = make_logits(3, 4 * tile + 300) / 3  # flat: the first draws are outside
    logits[1, : 2 * tile] -= 2  # and in some parts is nothing above them
    without = check(library, logits, blocks)
    assert (check(library, logits, blocks, **filters) != without).any()


@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
def test_ties_of_a_greedy_row_go_to_the_lowest_token(library, blocks):
    tile, vocab = TILE[torch.bfloat16], 3 * TILE[torch.bfloat16] + 19
    logits = torch.full((3, vocab), -2.0, dtype=torch.bfloat16)
    for row, places in enumerate(([17, 18, 3 * tile], [2 * tile + 8, tile + 9, vocab - 1], [900, 20, 7])):
        logits[row, places] = 5.0
    assert check(library, logits, blocks, temperature=0.0).tolist() == [17, tile + 9, 7]
    kept = check(library, logits, blocks, top_k=1)  # which keeps all three
    assert all(logits[row, token] == 5 for row, token in enumerate(kept))


@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
def test_masked_far_and_undefined_rows(library, blocks):
    tile = TILE[torch.float32]
    logits = make_logits(9, 3 * tile + 19)
    logits[0, : 2 * tile] = -torch.inf  # whole parts of nothing
    logits[1, tile:] = -torch.inf
    logits[2, 5:] = torch.finfo(torch.float32).min
    logits[3, :] = torch.finfo(torch.float32).min
    logits[4] += 1e4
    logits[5, tile:] -= 1e30
    logits[6, 2 * tile + 1] = torch.nan
    logits[7, [3, 900]] = torch.inf
    logits[8] = -torch.inf
    for temperature in (1.0, 1e-40, 1e39, 1e300):
        assert check(library, logits, blocks, temperature=temperature)[6:].tolist() == [-1] * 3
    check(library, logits, blocks, temperature=0.3, top_p=0.9, min_p=0.01)


@pytest.mark.parametrize("blocks", [WHOLE, SHREDDED])
def test_each_row_has_its_parameters_and_their_ranges(library, blocks):
    logits = make_logits(1, 3000).repeat(12, 1)
    temperature = torch.tensor([1e-3, 0.05, 0.7, 50.0, 0.0, -1.0, torch.nan, torch.inf, 1, 1, 1, 1])
    top_k = torch.tensor([1, 5, 2**62, 2**31, 1, 1, 1, 1, 0, -(2**40), 9, 9])
    top_p = torch.tensor([1.0] * 10 + [0.0, 1.5])
    ours = check(library, logits, blocks, temperature=temperature, top_k=top_k, top_p=top_p, offset=2**40)
    assert (ours[:5] >= 0).all()
    assert (ours[5:] == -1).all()


def test_the_order_of_the_blocks_does_not_show_and_the_workspace_is_left_as_it_was_found(library):
    logits = make_logits(2, 70_000)  # 35 parts: more than a warp has lanes
    arguments = columns(2, top_p=0.9, offset=7)
    workspace = make_workspace(SHREDDED)
    first = launch(library, logits, arguments, SHREDDED, workspace=workspace)
    for order in (1, 2):
        again = launch(library, logits, arguments, SHREDDED, order, workspace)
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    check(library, logits, SHREDDED, top_p=0.9, offset=7)


@st.composite
def problems(draw):
    """(logits [1, V] inside NaN, settings, blocks)"""
    dtype = draw(st.sampled_from(list(TILE)))
    vocab = draw(st.integers(1, 600) | st.integers(TILE[dtype] - 8, 2 * TILE[dtype]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    row = torch.randn(vocab, generator=g) * draw(st.sampled_from([0.0, 0.3, 3.0, 50.0])) + draw(
        st.sampled_from([0.0, -300.0, 1e4])
    )
    if draw(st.booleans()):
        row = row.round()  # ties
    masked = torch.rand(vocab, generator=g) < draw(st.sampled_from([0.0, 0.5]))
    masked[draw(st.integers(0, vocab - 1))] = False
    before = draw(st.integers(0, 9))
    wide = torch.full((1, before + vocab + 9), torch.nan)
    wide[0, before : before + vocab] = row.masked_fill(masked, -torch.inf)
    chosen = {
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])),
        "top_k": draw(st.none() | st.integers(1, 20) | st.just(2**31)),
        "top_p": draw(st.none() | st.floats(0.01, 1.0)),
        "min_p": draw(st.none() | st.floats(0.0, 1.0)),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "offset": draw(st.integers(-(2**63), 2**63 - 1)),
    }
    return wide.to(dtype)[:, before : before + vocab], chosen, draw(st.sampled_from([WHOLE, SHREDDED]))


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_any_row_and_filter(library, problem):
    logits, chosen, blocks = problem
    # Where a bound falls on a token's mass to the last digits of float32, either answer is right.
    arguments = columns(1, **chosen)
    z = logits.double() - logits.double().amax()
    z = z / (chosen["temperature"] or 1.0)
    near = [columns(1, **(chosen | {name: chosen[name] * (1 + e) for name in ("top_p", "min_p") if chosen[name]}))
            for e in (-1e-5, 1e-5)]  # fmt: skip
    assume(torch.equal(*(kept_tokens(z, *each[1:4]) for each in near)))
    ours = launch(library, logits, arguments, blocks)
    tokens, logprobs, entropy = reference_sample(logits.double(), *arguments)
    assert ours[0].tolist() == tokens.tolist()
    torch.testing.assert_close(ours[1].double(), logprobs, rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(ours[2].double(), entropy, rtol=2e-6, atol=5e-6)
