// Softmax statistics of a row by many lanes (GPU threads): what one lane does, how states are merged, how a row is cut.
// Plain arithmetic that compiles for the GPU and, for the tests, for the host.
//
// Each lane keeps an online softmax of its own and exchanges nothing before its last logit, the design of
// aepo_kernels/kernels/token_stats.py. With d = (x - maximum) * scale in units of log2, a softmax state holds the sums
// of 2^d and 2^d d; the sum leaves out the maximum's own 1, or a confident row would lose its entropy (1 + 1e-9 == 1).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define AEPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define AEPO_HOST_DEVICE inline
#endif

namespace aepo::cuda {

// 4 independent 16-byte loads per lane and 8 blocks of 128 lanes per multiprocessor (64 registers each) keep 64 KiB in
// flight in each of them; 3.35 TB/s of memory, 1 us away from 132 of them, asks for 25, 8 TB/s for 148 of them for 54.
constexpr int kThreads = 128;
constexpr int kWords = 4;
constexpr int kBlocksPerProcessor = 8;

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -FLT_MAX;     // no logit but -inf is below it
constexpr float kLog2Zero = -200;       // stands for d = -inf: 2^-200 is 0 in float32, and 0 * -200 is no NaN
constexpr float kMinusInfinity = -HUGE_VALF;

// 2^y; one instruction on a GPU.
AEPO_HOST_DEVICE float power_of_2(float y) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#else
  return std::exp2(y);
#endif
}

// max(d, kLog2Zero) that keeps a NaN, as fmaxf does not.
AEPO_HOST_DEVICE float finite_log2(float d) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(d), "f"(kLog2Zero));
  return result;
#else
  return d < kLog2Zero ? kLog2Zero : d;
#endif
}

// 1 / temperature, NaN for a temperature that is not > 0 and finite. Below 3e-39 it would be inf, and inf * 0 NaN.
AEPO_HOST_DEVICE float inverse_temperature(float temperature) {
  return temperature > 0 && temperature <= FLT_MAX ? fminf(1 / temperature, FLT_MAX) : NAN;
}

AEPO_HOST_DEVICE float log2_scale(float inverse_temperature) {
  const float scale = inverse_temperature * kLog2E;
  return scale > FLT_MAX ? FLT_MAX : scale;
}

// The softmax of some logits. Without a finite logit: {kLowest, -1, 0}, which merges as nothing.
struct Softmax {
  float maximum = kLowest;
  float rest = -1;      // sum of 2^d over all but one occurrence of the maximum
  float weighted = 0;   // sum of 2^d d
};

AEPO_HOST_DEVICE Softmax merge(const Softmax& a, const Softmax& b, float scale) {
  const bool swap = b.maximum > a.maximum;  // selected by value: a reference would put both into memory
  const Softmax high = {swap ? b.maximum : a.maximum, swap ? b.rest : a.rest, swap ? b.weighted : a.weighted};
  const Softmax low = {swap ? a.maximum : b.maximum, swap ? a.rest : b.rest, swap ? a.weighted : b.weighted};
  const float shift = finite_log2((low.maximum - high.maximum) * scale);
  const float decay = power_of_2(shift), sum = 1 + low.rest;
  return {high.maximum, high.rest + decay * sum, high.weighted + decay * (low.weighted + shift * sum)};
}

struct RowResult {
  float log_sum;  // log of the sum of exp((x - maximum) / temperature)
  float entropy;  // nats
};

// NaN where the row has no softmax: NaN in the row makes both sums NaN, +inf makes `weighted` NaN, and without a finite
// logit `rest` is -1.
AEPO_HOST_DEVICE RowResult finish(const Softmax& row) {
  const bool defined = row.rest >= 0 && row.weighted <= 0;
  const float log_sum = defined ? log1pf(row.rest) : NAN;
  return {log_sum, log_sum - row.weighted * kLn2 / (1 + row.rest)};
}

// The state of a lane: `own` sums 2^d over the newest tile that reached the maximum (the tile at `own_tile`), `others`
// over all other tiles. So the maximum's own 1 can be left out by reading that tile of one lane again.
struct Lane {
  explicit AEPO_HOST_DEVICE Lane(int first_tile) : own_tile(first_tile) {}

  float maximum = kLowest;
  float others = 0, own = 0, weighted = 0;
  int own_tile;
};

