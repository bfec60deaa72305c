"""One token per row of logits [B, V] with its log-prob and the row's entropy; the mathematics is in the reference.

`sample_parts_kernel` reads the logits once, several programs per row where rows are few: the lane-local online softmax
of token_stats.py, and in each lane the best score x / temperature + noise so far and the word (16 bytes of logits) that
holds it. The score is kept about the lane's running maximum, so that a large offset of the logits costs no digits.
`finish_rows_kernel` merges the parts and, where filters are given, looks whether they keep the token. If not, every
token that they keep has a larger logit: it draws again above that one, from the same noise, until they do. The loop is
inside the kernel, so nothing waits for the host, and after the first pass a row comes from the L2 cache.

Logarithms are to base 2. Scores leave out log2(ln 2), a constant of all noise.
"""

# mypy: allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aepo_kernels.kernels.common import (
    ACCESS_BYTES,
    LN2,
    LOG2_ZERO,
    LOG2E,
    MAX_PROGRAMS_PER_ROW,
    aligned_row,
    row_programs,
    tile_ranges,
)
from aepo_kernels.kernels.token_stats import (
    LANES,
    LOWEST,
    WORDS,
    absorb,
    load_inside,
    merge_lanes,
    merge_parts,
    no_logits,
    row_result,
    store_part,
)

NO_TOKEN = tl.constexpr(2**31 - 1)
# One program draws again for a whole row: as many threads as can keep a multiprocessor's loads in flight by themselves.
FINISH_LANES = 256
# By logits per word. Left alone, the compiler of Triton 3.6 stops at 128 for 16-bit logits and spills.
FINISH_REGISTERS = {4: 128, 8: 192}


@triton.jit
def _row_settings(row, temperature_ptr, seed_ptr, offset_ptr):
    """(scale of logits to log2 units, 0 for a greedy row or 1, seed, both halves of the offset)"""
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature == 0
    scale = 1 / tl.where(greedy, 1.0, temperature) * LOG2E
    scale = tl.maximum(tl.minimum(scale, 3e38), 1e-37).to(tl.float32)  # 0 * -inf, and inf * 0, would be NaN
    offset = tl.load(offset_ptr + row)
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return scale, tl.where(greedy, 0.0, 1.0), tl.load(seed_ptr + row), low, high


@triton.jit
def _random_words(first, settings, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """The random words [LANES, VEC] of the tokens first [LANES] and on."""
    _, _, seed, low, high = settings
    LANES: tl.constexpr = first.shape[0]
    zero = tl.zeros_like(low)
    if ALIGNED:  # four neighbours share a counter
        block = (first >> 2)[:, None] + tl.arange(0, VEC // 4)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, block, low, high, zero)
        return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(LANES, VEC)
    token = first[:, None] + tl.arange(0, VEC)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, token >> 2, low, high, zero)
    odd = token & 1 != 0
    return tl.where(token & 2 != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))


@triton.jit
def _uniform(words):
    """v = (word + 1/2) / 2^32 in (0, 1]; 1 for the largest words."""
    return words.to(tl.float32) * 2.0**-32 + 2.0**-33


@triton.jit
def _scores(x, words, reference, settings):
    v = _uniform(words)
    # -log2(1 - v): by its series where 1 - v would round v away, which is where the winners are.
    series = v * LOG2E * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v / 5))))
    noise = -tl.log2(tl.where(v < 1 / 16, series, -tl.log2(tl.maximum(1 - v, 2.0**-33))))
    return (x - reference) * settings[0] + settings[1] * noise


