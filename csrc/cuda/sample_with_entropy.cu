// A token from every row of the logits, its log-prob and the row's entropy, in one launch.
//
// The blocks of a row read it once: the softmax as in decode_entropy.cu, and beside it the best token by logit plus
// noise so far. The block that is done last merges the parts. Where filters are given
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

// The draws of a block's warps, in shared memory: registers are short, and most tiles do not need the whole of one.
class Draws {
 public:
  __device__ __forceinline__ void clear() {
    __syncthreads();  // what was here before has been read
    set_lead(Draw());
    if (threadIdx.x < kWarps) warps_[threadIdx.x] = Draw();
    __syncthreads();
  }

  // The warp's own best, the same for all lanes.
  __device__ __forceinline__ Draw mine() const { return warps_[threadIdx.x / kWarpSize]; }

  // The best of any warp so far, as far as it is known: what cannot beat it need not be looked at. It is some warp's
  // own, whichever of two writes last, so their order changes how much work is spared and nothing else. One load and
  // one store of 64 bits: a logit always comes with its noise.
  __device__ __forceinline__ Draw lead() const {
    const uint64_t bits = static_cast<const volatile uint64_t&>(lead_);
    return {__int_as_float(static_cast<int>(bits)), __int_as_float(static_cast<int>(bits >> 32)), 0};
  }

  __device__ __forceinline__ void set(const Draw& mine, const Draw& lead) {
    if (threadIdx.x % kWarpSize == 0) {
      warps_[threadIdx.x / kWarpSize] = mine;
      set_lead(lead);
    }
    __syncwarp();
  }

  // The best of the block, in every thread.
  __device__ __forceinline__ Draw best(float scale) const {
    __syncthreads();
    Draw best = warps_[0];
#pragma unroll
    for (int i = 1; i < kWarps; i++) {
      if (is_better(warps_[i], best, scale)) best = warps_[i];
    }
    return best;
  }

 private:
  __device__ __forceinline__ void set_lead(const Draw& draw) {
    static_cast<volatile uint64_t&>(lead_) =
        static_cast<uint64_t>(__float_as_int(draw.noise)) << 32 | static_cast<uint32_t>(__float_as_int(draw.logit));
  }

  uint64_t lead_ = 0;
  Draw warps_[kWarps];
};

__device__ __forceinline__ float select(const float (&x)[kWords], int i) {  // an index would put x into memory
  return i < 2 ? (i == 0 ? x[0] : x[1]) : (i == 2 ? x[2] : x[3]);
}

// Let the candidates of one tile compete with the draws of the block; `top` are this lane's largest.
// Most tiles are done with one bound or, after their random words are made, with a bound per word. Of the others, the
// words that may still win when their turn comes are read again and take two logarithms per logit.
template <class Logits>
__device__ __forceinline__ void draw_from_tile(Draws& draws, const Row<Logits>& row, int tile, const Tops& top,
                                               const Candidates& candidates) {
  Draw best = draws.lead();
  if (!__any_sync(kAllLanes, may_win(top.all, row.noisy * kMostNoise, best, row.scale))) return;
  const int first = tile + static_cast<int>(threadIdx.x) * Logits::kVec - row.head;
  float noise[kWords];
  bool any = false;
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    noise[w] = row.noisy * most_noise(smallest_word<Logits::kVec>(row.random, first + w * kStep<Logits>));
    any |= may_win(top.words[w], noise[w], best, row.scale);
  }
  if (!__any_sync(kAllLanes, any)) return;
  Draw draw = draws.mine();
