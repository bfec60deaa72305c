// The Gumbel noise of a token, and the best of several tokens by logit plus noise: what one thread of the sampler does.
// Plain arithmetic that compiles for the GPU and, for the tests, for the host. The specification is
// aepo_kernels/reference/sample_with_entropy.py.
//
// Noise is in units of log2 and without log2(ln 2), a constant of all noise: -log2(-log2(1 - v)) with the word of the
// token in v = (word + 1/2) / 2^32.
#pragma once

#include "lane_softmax.h"

namespace aepo::cuda {

// log2(x), x > 0; one instruction on a GPU, good to 2^-22 of the result, or absolutely where x is near 1.
AEPO_HOST_DEVICE float log_2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::log2(x);
#endif
}

// (word + 1/2) / 2^32, in (0, 1].
AEPO_HOST_DEVICE float unit(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

AEPO_HOST_DEVICE float noise_of(uint32_t word) {
  const float v = unit(word);
  // -log2(1 - v): by its series where 1 - v has lost digits of v, which is where the winners are. For larger v, the
  // complement of the word is 1 - v with all its digits.
  const float series = v * kLog2E * (1 + v * (1 / 2.0f + v * (1 / 3.0f + v * (1 / 4.0f + v * (1 / 5.0f)))));
  return -log_2(v < 1 / 16.0f ? series : -log_2(unit(~word)));
}

// -log2(1 - v) >= v log2(e), whose logarithm is log2(v) + 0.5288: a bound on the noise of some words, by the smallest.
constexpr float kLog2Log2E = 0.5287f;
AEPO_HOST_DEVICE float most_noise(uint32_t smallest_word) { return -kLog2Log2E - log_2(unit(smallest_word)); }
constexpr float kMostNoise = 33 - kLog2Log2E;  // of word 0

struct Product {
  uint32_t high, low;
};

// One instruction on a GPU; from the C++ for it, nvcc 13.0 makes 64-bit arithmetic.
AEPO_HOST_DEVICE Product multiply(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  Product result;
  asm("{ .reg .u64 x; mul.wide.u32 x, %2, %3; mov.b64 {%1, %0}, x; }"
      : "=r"(result.high), "=r"(result.low)
      : "r"(a), "r"(b));
  return result;
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

// The random numbers of a row: token i has word i % 4 of Philox4x32-10 (Salmon et al. 2011) of the counter (i / 4,
// offset, 0) under the key `seed`, where 64-bit numbers give their lower half first. Only a counter's first word
// differs from token to token, so half of the first two rounds is made once per row: 18 products per counter, not 20.
class RandomRow {
 public:
  AEPO_HOST_DEVICE RandomRow(uint64_t seed, uint64_t offset)
      : key0_(static_cast<uint32_t>(seed)), key1_(static_cast<uint32_t>(seed >> 32)) {
    const Product first = multiply(static_cast<uint32_t>(offset >> 32), kMultiplier2);
    const Product second = multiply(first.high ^ static_cast<uint32_t>(offset) ^ key0_, kMultiplier0);
    word0_ = first.low ^ (key0_ + kWeyl0);
    word2_ = second.high ^ (key1_ + kWeyl1);
    word3_ = second.low;
  }

  // The words of the tokens 4 block, .. 4 block + 3.
  AEPO_HOST_DEVICE void words_of(uint32_t block, uint32_t* words) const {
    const Product first = multiply(block, kMultiplier0), second = multiply(first.high ^ key1_, kMultiplier2);
    uint32_t c0 = second.high ^ word0_, c1 = second.low, c2 = first.low ^ word2_, c3 = word3_;
    uint32_t key0 = key0_ + 2 * kWeyl0, key1 = key1_ + 2 * kWeyl1;
#pragma unroll
    for (int round = 3; round <= 10; round++) {
      const Product product0 = multiply(c0, kMultiplier0), product2 = multiply(c2, kMultiplier2);
      c0 = product2.high ^ c1 ^ key0;
      c1 = product2.low;
      c2 = product0.high ^ c3 ^ key1;
      c3 = product0.low;
      key0 += kWeyl0;
      key1 += kWeyl1;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
  }

 private:
  static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier2 = 0xCD9E8D57;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

  uint32_t key0_, key1_;
  uint32_t word0_, word2_, word3_;  // the row's share in the counter after two rounds
};

// The random words of the tokens first, .. first + 3: of two counters unless `first` is a multiple of 4.
AEPO_HOST_DEVICE void random_words(const RandomRow& row, int first, uint32_t* words) {
  uint32_t w[8] = {};
  row.words_of(first >> 2, w);
  if (first & 3) row.words_of((first >> 2) + 1, w + 4);
#pragma unroll
  for (int i = 0; i < 6; i++) w[i] = first & 2 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = first & 1 ? w[i + 1] : w[i];
}

AEPO_HOST_DEVICE uint32_t random_word(const RandomRow& row, int token) {
  uint32_t words[4];
  row.words_of(token >> 2, words);
  const uint32_t low = token & 1 ? words[1] : words[0], high = token & 1 ? words[3] : words[2];
  return token & 2 ? high : low;
}

// The smallest of the random words of a word of logits, whose first token is `first`. Where counters begin inside it,
// it is that of a few tokens more.
template <int kVec>
AEPO_HOST_DEVICE uint32_t smallest_word(const RandomRow& row, int first) {
  uint32_t smallest = 0xffffffff;
  const auto look_at = [&](int block) {
    uint32_t words[4];
    row.words_of(block, words);
#pragma unroll
    for (int i = 0; i < 4; i++) smallest = words[i] < smallest ? words[i] : smallest;
  };
#pragma unroll
  for (int i = 0; i < kVec / 4; i++) look_at((first >> 2) + i);
  if (first & 3) look_at((first >> 2) + kVec / 4);
  return smallest;
}

// A token with its logit and its noise. Two of them are compared by the difference of their logits: no offset of the
// logits costs digits, and no maximum need be known.
struct Draw {
  float logit = kLowest;
  float noise = kMinusInfinity;
  int token = -1;  // none; whatever is compared with it is better
};

AEPO_HOST_DEVICE bool is_better(const Draw& a, const Draw& b, float scale) {
  const float lead = (a.logit - b.logit) * scale, needed = b.noise - a.noise;
  return (lead > needed) | ((lead == needed) & (a.token < b.token));  // without a branch
}

// If false, no token with a logit up to `top` and noise up to `noise` is better than `draw`. The thousandth is for the
// roundings on both sides, which are a hundredth of it, and for ties.
AEPO_HOST_DEVICE bool may_win(float top, float noise, const Draw& draw, float scale) {
  return (top - draw.logit) * scale + noise > draw.noise - 1e-3f;
}

}  // namespace aepo::cuda