@triton.jit
def _draw_tile(draw, x0, x1, x2, x3, first, settings, ALIGNED: tl.constexpr):
    """The best draw so far after one more tile: (score, the logit it is counted from, token).

    x_i [LANES, VEC] are its logits, `first` its first token. noise <= -log2(v) - log2(log2(e)) for v of a token, so a
    lane's largest logit and smallest word bound its scores, and the exponent of v does for its logarithm. A tile of
    which no lane can win needs no logarithms: they took 60 of 88 instructions per logit.
    """
    best, reference, token = draw
    scale, noise_scale = settings[0], settings[1]
    LANES: tl.constexpr = x0.shape[0]
    VEC: tl.constexpr = x0.shape[1]
    STEP: tl.constexpr = LANES * VEC
    lane_first = first + tl.arange(0, LANES) * VEC
    w0 = _random_words(lane_first, settings, ALIGNED, VEC)
    w1 = _random_words(lane_first + STEP, settings, ALIGNED, VEC)
    w2 = _random_words(lane_first + 2 * STEP, settings, ALIGNED, VEC)
    w3 = _random_words(lane_first + 3 * STEP, settings, ALIGNED, VEC)
    top = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), 1)
    smallest = tl.min(tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3)), 1)
    exponent = (_uniform(smallest).to(tl.int32, bitcast=True) >> 23) - 127
    # log2(log2(e)) is 0.5288; the thousandths are for the roundings on both sides.
    may_win = (top - reference) * scale - noise_scale * (exponent.to(tl.float32) + 0.527) > best - 1e-3
    if tl.max(may_win.to(tl.int32), 0) > 0:
        new_reference = tl.maximum(reference, tl.max(top, 0))
        s0, s1 = _scores(x0, w0, new_reference, settings), _scores(x1, w1, new_reference, settings)
        s2, s3 = _scores(x2, w2, new_reference, settings), _scores(x3, w3, new_reference, settings)
        score = tl.max(tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 1), 0)
        best += (reference - new_reference) * scale
        reference = new_reference
        if score >= best:
            at = lane_first[:, None] + tl.arange(0, VEC)[None, :]
            t0, t1 = tl.where(s0 == score, at, NO_TOKEN), tl.where(s1 == score, at + STEP, NO_TOKEN)
            t2 = tl.where(s2 == score, at + 2 * STEP, NO_TOKEN)
            t3 = tl.where(s3 == score, at + 3 * STEP, NO_TOKEN)
            lowest = tl.min(tl.min(tl.minimum(tl.minimum(t0, t1), tl.minimum(t2, t3)), 1), 0)
            # The cut tile at a row's end comes before the whole ones, so an equal score may have a lower token.
            token = tl.where(score == best, tl.minimum(lowest, token), lowest)
            best = score
    return best, reference, token


@triton.jit
def _no_draw():
    return tl.full((), -float("inf"), tl.float32), tl.full((), LOWEST, tl.float32), tl.full((), NO_TOKEN, tl.int32)


@triton.jit(do_not_specialize=["stride", "vocab", "tiles_per_program"])
def sample_parts_kernel(
    logits_ptr,  # (B, V), 16-bit or float32
    temperature_ptr,  # (B,) float64
    seed_ptr,  # (B,) int64
    offset_ptr,  # (B,) int64
    partials_ptr,  # (B, programs, 3): softmax states, as in token_stats_kernel
    scores_ptr,  # (B, programs): best score, about the part's maximum
    tokens_ptr,  # (B, programs) int32: of that score
    stride,
    vocab,
    tiles_per_program,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (row, part): softmax state and best draw of one part of one row, in one read."""
    STEP: tl.constexpr = LANES * VEC
    TILE: tl.constexpr = WORDS * STEP
    row, part = tl.program_id(0), tl.program_id(1)
    settings = _row_settings(row, temperature_ptr, seed_ptr, offset_ptr)
    scale = settings[0]
    x_ptr, head = aligned_row(logits_ptr, row, stride, VEC)
    tile_0 = part * tiles_per_program * TILE
    begin = tl.maximum(head, tile_0)
    end = tl.minimum(head + vocab, tile_0 + tiles_per_program * TILE)
    edge_first, edge_step, whole_first, whole_end = tile_ranges(tile_0, begin, end, TILE)

    word = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    state = no_logits(LANES)
    draw = _no_draw()
    for tile in range(edge_first, end, edge_step):
        at = tile + word
        x0 = load_inside(x_ptr, at, begin, end, "")
        x1 = load_inside(x_ptr, at + STEP, begin, end, "")
        x2 = load_inside(x_ptr, at + 2 * STEP, begin, end, "")
        x3 = load_inside(x_ptr, at + 3 * STEP, begin, end, "")
        state = absorb(state, x0, x1, x2, x3, tile, scale)
        draw = _draw_tile(draw, x0, x1, x2, x3, tile - head, settings, ALIGNED)
    for tile in range(whole_first, whole_end, TILE):
        ptr = x_ptr + tile + word
        x0 = tl.load(ptr).to(tl.float32)
        x1 = tl.load(ptr + STEP).to(tl.float32)
        x2 = tl.load(ptr + 2 * STEP).to(tl.float32)
        x3 = tl.load(ptr + 3 * STEP).to(tl.float32)
        state = absorb(state, x0, x1, x2, x3, tile, scale)
        draw = _draw_tile(draw, x0, x1, x2, x3, tile - head, settings, ALIGNED)
    row_max, rest, weighted = merge_lanes(state, x_ptr, begin, end, scale, VEC, WORDS, LANES)

    best, reference, token = draw
    store_part(partials_ptr, row, part, row_max, rest, weighted)
    at = row.to(tl.int64) * tl.num_programs(1) + part
    tl.store(scores_ptr + at, best + (reference - row_max) * scale)
    tl.store(tokens_ptr + at, token)


@triton.jit
def _add_above(mass, count, x, threshold, maximum, scale):
    """Per lane, the softmax mass about `maximum` and the number of the logits x [N, VEC] above `threshold`."""
    above = x > threshold
    e = tl.exp2(tl.maximum((x - maximum) * scale, LOG2_ZERO))
    return mass + tl.sum(tl.where(above, e, 0.0), 1), count + tl.sum(above.to(tl.int32), 1)


@triton.jit
def _above(x_ptr, head, vocab, threshold, maximum, scale, VEC: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr):
    """(mass, number) of a row's logits above `threshold`."""
    STEP: tl.constexpr = LANES * VEC
    end = head + vocab
    edge_first, edge_step, whole_first, whole_end = tile_ranges(0, head, end, WORDS * STEP)
    word = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    mass, count = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.int32)
    for tile in range(edge_first, end, edge_step):
        for i in tl.static_range(WORDS):
            x = load_inside(x_ptr, tile + i * STEP + word, head, end, "")
            mass, count = _add_above(mass, count, x, threshold, maximum, scale)
    for tile in range(whole_first, whole_end, WORDS * STEP):
        for i in tl.static_range(WORDS):
            x = tl.load(x_ptr + tile + i * STEP + word).to(tl.float32)
            mass, count = _add_above(mass, count, x, threshold, maximum, scale)
    return tl.sum(mass, 0), tl.sum(count, 0)