#pragma unroll 1
  for (int w = 0; w < kWords; w++) {
    if (!__any_sync(kAllLanes, may_win(select(top.words, w), select(noise, w), best, row.scale))) continue;
#pragma unroll 1
    for (int four = 0; four < Logits::kVec; four += 4) {
      const int token = first + w * kStep<Logits> + four;
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
    if (is_better(draw, best, row.scale)) best = draw;
  }
  draws.set(draw, best);
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

// Softmax mass about the row's maximum, and number, of the logits above the pivot.
struct Above {
  float mass;
  int count;
};

template <class Logits>
__device__ __forceinline__ Above weigh_above(const SampleWithEntropy& call, const Split& split, int number,
                                             const Candidates& candidates) {
  __shared__ Above warps[kWarps];
  const Row<Logits> row = row_of<Logits>(call, split, number);
  Above above = {0, 0};
  for_each_tile_above(row, candidates.pivot, [&](const auto& x, int) {
    for (float logit : x) {
      above.mass += logit > candidates.pivot ? power_of_2((logit - candidates.maximum) * row.scale) : 0;
      above.count += logit > candidates.pivot;
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
  float scale;    // the row's
  bool in_range;  // they, and the temperature
};

__device__ __forceinline__ Filters filters_of(const SampleWithEntropy& call, int row) {
  const double temperature = call.temperature[row];
  Filters filters = {static_cast<int>(call.vocab), 1, kMinusInfinity, log2_scale(inverse_of(temperature)),
                     temperature >= 0 && temperature < HUGE_VAL};
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
__device__ __forceinline__ Draw draw_above(const SampleWithEntropy& call, const Split& split, int number, Draws& draws,
                                           const Candidates& candidates) {
  const Row<Logits> row = row_of<Logits>(call, split, number);
  draws.clear();
  for_each_tile_above(row, candidates.pivot, [&](auto& x, int tile) {
    for (float& logit : x) logit = candidates.hold(logit, row.scale) ? logit : kMinusInfinity;
    draw_from_tile(draws, row, tile, tops_of(x), candidates);
  });
  return draws.best(row.scale);
}

template <class Logits>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    sample_with_entropy_kernel(const __grid_constant__ SampleWithEntropy call, const Split split) {
  const int part = blockIdx.x % split.parts;
  const Row<Logits> row = row_of<Logits>(call, split, blockIdx.x / split.parts);
  const Part<Logits> mine = row.part(part);
  Lane lane(mine.first);
  __shared__ Draws draws;
  draws.clear();
  for_each_tile(mine, threadIdx.x, [&](const auto& x, int tile) {
    absorb(lane, x, tile, row.scale);
    draw_from_tile(draws, row, tile, tops_of(x), Candidates());
  });
  Softmax state = merge_lanes(lane, mine, row.scale);
  Draw draw = draws.best(row.scale);

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

  const bool defined = filters.in_range && finish(whole).log_sum >= 0;  // not NaN
  // Nothing lies above the maximum: it is kept. What lasts is in shared memory, and each pass makes its Row anew; kept
  // in registers through a pass, they would be more than there are.
  while (defined && best.logit < whole.maximum) {
    const Candidates candidates = {best.logit, filters.floor, whole.maximum};
    bool kept = (best.logit - whole.maximum) * filters.scale >= filters.floor;
    if (kept && (filters.top_k < call.vocab || filters.top_p < 1)) {
      const Above above = weigh_above<Logits>(call, split, row.number, candidates);
      kept = above.count < filters.top_k && (above.mass < filters.top_p * (1 + whole.rest) || filters.top_p >= 1);
    }
    if (kept) break;
    const Draw next = draw_above<Logits>(call, split, row.number, draws, candidates);
    if (threadIdx.x == 0) best = next;
    __syncthreads();
  }
  if (threadIdx.x > 0) return;
  const RowResult result = finish(whole);
  const float inverse = inverse_of(call.temperature[row.number]);
  call.tokens[row.number] = defined ? best.token : -1;
  call.logprobs[row.number] = defined ? (best.logit - whole.maximum) * inverse - result.log_sum : NAN;
  call.entropy[row.number] = defined ? result.entropy : NAN;
}

}  // namespace

const char* launch_sample_with_entropy(const SampleWithEntropy& call, void* stream) {
  return launch_rows(call, stream, [](auto logits) { return sample_with_entropy_kernel<decltype(logits)>; });
}

}  // namespace aepo::cuda