// The largest logits of each word of a tile, and of all of them. NaN is left out.
struct Tops {
  float words[kWords], all;
};

template <int N>
AEPO_HOST_DEVICE Tops tops_of(const float (&x)[N]) {
  constexpr int kVec = N / kWords;
  Tops top;
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    top.words[w] = x[w * kVec];
#pragma unroll
    for (int i = 1; i < kVec; i++) top.words[w] = fmaxf(top.words[w], x[w * kVec + i]);
  }
  static_assert(kWords == 4, "four words in two steps");
  top.all = fmaxf(fmaxf(top.words[0], top.words[1]), fmaxf(top.words[2], top.words[3]));
  return top;
}

// Add one tile's logits x[N] of this lane.
template <int N>
AEPO_HOST_DEVICE void absorb(Lane& lane, const float (&x)[N], int tile, float scale) {
  const float tile_maximum = tops_of(x).all;
  const bool is_own = tile_maximum >= lane.maximum;  // false for a tile of -inf alone
  const float maximum = fmaxf(lane.maximum, tile_maximum);
  float sum[4] = {0, 0, 0, 0}, weighted[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < N; i++) {
    // Subtracted before it is scaled: exact for neighbouring logits at any offset. NaN stays, +inf becomes NaN.
    const float d = finite_log2((x[i] - maximum) * scale);
    const float e = power_of_2(d);
    sum[i % 4] += e;
    weighted[i % 4] += e * d;
  }
  const float tile_sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  const float tile_weighted = (weighted[0] + weighted[1]) + (weighted[2] + weighted[3]);
  const float shift = finite_log2((lane.maximum - maximum) * scale), decay = power_of_2(shift);
  lane.weighted = (lane.weighted + shift * (lane.others + lane.own)) * decay + tile_weighted;
  lane.others = lane.others * decay + (is_own ? lane.own * decay : tile_sum);
  lane.own = is_own ? tile_sum : lane.own;
  lane.own_tile = is_own ? tile : lane.own_tile;
  lane.maximum = maximum;
}

// Sum of 2^d over x without one occurrence of the maximum; -1 if there is none.
template <int N>
AEPO_HOST_DEVICE float rest_of(const float (&x)[N], float maximum, float scale) {
  float smaller = 0, at_maximum = -1;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float e = power_of_2(finite_log2((x[i] - maximum) * scale));
    smaller += x[i] == maximum ? 0 : e;
    at_maximum += x[i] == maximum ? 1 : 0;
  }
  return smaller + at_maximum;
}

struct alignas(16) Word {
  uint32_t bits[4];
};

AEPO_HOST_DEVICE Word load_word(const void* aligned) {
#ifdef __CUDA_ARCH__
  const uint4 word = __ldg(static_cast<const uint4*>(aligned));
  return {{word.x, word.y, word.z, word.w}};
#else
  return *static_cast<const Word*>(aligned);
#endif
}

AEPO_HOST_DEVICE float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  union {
    uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
#endif
}

// How logits are stored: the element type, how many there are in a word, and their values.
struct Float32Logits {
  using Element = float;
  static constexpr int kVec = 4;
  static AEPO_HOST_DEVICE float value(float x) { return x; }
  static AEPO_HOST_DEVICE void unpack(const Word& word, float* x) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = as_float(word.bits[i]);
  }
};

struct BFloat16Logits {
  using Element = uint16_t;
  static constexpr int kVec = 8;
  static AEPO_HOST_DEVICE float value(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static AEPO_HOST_DEVICE void unpack(const Word& word, float* x) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = as_float(word.bits[i] << 16);
      x[2 * i + 1] = as_float(word.bits[i] & 0xffff0000u);
    }
  }
};

// Positions of logits within a row count from the 16-byte boundary at or below its first one, so that every whole word
// is read with one load, wherever a vocabulary, stride or slice puts the row. Of a tile that starts at position t, lane
// i holds the kWords words at t + (i + w * kThreads) * kVec.
template <class Logits>
constexpr int kStep = kThreads * Logits::kVec;
template <class Logits>
constexpr int kTile = kWords * kStep<Logits>;

// One block's part of a row: positions [begin, end), of tiles that start at `first`.
template <class Logits>
struct Part {
  const typename Logits::Element* x;  // the aligned pointer
  int first, begin, end;
};

