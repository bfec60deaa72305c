// A token from every row of the logits, its log-prob and the row's entropy, in one launch.
//
// The blocks of a row read it once: the softmax as in decode_entropy.cu, and beside it the best token by logit plus
// noise so far, which each warp keeps for itself. The block that is done last merges the parts. Where filters are given
// it looks whether they keep the token; if not, every token that they keep has a larger logit: it draws again above
// that one, from the same noise, until they do. What lies above a token lies in the parts whose maximum does, so both
// passes read no other part; a row comes from the L2 cache by then.
#include "gumbel_draw.h"
#include "row_blocks.cuh"
#include "row_launch.cuh"

namespace aepo::cuda {
namespace {

// One row as all threads of its blocks see it.
template <class Logits>
struct Row {
  const typename Logits::Element* x;
  int vocab, head, number;  // the token at position p of a part is p - head
  Split split;
  float scale;  // of logits to units of log2
  float noisy;  // 1; 0 for a greedy row
  RandomRow random;
  Workspace workspace;

  __device__ Part<Logits> part(int i) const { return part_of_row<Logits>(x, vocab, i, split.tiles_per_part); }
  __device__ float logit(int token) const {  // -inf outside the vocabulary
    return static_cast<unsigned>(token) < static_cast<unsigned>(vocab) ? Logits::value(x[token]) : kMinusInfinity;
  }
};

// 1 / temperature; 1 for a greedy row. A double may be out of range of float32: 0 * -inf would be NaN, and inf * 0.
__device__ __forceinline__ float inverse_of(double temperature) {
  return temperature == 0 ? 1 : fminf(fmaxf(static_cast<float>(1 / temperature), 0x1p-149f), FLT_MAX);
}

template <class Logits>
__device__ __forceinline__ Row<Logits> row_of(const SampleWithEntropy& call, const Split& split, int number) {
  const auto* const x = static_cast<const typename Logits::Element*>(call.logits) + number * call.row_stride;
  const int vocab = static_cast<int>(call.vocab), head = part_of_row<Logits>(x, vocab, 0, 1).begin;
  const double temperature = call.temperature[number];
  const RandomRow random(call.seed[number], call.offset[number]);
  const float noisy = temperature == 0 ? 0 : 1;
  return {x, vocab, head, number, split, log2_scale(inverse_of(temperature)), noisy, random, call.workspace};
}

// The tokens that may be drawn: with a logit above `pivot` and, in units of log2 about `maximum`, at least `floor`.
struct Candidates {
  float pivot = kMinusInfinity, floor = kMinusInfinity, maximum = 0;

  __device__ bool hold(float x, float scale) const { return (x > pivot) & ((x - maximum) * scale >= floor); }
};

// The best of all lanes' draws, in every lane.
__device__ __forceinline__ Draw best_of_warp(Draw draw, float scale) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Draw other = {__shfl_xor_sync(kAllLanes, draw.logit, distance),
                        __shfl_xor_sync(kAllLanes, draw.noise, distance),
                        __shfl_xor_sync(kAllLanes, draw.token, distance)};
    if (is_better(other, draw, scale)) draw = other;
  }
  return draw;
}

// The best of all warps' draws, in every thread.
__device__ __forceinline__ Draw best_of_block(const Draw& draw, float scale) {
  __shared__ Draw warps[kWarps];
  __syncthreads();  // what was here before has been read
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = draw;
  __syncthreads();
  Draw best = warps[0];
#pragma unroll
  for (int i = 1; i < kWarps; i++) {
    if (is_better(warps[i], best, scale)) best = warps[i];
  }
  return best;
}

