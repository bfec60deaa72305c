// Gradient of the log-probability and the entropy of one row with respect to its logits (RowGrad): one read, one write,
// over the logits themselves if asked. The label's own element is not made here (row_kernels.h: store_logit).
#pragma once

#include <cstring>

#include "prefetch.h"
#include "row_kernels.h"

namespace aepo::AEPO_ISA_NAME {

template <class Simd>
struct GradTerms {
  using Vec = typename Simd::Vec;
  Vec max, scale, offset, uniform, slope;
};

// kVecs vectors step by step, so that their chains of dependent instructions run side by side. kEntropy: the entropy has
// a gradient; without one p is only scaled, and y need not be kept.
template <bool kEntropy, class Simd, size_t kVecs, class T>
AEPO_INLINE void gradients(const GradTerms<Simd>& g, const T* x, T* out) {
  using Vec = typename Simd::Vec;
  Vec y[kVecs], p[kVecs];
#pragma GCC unroll 8
  for (size_t i = 0; i < kVecs; i += 2) Simd::load2(x + i * Simd::kWidth, y[i], y[i + 1]);
#pragma GCC unroll 8
  for (size_t i = 0; i < kVecs; i++) y[i] = Simd::fma(y[i] - g.max, g.scale, g.offset);
  // The clamp gives a -inf logit the probability 0 and keeps 0 * -inf away.
  if (kEntropy || !Simd::kExp2TakesAll) {
    const Vec least = Simd::broadcast(Simd::kMinExponent);
#pragma GCC unroll 8
    for (size_t i = 0; i < kVecs; i++) y[i] = Simd::max(least, y[i]);
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < kVecs; i++) p[i] = Simd::exp2(y[i]);
#pragma GCC unroll 8
  for (size_t i = 0; i < kVecs; i++) p[i] = p[i] * (kEntropy ? Simd::fma(g.slope, y[i], g.uniform) : g.uniform);
#pragma GCC unroll 8
  for (size_t i = 0; i < kVecs; i += 2) Simd::store2(out + i * Simd::kWidth, p[i], p[i + 1]);
}

template <bool kEntropy, class Simd, class T>
AEPO_INLINE void grad_row(const GradTerms<Simd>& g, const T* logits, T* grad, int64_t n) {
  // Measured on Zen 4: to widen and round 16-bit types leaves processors room to run four chains at once (10 % fewer
  // cycles than two in AVX2), float32 does not and would have its registers spilled.
  constexpr int kVecs = sizeof(T) == 2 ? 4 : 2;
  constexpr int64_t kStep = kVecs * Simd::kWidth;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    prefetch_ahead(logits + i, kStep * sizeof(T));
    gradients<kEntropy, Simd, kVecs>(g, logits + i, grad + i);
  }
  if (i < n) {
    T tail[kStep] = {};
    std::memcpy(tail, logits + i, (n - i) * sizeof(T));
    gradients<kEntropy, Simd, kVecs>(g, tail, tail);
    std::memcpy(grad + i, tail, (n - i) * sizeof(T));
  }
}

template <class Simd, class T>
AEPO_ISA void logits_grad(const void* x, void* out, int64_t n, const RowGrad& row) {
  using Scalar = typename Simd::Scalar;
  const T* logits = static_cast<const T*>(x);
  T* grad = static_cast<T*>(out);
  const GradTerms<Simd> g = {
      Simd::broadcast(static_cast<Scalar>(row.max)),     Simd::broadcast(static_cast<Scalar>(row.scale)),
      Simd::broadcast(static_cast<Scalar>(-row.offset)), Simd::broadcast(static_cast<Scalar>(row.uniform)),
      Simd::broadcast(static_cast<Scalar>(row.slope)),
  };
  if (row.slope == 0) {
    grad_row<false, Simd>(g, logits, grad, n);
  } else {
    grad_row<true, Simd>(g, logits, grad, n);
  }
}

}  // namespace aepo::AEPO_ISA_NAME