template <class Logits>
AEPO_HOST_DEVICE Part<Logits> part_of_row(const typename Logits::Element* row, int vocab, int part,
                                          int tiles_per_part) {
  const int head = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Word) / sizeof(*row));
  const int64_t first = static_cast<int64_t>(part) * tiles_per_part * kTile<Logits>;
  const int64_t last = first + static_cast<int64_t>(tiles_per_part) * kTile<Logits>;
  const int end = head + vocab;
  return {row - head, static_cast<int>(first), first > head ? static_cast<int>(first) : head,
          last < end ? static_cast<int>(last) : end};
}

// The logit at a position, -inf outside [begin, end), where nothing is read.
template <class Logits>
AEPO_HOST_DEVICE float logit_at(const Part<Logits>& part, int at) {
  return at >= part.begin && at < part.end ? Logits::value(part.x[at]) : kMinusInfinity;
}

// The lane's logits of the tile at `tile`, -inf outside [begin, end). Reads nothing outside.
template <class Logits>
AEPO_HOST_DEVICE void load_cut_tile(const Part<Logits>& part, int tile, int lane,
                                    float (&x)[kWords * Logits::kVec]) {
#pragma unroll
  for (int w = 0; w < kWords; w++) {
    const int at = tile + w * kStep<Logits> + lane * Logits::kVec;
    if (at >= part.begin && at + Logits::kVec <= part.end) {
      Logits::unpack(load_word(part.x + at), x + w * Logits::kVec);
      continue;
    }
#pragma unroll
    for (int i = 0; i < Logits::kVec; i++) x[w * Logits::kVec + i] = logit_at(part, at + i);
  }
}

// body(x, tile) for all tiles of the part, with this lane's logits x[kWords * kVec] of the tile at `tile`: first for
// the at most two cut tiles, then for the whole ones.
template <class Logits, class Body>
AEPO_HOST_DEVICE void for_each_tile(const Part<Logits>& part, int lane, const Body& body) {
  constexpr int kTileSize = kTile<Logits>;
  const int whole_first = part.begin > part.first ? part.first + kTileSize : part.first;
  const int whole = part.end > whole_first ? (part.end - whole_first) / kTileSize * kTileSize : 0;
  const int whole_end = whole_first + whole;
  const int cut_step = whole_end > part.first ? whole_end - part.first : kTileSize;
  float x[kWords * Logits::kVec];
#pragma unroll 1
  for (int tile = part.begin > part.first ? part.first : whole_end; tile < part.end; tile += cut_step) {
    load_cut_tile(part, tile, lane, x);
    body(x, tile);
  }
#pragma unroll 1
  for (int tile = whole_first; tile < whole_end; tile += kTileSize) {
    Word words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; w++) words[w] = load_word(part.x + tile + w * kStep<Logits> + lane * Logits::kVec);
#pragma unroll
    for (int w = 0; w < kWords; w++) Logits::unpack(words[w], x + w * Logits::kVec);
    body(x, tile);
  }
}

// A lane's softmax. `exact`: without the rounding of the maximum's own 1, by reading the tile that holds it again; only
// one lane among those that are merged with the largest maximum needs it.
template <class Logits>
AEPO_HOST_DEVICE Softmax softmax_of(const Lane& state, const Part<Logits>& part, int lane, float scale, bool exact) {
  float own = state.own - 1;
  if (exact) {
    float x[kWords * Logits::kVec];
    load_cut_tile(part, state.own_tile, lane, x);
    own = rest_of(x, state.maximum, scale);
  }
  return {state.maximum, state.others + own, state.weighted};
}

// How many blocks share a row. All blocks of a call run at once where that is possible: with `blocks` of them resident,
// rows are split until they fill the GPU, into parts of at least one tile.
struct Split {
  int parts, tiles_per_part;
};

inline Split split_rows(int64_t rows, int64_t vocab, int tile, int vec, int64_t blocks) {
  const int64_t tiles = (vocab + vec - 1 + tile - 1) / tile;  // a row may start vec - 1 into its first word
  int64_t parts = rows > 0 ? blocks / rows : 1;
  parts = parts < 1 ? 1 : parts > tiles ? tiles : parts;
  const int64_t tiles_per_part = (tiles + parts - 1) / parts;
  return {static_cast<int>((tiles + tiles_per_part - 1) / tiles_per_part), static_cast<int>(tiles_per_part)};
}

}  // namespace aepo::cuda
