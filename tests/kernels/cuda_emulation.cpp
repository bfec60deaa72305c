// The arithmetic of csrc/cuda/decode_entropy.cu on the host: the same header, with blocks, warps and lanes as loops.
// Compiled by test_cuda_arithmetic.py.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "lane_softmax.h"

using namespace aepo::cuda;

namespace {

constexpr int kWarpSize = 32, kWarps = kThreads / kWarpSize;

Softmax merge_warp(const Softmax* lanes, float scale) {
  Softmax state[kWarpSize];
  std::copy_n(lanes, kWarpSize, state);
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {  // __shfl_down_sync
    for (int i = 0; i < distance; i++) state[i] = merge(state[i], state[i + distance], scale);
  }
  return state[0];
}

template <class Logits>
Softmax block_softmax(const Part<Logits>& part, float scale) {
  Softmax block;
  for (int warp = 0; warp < kWarps; warp++) {
    Lane lanes[kWarpSize];
    float maximum = kLowest;
    for (int i = 0; i < kWarpSize; i++) {
      lanes[i] = read_lane(part, warp * kWarpSize + i, scale);
      maximum = std::max(maximum, lanes[i].maximum);
    }
    int holder = 0;
    while (lanes[holder].maximum != maximum) holder++;
    Softmax states[kWarpSize];
    for (int i = 0; i < kWarpSize; i++) {
      states[i] = softmax_of(lanes[i], part, warp * kWarpSize + i, scale, i == holder);
    }
    const Softmax state = merge_warp(states, scale);
    block = warp == 0 ? state : merge(block, state, scale);
  }
  return block;
}

template <class Logits>
void rows_of(const void* logits, int64_t rows, int64_t vocab, int64_t stride, const float* temperatures, int64_t blocks,
             unsigned order, float* maximum, float* log_sum, float* entropy) {
  const Split split = split_rows(rows, vocab, kTile<Logits>, Logits::kVec, blocks);
  std::vector<int> parts(split.parts);
  std::iota(parts.begin(), parts.end(), 0);
  std::shuffle(parts.begin(), parts.end(), std::mt19937(order));  // blocks run in any order
  for (int64_t row = 0; row < rows; row++) {
    const auto* const x = static_cast<const typename Logits::Element*>(logits) + row * stride;
    const float scale = log2_scale(inverse_temperature(temperatures[row]));
    std::vector<Softmax> partials(split.parts);
    for (int i : parts) {
      partials[i] = block_softmax(part_of_row<Logits>(x, vocab, i, split.tiles_per_part), scale);
    }
    Softmax state = partials[0];
    if (split.parts > 1) {
      Softmax lanes[kWarpSize];
      for (int i = 0; i < split.parts; i++) lanes[i % kWarpSize] = merge(lanes[i % kWarpSize], partials[i], scale);
      state = merge_warp(lanes, scale);
    }
    const RowResult result = finish(state);
    maximum[row] = state.maximum;
    log_sum[row] = result.log_sum;
    entropy[row] = result.entropy;
  }
}

}  // namespace

extern "C" void emulate(bool is_float32, const void* logits, int64_t rows, int64_t vocab, int64_t stride,
                        const float* temperatures, int64_t blocks, unsigned order, float* maximum, float* log_sum,
                        float* entropy) {
  const auto run = is_float32 ? rows_of<Float32Logits> : rows_of<BFloat16Logits>;
  run(logits, rows, vocab, stride, temperatures, blocks, order, maximum, log_sum, entropy);
}

extern "C" void split(bool is_float32, int64_t rows, int64_t vocab, int64_t blocks, int* parts, int* tiles_per_part) {
  const Split split = is_float32 ? split_rows(rows, vocab, kTile<Float32Logits>, Float32Logits::kVec, blocks)
                                 : split_rows(rows, vocab, kTile<BFloat16Logits>, BFloat16Logits::kVec, blocks);
  *parts = split.parts;
  *tiles_per_part = split.tiles_per_part;
}
