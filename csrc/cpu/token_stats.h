// Softmax statistics of a run of logits in one read: maximum, sum, weighted sum. A template over the lanes (Simd) and
// the storage type, included once per instruction set after that set's simd header.
//
// All lanes share one running maximum, so they merge at the end by plain addition. It grows about ln(number of chunks)
// times; only then does a chunk pay for a reduction across lanes and for leaving the maximum out of the sum. Each chunk
// is summed from zero and then added, so that float32 makes 256 additions per lane and segment instead of 2048.
#pragma once

#include <cstring>

#include "prefetch.h"
#include "row_kernels.h"

namespace aepo::AEPO_ISA_NAME {

template <class Simd>
struct Running {
  using Vec = typename Simd::Vec;
  using Scalar = typename Simd::Scalar;

  Scalar scale;  // log2(e) / temperature
  Scalar max = minus_infinity<Scalar>();
  Scalar shift = 0;  // what is taken off a logit: max, or 0 while max is -inf (-inf - -inf would be NaN)
  Vec rest = Simd::broadcast(0);
  Vec weighted = Simd::broadcast(0);  // in log2 units
};

template <class Simd>
AEPO_INLINE typename Simd::Scalar lane_max(typename Simd::Vec v) {
  typename Simd::Scalar lane[Simd::kWidth];
  Simd::store(lane, v);
  typename Simd::Scalar result = lane[0];
  for (int i = 1; i < Simd::kWidth; i++) result = lane[i] > result ? lane[i] : result;
  return result;
}

template <class Simd>
AEPO_INLINE double lane_sum(typename Simd::Vec v) {
  typename Simd::Scalar lane[Simd::kWidth];
  Simd::store(lane, v);
  double result = 0;
  for (int i = 0; i < Simd::kWidth; i++) result += lane[i];
  return result;
}

// Make `max` the reference of the sums. The old maximum's own term, until now left out, becomes an ordinary one.
template <class Simd>
AEPO_INLINE void raise_max(Running<Simd>& state, typename Simd::Scalar max) {
  using Vec = typename Simd::Vec;
  if (state.max > minus_infinity<typename Simd::Scalar>()) {
    const Vec y = Simd::max(Simd::broadcast(Simd::kMinExponent), Simd::broadcast((state.max - max) * state.scale));
    const Vec e = Simd::exp2(y);
    const Vec sum = state.rest + Simd::first_lane(1);
    state.rest = e * sum;
    state.weighted = e * Simd::fma(y, sum, state.weighted);
  }
  state.max = max;
  state.shift = max;
}

// Add the logits x, none above state.max. kNewMax: the maximum was raised to one of them, and one occurrence of it
// stays out of the sums (others are ordinary terms of value 1). kept: where the exponentials go, or null.
template <bool kNewMax, class Simd, size_t kVecs>
AEPO_INLINE void add(Running<Simd>& state, const typename Simd::Vec (&x)[kVecs], typename Simd::Scalar* kept) {
  using Vec = typename Simd::Vec;
  const Vec scale = Simd::broadcast(state.scale), shift = Simd::broadcast(state.shift);
  const Vec zero = Simd::broadcast(0), one = Simd::broadcast(1), least = Simd::broadcast(Simd::kMinExponent);
  Vec rest = zero, weighted = zero, equal = zero;
  // Four step by step: one after the other, AVX2 took 4 % more cycles and the portable lanes 10 % (Zen 4).
  constexpr size_t kTogether = 4;
#pragma GCC unroll 8
  for (size_t first = 0; first < kVecs; first += kTogether) {
    Vec y[kTogether], e[kTogether];
    // The clamp makes the exponent of a -inf logit finite with power exactly 0, or 0 * -inf would come; NaN passes it.
#pragma GCC unroll 8
    for (size_t i = 0; i < kTogether; i++) y[i] = Simd::max(least, (x[first + i] - shift) * scale);
#pragma GCC unroll 8
    for (size_t i = 0; i < kTogether; i++) {
      e[i] = Simd::exp2(y[i]);
      if (kept != nullptr) Simd::store(kept + (first + i) * Simd::kWidth, e[i]);
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < kTogether; i++) {
      if (kNewMax) {
        e[i] = Simd::if_equal(x[first + i], shift, zero, e[i]);
        equal = equal + Simd::if_equal(x[first + i], shift, one, zero);
      }
      rest = rest + e[i];
      weighted = Simd::fma(e[i], y[i], weighted);
    }
  }
  if (kNewMax) rest = rest + Simd::first_lane(lane_sum<Simd>(equal) - 1);
  state.rest = state.rest + rest;
  state.weighted = state.weighted + weighted;
}

template <class Simd, class T>
AEPO_INLINE void add_chunk(Running<Simd>& state, const T* logits, typename Simd::Scalar* kept) {
  using Vec = typename Simd::Vec;
  Vec x[Simd::kChunk];
#pragma GCC unroll 8
  for (int i = 0; i < Simd::kChunk; i += 2) Simd::load2(logits + i * Simd::kWidth, x[i], x[i + 1]);
  Vec top = Simd::max(x[0], x[1]);
#pragma GCC unroll 8
  for (int i = 2; i < Simd::kChunk; i += 2) top = Simd::max(top, Simd::max(x[i], x[i + 1]));
  if (__builtin_expect(Simd::any_greater(top, Simd::broadcast(state.max)), 0)) {
    raise_max(state, lane_max<Simd>(top));
    add<true>(state, x, kept);
  } else {
    add<false>(state, x, kept);
  }
}

// kKept: exponentials and maxima are kept for kept_grad.h.
template <bool kKept, class Simd, class T>
AEPO_INLINE SegmentStats segment_stats(const T* logits, int64_t n, double scale, const Kept& kept) {
  using Scalar = typename Simd::Scalar;
  constexpr int64_t kChunk = Simd::kChunk * Simd::kWidth;
  Scalar* exponentials = static_cast<Scalar*>(kept.exponentials);
  Scalar* maxima = static_cast<Scalar*>(kept.maxima);
  Running<Simd> state{static_cast<Scalar>(scale)};
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    prefetch_ahead(logits + i, kChunk * sizeof(T));
    add_chunk(state, logits + i, kKept ? exponentials + i : nullptr);
    if (kKept) *maxima++ = state.max;
  }
  if (i < n) {
    T tail[kChunk];
    for (T& logit : tail) logit = minus_infinity<T>();
    std::memcpy(tail, logits + i, (n - i) * sizeof(T));
    add_chunk(state, tail, kKept ? exponentials + i : nullptr);
    if (kKept) *maxima = state.max;
  }
  return {state.max, lane_sum<Simd>(state.rest), lane_sum<Simd>(state.weighted) * kLn2};
}

template <class Simd, class T>
AEPO_ISA SegmentStats token_stats(const void* x, int64_t n, double scale) {
  return segment_stats<false, Simd>(static_cast<const T*>(x), n, scale, Kept());
}

template <class Simd, class T>
AEPO_ISA SegmentStats kept_stats(const void* x, int64_t n, double scale, const Kept& kept) {
  return segment_stats<true, Simd>(static_cast<const T*>(x), n, scale, kept);
}

}  // namespace aepo::AEPO_ISA_NAME