@triton.jit
def _candidates(x, pivot, floor, maximum, scale):
    """x, with -inf for logits that are not above `pivot` or, in log2 units about `maximum`, below `floor`."""
    return tl.where((x > pivot) & ((x - maximum) * scale >= floor), x, -float("inf"))


@triton.jit
def _draw_above(
    x_ptr, head, vocab, pivot, floor, maximum, settings,
    ALIGNED: tl.constexpr, VEC: tl.constexpr, WORDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The token with the best score of a row among its `_candidates`."""
    STEP: tl.constexpr = LANES * VEC
    end = head + vocab
    edge_first, edge_step, whole_first, whole_end = tile_ranges(0, head, end, WORDS * STEP)
    word = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    scale = settings[0]
    draw = _no_draw()
    for tile in range(edge_first, end, edge_step):
        at = tile + word
        x0 = _candidates(load_inside(x_ptr, at, head, end, ""), pivot, floor, maximum, scale)
        x1 = _candidates(load_inside(x_ptr, at + STEP, head, end, ""), pivot, floor, maximum, scale)
        x2 = _candidates(load_inside(x_ptr, at + 2 * STEP, head, end, ""), pivot, floor, maximum, scale)
        x3 = _candidates(load_inside(x_ptr, at + 3 * STEP, head, end, ""), pivot, floor, maximum, scale)
        draw = _draw_tile(draw, x0, x1, x2, x3, tile - head, settings, ALIGNED)
    for tile in range(whole_first, whole_end, WORDS * STEP):
        ptr = x_ptr + tile + word
        x0 = _candidates(tl.load(ptr).to(tl.float32), pivot, floor, maximum, scale)
        x1 = _candidates(tl.load(ptr + STEP).to(tl.float32), pivot, floor, maximum, scale)
        x2 = _candidates(tl.load(ptr + 2 * STEP).to(tl.float32), pivot, floor, maximum, scale)
        x3 = _candidates(tl.load(ptr + 3 * STEP).to(tl.float32), pivot, floor, maximum, scale)
        draw = _draw_tile(draw, x0, x1, x2, x3, tile - head, settings, ALIGNED)
    return draw[2]


@triton.jit(do_not_specialize=["stride", "vocab", "programs"])
def finish_rows_kernel(
    logits_ptr,  # (B, V)
    temperature_ptr,  # (B,) float64
    top_k_ptr,  # (B,) int64, or None, like the other filters
    top_p_ptr,  # (B,) float64
    min_p_ptr,  # (B,) float64
    seed_ptr,  # (B,) int64
    offset_ptr,  # (B,) int64
    partials_ptr,  # (B, programs, 3)
    scores_ptr,  # (B, programs)
    part_tokens_ptr,  # (B, programs)
    tokens_ptr,  # (B,) int64
    logprobs_ptr,  # (B,) float32
    entropy_ptr,  # (B,) float32
    stride,
    vocab,
    programs,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Program (row): merge the parts, draw again while the filters reject the token, and write the results."""
    row = tl.program_id(0)
    settings = _row_settings(row, temperature_ptr, seed_ptr, offset_ptr)
    scale = settings[0]
    temperature = tl.load(temperature_ptr + row)
    in_range = (temperature >= 0) & (temperature < float("inf"))
    top_k, top_p, floor = vocab.to(tl.int64), 1.0, -float("inf")
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + row)
        in_range = in_range & (top_k >= 1)
    if top_p_ptr is not None:
        wanted_p = tl.load(top_p_ptr + row)
        in_range = in_range & (wanted_p > 0) & (wanted_p <= 1)
        top_p = wanted_p.to(tl.float32)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + row)
        in_range = in_range & (min_p >= 0) & (min_p <= 1)
        floor = tl.log2(min_p.to(tl.float32))

    maximum, rest, weighted = merge_parts(partials_ptr, row, programs, scale, MAX_PROGRAMS)
    softmax_defined, log_sum, entropy = row_result(rest, weighted)
    defined = in_range & softmax_defined
    part = tl.arange(0, MAX_PROGRAMS)
    at = row.to(tl.int64) * programs + part
    part_maximum = tl.load(partials_ptr + 3 * at, mask=part < programs, other=LOWEST)
    score = tl.load(scores_ptr + at, mask=part < programs, other=-float("inf"))
    part_token = tl.load(part_tokens_ptr + at, mask=part < programs, other=NO_TOKEN)
    score += (part_maximum - maximum) * scale
    token = tl.min(tl.where(score == tl.max(score, 0), part_token, NO_TOKEN), 0)

    x_ptr, head = aligned_row(logits_ptr, row, stride, VEC)
    x = tl.load(x_ptr + head + tl.where(defined, token, 0)).to(tl.float32)
    if top_k_ptr is not None or top_p_ptr is not None or min_p_ptr is not None:
        kept = (defined == 0) | (x >= maximum)  # nothing lies above the maximum
        while kept == 0:
            kept = (x - maximum) * scale >= floor
            if kept and (top_k < vocab or top_p < 1):
                mass, count = _above(x_ptr, head, vocab, x, maximum, scale, VEC, WORDS, LANES)
                kept = (count < top_k) & ((mass < top_p * (1 + rest)) | (top_p >= 1))
            if kept == 0:
                token = _draw_above(x_ptr, head, vocab, x, floor, maximum, settings, ALIGNED, VEC, WORDS, LANES)
                x = tl.load(x_ptr + head + token).to(tl.float32)
                kept = x >= maximum

    nan = float("nan")
    tl.store(tokens_ptr + row, tl.where(defined, token, -1).to(tl.int64))
    tl.store(logprobs_ptr + row, tl.where(defined, (x - maximum) * scale * LN2 - log_sum, nan))
    tl.store(entropy_ptr + row, tl.where(defined, entropy, nan))