// Let the candidates of one tile compete with `draw`, which all lanes of a warp share; `top` is this lane's largest.
// Most tiles are done with one bound or, after their random words are made, with another. Those that are not are read
// again and need two logarithms per logit.
template <class Logits>
__device__ __forceinline__ void draw_from_tile(Draw& draw, const Row<Logits>& row, int tile, float top,
                                               const Candidates& candidates) {
  if (!__any_sync(kAllLanes, may_win(top, row.noisy * kMostNoise, draw, row.scale))) return;
  const int first = tile + static_cast<int>(threadIdx.x) * Logits::kVec - row.head;
  const float noise = row.noisy * most_noise(smallest_word<Logits>(row.random, first));
  if (!__any_sync(kAllLanes, may_win(top, noise, draw, row.scale))) return;
#pragma unroll 1
  for (int four = 0; four < kWords * Logits::kVec; four += 4) {
    const int token = first + four / Logits::kVec * kStep<Logits> + four % Logits::kVec;
    uint32_t words[4];
    random_words(row.random, token, words);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = row.logit(token + i);
      const Draw one = {x, row.noisy * noise_of(words[i]), token + i};
      if (candidates.hold(x, row.scale) & is_better(one, draw, row.scale)) draw = one;
    }
  }
  draw = best_of_warp(draw, row.scale);
}

// The part's token, compared with others: its noise is made again, a part leaves nothing but its number.
template <class Logits>
__device__ __forceinline__ void draw_token(Draw& draw, const Row<Logits>& row, int token) {
  if (token < 0) return;
  const Draw one = {row.logit(token), row.noisy * noise_of(random_word(row.random, token)), token};
  if (is_better(one, draw, row.scale)) draw = one;
}

// body(x, tile) for the tiles of all parts that hold a logit above `bound`, by a whole block.
template <class Logits, class Body>
__device__ __forceinline__ void for_each_tile_above(const Row<Logits>& row, float bound, const Body& body) {
  const int parts = row.split.parts;
#pragma unroll 1
  for (int first = 0; first < parts; first += kWarpSize) {
    const int mine = first + threadIdx.x % kWarpSize;
    float maximum = mine < parts ? HUGE_VALF : kMinusInfinity;
    if (mine < parts && parts > 1) maximum = __ldcg(part_of_workspace(row.workspace, row.number, mine, parts)).x;
#pragma unroll 1
    for (unsigned left = __ballot_sync(kAllLanes, maximum > bound); left != 0; left &= left - 1) {
      for_each_tile(row.part(first + __ffs(left) - 1), threadIdx.x, body);
    }
  }
}

// Softmax mass about the row's maximum, and number, of the logits above a bound.
struct Above {
  float mass;
  int count;
};

template <class Logits>
__device__ __forceinline__ Above weigh_above(const SampleWithEntropy& call, const Split& split, int number, float bound,
                                             float maximum) {
  __shared__ Above warps[kWarps];
  const Row<Logits> row = row_of<Logits>(call, split, number);
  Above above = {0, 0};
  for_each_tile_above(row, bound, [&](const auto& x, int) {
    for (float logit : x) {
      above.mass += logit > bound ? power_of_2((logit - maximum) * row.scale) : 0;
      above.count += logit > bound;
    }
  });
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    above.mass += __shfl_xor_sync(kAllLanes, above.mass, distance);
    above.count += __shfl_xor_sync(kAllLanes, above.count, distance);
  }
  __syncthreads();  // what was here before has been read
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = above;
  __syncthreads();
  above = warps[0];
#pragma unroll
  for (int i = 1; i < kWarps; i++) above = {above.mass + warps[i].mass, above.count + warps[i].count};
  return above;
}

struct Filters {
  int top_k;      // the size of the vocabulary filters nothing
  float top_p;    // nor does 1
  float floor;    // of min_p: log2 of the least share of the largest probability
  bool in_range;  // they, and the temperature
};

__device__ __forceinline__ Filters filters_of(const SampleWithEntropy& call, int row) {
  const double temperature = call.temperature[row];
  Filters filters = {static_cast<int>(call.vocab), 1, kMinusInfinity, temperature >= 0 && temperature < HUGE_VAL};
  if (call.top_k != nullptr) {
    const int64_t top_k = call.top_k[row];
    filters.top_k = static_cast<int>(top_k < call.vocab ? top_k : call.vocab);
    filters.in_range &= top_k >= 1;
  }
  if (call.top_p != nullptr) {
    const double top_p = call.top_p[row];
    filters.top_p = static_cast<float>(top_p);
    filters.in_range &= top_p > 0 && top_p <= 1;
  }
  if (call.min_p != nullptr) {
    const double min_p = call.min_p[row];
    filters.floor = log2f(static_cast<float>(min_p));
    filters.in_range &= min_p >= 0 && min_p <= 1;
  }
  return filters;
}

