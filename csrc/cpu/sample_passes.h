// The two passes of a draw over a run of logits: `draw` looks for the best score above a pivot, `above` weighs what
// lies above a logit. A template over the lanes (Simd) and the storage type, included once per instruction set.
//
// Few scores are computed. A chunk whose largest logit would not win with the largest possible noise has no noise
// made for it. In the others noise = -ln(-ln(1 - v)) <= -ln v with v = (word + 1/2) / 2^32, so the smallest word bounds
// the noise of the chunk, and its leading zeros do without a logarithm. Scores are computed, in double, only where a
// chunk may win: of the 1187 chunks of a row of 151,936 logits in 1 or 2 where 20 tokens lead, in 58 to 241 of normal
// noise with standard deviation 3 (six rows each).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "row_kernels.h"
#include "token_stats.h"

namespace aepo::AEPO_ISA_NAME {

constexpr double kMaxNoise = 22.875;  // of word 0: 33 ln 2, rounded up

// Philox4x32-10 (Salmon et al. 2011) for the counters (block, offset, 0) of kVecs vectors of blocks: words[j][i]
// belongs to token 4 (first_block + i) + j. Lanes of 64 bits hold words of 32, because that is what a product needs;
// what stands in their upper halves does not matter before the end. Returns the smallest word.
template <class Simd, int kVecs, int kBlocks>
AEPO_INLINE uint64_t philox(uint64_t seed, uint64_t offset, uint64_t first_block, uint64_t (&words)[4][kBlocks]) {
  using Wide = typename Simd::Wide;
  constexpr int kLanes = kBlocks / kVecs;
  const Wide zero = {}, multiplier0 = zero + 0xD2511F53, multiplier2 = zero + 0xCD9E8D57;
  Wide c[4][kVecs], lane = zero;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; v++) {
    c[0][v] = lane + (first_block + v * kLanes);
    c[1][v] = zero + offset;
    c[2][v] = zero + (offset >> 32);
    c[3][v] = zero;
  }
  Wide key0 = zero + seed, key1 = zero + (seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      const Wide product0 = Simd::multiply(c[0][v], multiplier0), product2 = Simd::multiply(c[2][v], multiplier2);
      c[0][v] = (product2 >> 32) ^ c[1][v] ^ key0;
      c[1][v] = product2;
      c[2][v] = (product0 >> 32) ^ c[3][v] ^ key1;
      c[3][v] = product0;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  Wide smallest = zero + (1ull << 32);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      const Wide word = c[j][v] & 0xffffffff;
      smallest = word < smallest ? word : smallest;
      std::memcpy(&words[j][v * kLanes], &word, sizeof word);
    }
  }
  uint64_t result = smallest[0];
  for (int i = 1; i < kLanes; i++) result = smallest[i] < result ? smallest[i] : result;
  return result;
}

// At least the noise of a word: v = (2 word + 1) / 2^33, so -ln v <= (leading zeros - 30) ln 2. The noise itself is less
// than -ln v by more than v / 2 >= 2^-34, so rounding does not change the order.
AEPO_INLINE double most_noise(uint64_t word) { return (__builtin_clzll(2 * word + 1) - 30) * kLn2; }

template <class Simd, class T>
AEPO_INLINE typename Simd::Scalar to_scalar(const T* logit) {
  using Vec = typename Simd::Vec;
  T lanes[2 * Simd::kWidth] = {*logit};
  Vec first, second;
  Simd::load2(lanes, first, second);
  return first[0];
}

template <class Simd, class T>
AEPO_INLINE typename Simd::Vec load_chunk(const T* logits, typename Simd::Vec (&x)[Simd::kChunk]) {
#pragma GCC unroll 8
  for (int i = 0; i < Simd::kChunk; i += 2) Simd::load2(logits + i * Simd::kWidth, x[i], x[i + 1]);
  typename Simd::Vec top = x[0];
#pragma GCC unroll 8
  for (int i = 1; i < Simd::kChunk; i++) top = Simd::max(top, x[i]);
  return top;
}

// No logit up to here is drawn: it is not above the pivot, or would not win with this much noise. Rounded down by more
// than float32's error, so that the exact tests decide at the bound.
template <class Scalar>
AEPO_INLINE Scalar draw_bound(const DrawRow& row, double best_score, double noise) {
  const double loses = row.max + (best_score - (row.greedy ? 0 : noise)) * row.temperature;
  double bound = loses > row.pivot ? loses : row.pivot;
  bound -= std::fabs(bound) * 0x1p-22 + FLT_MIN;
  return bound > std::numeric_limits<Scalar>::lowest() ? static_cast<Scalar>(bound) : minus_infinity<Scalar>();
}