def sample_with_entropy(
    logits: Tensor,  # [B, V] float16, bfloat16 or float32, contiguous rows at any stride
    temperature: Tensor,  # [B] float64
    top_k: Tensor | None,  # [B] int64
    top_p: Tensor | None,  # [B] float64
    min_p: Tensor | None,  # [B] float64
    seed: Tensor,  # [B] int64
    offset: Tensor,  # [B] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens [B] int64, logprobs [B], entropy [B]), float32; the meaning is that of the reference."""
    rows, vocab = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    logprobs, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    vec = ACCESS_BYTES // logits.element_size()
    programs, tiles_per_program = row_programs(logits, WORDS * LANES * vec)
    partials = logits.new_empty(rows, programs, 3, dtype=torch.float32)
    scores = logits.new_empty(rows, programs, dtype=torch.float32)
    part_tokens = logits.new_empty(rows, programs, dtype=torch.int32)
    # Whether the four tokens of a random counter always lie in one word: else each token makes its own four words.
    aligned = logits.stride(0) % 4 == 0 and logits.data_ptr() // logits.element_size() % 4 == 0
    shape = {"ALIGNED": aligned, "VEC": vec, "WORDS": WORDS}
    filtered = top_k is not None or top_p is not None or min_p is not None
    with torch.cuda.device_of(logits):
        sample_parts_kernel[(rows, programs)](
            logits, temperature, seed, offset, partials, scores, part_tokens, logits.stride(0), vocab,
            tiles_per_program, **shape, LANES=LANES, num_warps=LANES // 32,
        )  # fmt: skip
        finish_rows_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, seed, offset, partials, scores, part_tokens, tokens, logprobs,
            entropy, logits.stride(0), vocab, programs, **shape, LANES=FINISH_LANES, MAX_PROGRAMS=MAX_PROGRAMS_PER_ROW,
            num_warps=FINISH_LANES // 32 if filtered else 1, maxnreg=FINISH_REGISTERS[vec],
        )  # fmt: skip
    return tokens, logprobs, entropy