// The best candidate of a row, by a whole block.
template <class Logits>
__device__ __forceinline__ Draw draw_above(const SampleWithEntropy& call, const Split& split, int number,
                                           const Candidates& candidates) {
  const Row<Logits> row = row_of<Logits>(call, split, number);
  Draw draw;
  for_each_tile_above(row, candidates.pivot, [&](const auto& x, int tile) {
    float top = kMinusInfinity;
    for (float logit : x) top = fmaxf(top, candidates.hold(logit, row.scale) ? logit : kMinusInfinity);
    draw_from_tile(draw, row, tile, top, candidates);
  });
  return best_of_block(draw, row.scale);
}

template <class Logits>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    sample_with_entropy_kernel(const __grid_constant__ SampleWithEntropy call, const Split split) {
  const int part = blockIdx.x % split.parts;
  const Row<Logits> row = row_of<Logits>(call, split, blockIdx.x / split.parts);
  const Part<Logits> mine = row.part(part);
  Lane lane(mine.first);
  Draw draw;
  for_each_tile(mine, threadIdx.x, [&](const auto& x, int tile) {
    absorb(lane, x, tile, row.scale);
    draw_from_tile(draw, row, tile, maximum_of(x), Candidates());
  });
  Softmax state = merge_lanes(lane, mine, row.scale);
  draw = best_of_block(draw, row.scale);

  __shared__ bool is_last;
  __shared__ Softmax whole;
  __shared__ Draw best;
  __shared__ Filters filters;
  if (threadIdx.x < kWarpSize) {
    bool last = true;
    if (split.parts > 1) {
      const int token = draw.token;
      draw = Draw();
      last = merge_parts(state, token, call.workspace, row.number, part, split.parts, row.scale,
                         [&](int token) { draw_token(draw, row, token); });
      draw = best_of_warp(draw, row.scale);
    }
    if (threadIdx.x == 0) {
      is_last = last;
      whole = state;
      best = draw;
      if (last) filters = filters_of(call, row.number);
    }
  }
  __syncthreads();
  if (!is_last) return;

  draw = best;
  const bool defined = filters.in_range && finish(whole).log_sum >= 0;  // not NaN
  // Nothing lies above the maximum: it is kept. Each pass makes its Row anew; held through the other pass, it would
  // take more registers than there are.
  while (defined && draw.logit < whole.maximum) {
    bool kept = (draw.logit - whole.maximum) * row.scale >= filters.floor;
    if (kept && (filters.top_k < call.vocab || filters.top_p < 1)) {
      const Above above = weigh_above<Logits>(call, split, row.number, draw.logit, whole.maximum);
      kept = above.count < filters.top_k && (above.mass < filters.top_p * (1 + whole.rest) || filters.top_p >= 1);
    }
    if (kept) break;
    draw = draw_above<Logits>(call, split, row.number, {draw.logit, filters.floor, whole.maximum});
  }
  if (threadIdx.x > 0) return;
  const RowResult result = finish(whole);
  const float inverse = inverse_of(call.temperature[row.number]);
  call.tokens[row.number] = defined ? draw.token : -1;
  call.logprobs[row.number] = defined ? (draw.logit - whole.maximum) * inverse - result.log_sum : NAN;
  call.entropy[row.number] = defined ? result.entropy : NAN;
}

}  // namespace

const char* launch_sample_with_entropy(const SampleWithEntropy& call, void* stream) {
  return launch_rows(call, stream, [](auto logits) { return sample_with_entropy_kernel<decltype(logits)>; });
}

}  // namespace aepo::cuda