// Score the tokens of one chunk; true if one of them is better than `best`, which it then replaces.
template <class Simd, class T>
AEPO_INLINE bool draw_chunk(const T* logits, int64_t first, typename Simd::Vec top, const DrawRow& row, Draw& best) {
  using Scalar = typename Simd::Scalar;
  constexpr int kLanes = sizeof(typename Simd::Wide) / sizeof(uint64_t);
  constexpr int kBlocks = Simd::kChunk * Simd::kWidth / 4;
  uint64_t words[4][kBlocks];
  const uint64_t smallest = philox<Simd, kBlocks / kLanes>(row.seed, row.offset, first / 4, words);
  if (!Simd::any_greater(top, Simd::broadcast(draw_bound<Scalar>(row, best.score, most_noise(smallest))))) return false;

  // The same for each word, as a bound on integers: v < exp(z - best), where z is the largest of the chunk.
  const double v = std::exp((lane_max<Simd>(top) - row.max) / row.temperature - best.score);
  const uint64_t limit = row.greedy || v >= 1 ? 1ull << 32 : static_cast<uint64_t>(v * 0x1p32) + 1;
  // A row's first chunks have little to beat, and all words are below that bound. Then each token has one of its own:
  // without it a row of 1,000 float32 logits takes 1.7 times as long.
  const bool bound_tokens = limit == 1ull << 32 && !row.greedy;
  bool found = false;
  for (int i = 0; i < kBlocks; i++) {
    for (int j = 0; j < 4; j++) {
      if (words[j][i] >= limit) continue;
      const double x = to_scalar<Simd>(logits + 4 * i + j);
      if (!(x > row.pivot)) continue;
      const double z = (x - row.max) / row.temperature;
      if (bound_tokens && z + most_noise(words[j][i]) < best.score) continue;
      const double noise = row.greedy ? 0 : -std::log(-std::log1p(-(words[j][i] + 0.5) * 0x1p-32));
      const double score = z + noise;
      if (score > best.score) {
        best = {score, first + 4 * i + j, x};
        found = true;
      }
    }
  }
  return found;
}

template <class Simd, class T>
AEPO_ISA void draw(const void* x, int64_t n, int64_t first, const DrawRow& row, Draw& best) {
  using Scalar = typename Simd::Scalar;
  constexpr int64_t kChunk = Simd::kChunk * Simd::kWidth;
  const T* logits = static_cast<const T*>(x);
  T tail[kChunk];
  Scalar bound = draw_bound<Scalar>(row, best.score, kMaxNoise);
  for (int64_t i = 0; i < n; i += kChunk) {
    const T* chunk = logits + i;
    if (i + kChunk > n) {
      for (T& logit : tail) logit = minus_infinity<T>();
      std::memcpy(tail, chunk, (n - i) * sizeof(T));
      chunk = tail;
    }
    typename Simd::Vec lanes[Simd::kChunk];
    const auto top = load_chunk<Simd>(chunk, lanes);
    if (!Simd::any_greater(top, Simd::broadcast(bound))) continue;
    if (draw_chunk<Simd>(chunk, first + i, top, row, best)) bound = draw_bound<Scalar>(row, best.score, kMaxNoise);
  }
}

template <class Simd, class T>
AEPO_ISA void above(const void* x, int64_t n, double threshold, double max, double scale, Above& total) {
  using Vec = typename Simd::Vec;
  using Scalar = typename Simd::Scalar;
  constexpr int64_t kChunk = Simd::kChunk * Simd::kWidth;
  const T* logits = static_cast<const T*>(x);
  const Vec bound = Simd::broadcast(static_cast<Scalar>(threshold)), shift = Simd::broadcast(static_cast<Scalar>(max));
  const Vec factor = Simd::broadcast(static_cast<Scalar>(scale)), least = Simd::broadcast(Simd::kMinExponent);
  const Vec zero = Simd::broadcast(0), one = Simd::broadcast(1);
  Vec mass = zero, count = zero;
  T tail[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const T* chunk = logits + i;
    if (i + kChunk > n) {
      for (T& logit : tail) logit = minus_infinity<T>();
      std::memcpy(tail, chunk, (n - i) * sizeof(T));
      chunk = tail;
    }
    Vec lanes[Simd::kChunk];
    if (!Simd::any_greater(load_chunk<Simd>(chunk, lanes), bound)) continue;
    Vec chunk_mass = zero;
#pragma GCC unroll 8
    for (int v = 0; v < Simd::kChunk; v++) {
      const Vec e = Simd::exp2(Simd::max(least, (lanes[v] - shift) * factor));
      chunk_mass = chunk_mass + Simd::if_greater(lanes[v], bound, e, zero);
      count = count + Simd::if_greater(lanes[v], bound, one, zero);
    }
    mass = mass + chunk_mass;
  }
  total.mass += lane_sum<Simd>(mass);
  total.count += lane_sum<Simd>(count);
}

}  // namespace aepo::AEPO_ISA_NAME
