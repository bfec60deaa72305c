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

template <class Simd>
AEPO_INLINE typename Simd::Vec gradient(const GradTerms<Simd>& g, typename Simd::Vec x) {
  using Vec = typename Simd::Vec;
  // The clamp gives a -inf logit the probability 0 and keeps 0 * -inf away.
  const Vec y = Simd::max(Simd::broadcast(Simd::kMinExponent), Simd::fma(x - g.max, g.scale, g.offset));
  return Simd::exp2(y) * Simd::fma(g.slope, y, g.uniform);
}

template <class Simd, class T>
AEPO_INLINE void gradient2(const GradTerms<Simd>& g, const T* x, T* out) {
  typename Simd::Vec a, b;
  Simd::load2(x, a, b);
  Simd::store2(out, gradient<Simd>(g, a), gradient<Simd>(g, b));
}

template <class Simd, class T>
AEPO_ISA void logits_grad(const void* x, void* out, int64_t n, const RowGrad& row) {
  using Scalar = typename Simd::Scalar;
  constexpr int64_t kStep = 2 * Simd::kWidth;
  const T* logits = static_cast<const T*>(x);
  T* grad = static_cast<T*>(out);
  const GradTerms<Simd> g = {
      Simd::broadcast(static_cast<Scalar>(row.max)),     Simd::broadcast(static_cast<Scalar>(row.scale)),
      Simd::broadcast(static_cast<Scalar>(-row.offset)), Simd::broadcast(static_cast<Scalar>(row.uniform)),
      Simd::broadcast(static_cast<Scalar>(row.slope)),
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    prefetch_ahead(logits + i, kStep * sizeof(T));
    gradient2(g, logits + i, grad + i);
  }
  if (i < n) {
    T tail[kStep] = {};
    std::memcpy(tail, logits + i, (n - i) * sizeof(T));
    gradient2(g, tail, tail);
    std::memcpy(grad + i, tail, (n - i) * sizeof(T));
  }
}

}  // namespace aepo::AEPO_ISA_NAME
