// The gradient of logits_grad.h, made of the exponentials that the statistics have kept: a logit that is visited twice
// pays for one. They stand about the running maximum of their chunk, which a factor corrects.
#pragma once

#include <cmath>
#include <cstring>

#include "row_kernels.h"

namespace aepo::AEPO_ISA_NAME {

template <class Simd>
struct KeptTerms {
  using Vec = typename Simd::Vec;
  Vec max, scale, offset;  // of log2 p, which the entropy's part needs
  Vec uniform, slope;      // those of RowGrad times the factor
};

template <bool kEntropy, class Simd, size_t kVecs, class T>
AEPO_INLINE void kept_gradients(const KeptTerms<Simd>& g, const T* x, const typename Simd::Scalar* kept, T* out) {
  using Vec = typename Simd::Vec;
  Vec e[kVecs];
#pragma GCC unroll 8
  for (size_t i = 0; i < kVecs; i++) e[i] = Simd::load(kept + i * Simd::kWidth);
  if (kEntropy) {
    Vec y[kVecs];
    const Vec least = Simd::broadcast(Simd::kMinExponent);  // keeps 0 * -inf away
#pragma GCC unroll 8
    for (size_t i = 0; i < kVecs; i += 2) Simd::load2(x + i * Simd::kWidth, y[i], y[i + 1]);
#pragma GCC unroll 8
    for (size_t i = 0; i < kVecs; i++) {
      y[i] = Simd::max(least, Simd::fma(y[i] - g.max, g.scale, g.offset));
      e[i] = e[i] * Simd::fma(g.slope, y[i], g.uniform);
    }
  } else {
#pragma GCC unroll 8
    for (size_t i = 0; i < kVecs; i++) e[i] = e[i] * g.uniform;
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kVecs; i += 2) Simd::store2(out + i * Simd::kWidth, e[i], e[i + 1]);
}

template <bool kEntropy, class Simd, class T>
AEPO_INLINE void kept_row(const RowGrad& row, const T* x, T* out, int64_t n, const Kept& kept) {
  using Scalar = typename Simd::Scalar;
  constexpr int kVecs = 4;
  constexpr int64_t kStep = kVecs * Simd::kWidth, kChunk = Simd::kChunk * Simd::kWidth;
  static_assert(kChunk == 2 * kStep);
  const Scalar* e = static_cast<const Scalar*>(kept.exponentials);
  const Scalar* maxima = static_cast<const Scalar*>(kept.maxima);
  KeptTerms<Simd> g = {Simd::broadcast(static_cast<Scalar>(row.max)), Simd::broadcast(static_cast<Scalar>(row.scale)),
                       Simd::broadcast(static_cast<Scalar>(-row.offset)), Simd::broadcast(0), Simd::broadcast(0)};
  Scalar max = 0;
  for (int64_t i = 0; i < n; i += kChunk) {
    if (i == 0 || maxima[i / kChunk] != max) {
      max = maxima[i / kChunk];
      const double factor = std::exp2((max - row.max) * row.scale - row.offset);
      g.uniform = Simd::broadcast(static_cast<Scalar>(factor * row.uniform));
      g.slope = Simd::broadcast(static_cast<Scalar>(factor * row.slope));
    }
    if (i + kChunk <= n) {
      kept_gradients<kEntropy, Simd, kVecs>(g, x + i, e + i, out + i);
      kept_gradients<kEntropy, Simd, kVecs>(g, x + i + kStep, e + i + kStep, out + i + kStep);
    } else {
      T tail[kChunk] = {};
      std::memcpy(tail, x + i, (n - i) * sizeof(T));
      kept_gradients<kEntropy, Simd, kVecs>(g, tail, e + i, tail);
      kept_gradients<kEntropy, Simd, kVecs>(g, tail + kStep, e + i + kStep, tail + kStep);
      std::memcpy(out + i, tail, (n - i) * sizeof(T));
    }
  }
}

template <class Simd, class T>
AEPO_ISA void kept_grad(const void* x, void* out, int64_t n, const RowGrad& row, const Kept& kept) {
  const T* logits = static_cast<const T*>(x);
  if (row.slope == 0) {
    kept_row<false, Simd>(row, logits, static_cast<T*>(out), n, kept);
  } else {
    kept_row<true, Simd>(row, logits, static_cast<T*>(out), n, kept);
  }
}

}  // namespace aepo::AEPO_ISA_NAME
