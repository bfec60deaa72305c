// What is done once per row, in float64.
#include <algorithm>
#include <cmath>
#include <limits>

#include "row_kernels.h"
#include "simd_portable.h"

namespace aepo {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A pair of maxima and sums is merged by expressing the lower one's terms about the higher maximum; that maximum's own
// term, left out of its `rest`, becomes an ordinary one.
SegmentStats merge(const SegmentStats& a, const SegmentStats& b, double temperature) {
  const SegmentStats& high = b.max > a.max ? b : a;
  const SegmentStats& low = b.max > a.max ? a : b;
  if (low.max == -std::numeric_limits<double>::infinity()) {  // no finite logit: nothing to add, except NaN
    return {high.max, high.rest + low.rest, high.weighted};
  }
  const double d = (low.max - high.max) / temperature;
  const double e = std::exp(d);
  const double sum = low.rest + 1;
  const double weighted = e == 0 ? 0 : e * (low.weighted + d * sum);  // d may be -inf, and 0 * -inf NaN
  return {high.max, high.rest + e * sum, high.weighted + weighted};
}

}  // namespace

double log2_scale(double temperature) {
  // The kernels need a float that is neither inf, or the maximum's own 0 * inf would be NaN, nor 0, or that of a -inf logit.
  using Float = std::numeric_limits<float>;
  return std::clamp<double>(kLog2E / temperature, Float::denorm_min(), Float::max());
}

RowStats merge_segments(const SegmentStats* segments, int64_t n, double temperature) {
  SegmentStats row = {-std::numeric_limits<double>::infinity(), 0, 0};
  for (int64_t i = 0; i < n; i++) row = merge(row, segments[i], temperature);
  if (!std::isfinite(row.max) || std::isnan(row.rest)) {
    const bool empty = row.max < 0 && !std::isnan(row.rest);
    return {empty ? row.max : kNaN, kNaN, kNaN};
  }
  const double log_sum = std::log1p(row.rest);
  return {row.max, log_sum, log_sum - row.weighted / (1 + row.rest)};
}

double label_logprob(double logit, const RowStats& stats, double temperature) {
  return (logit - stats.max) / temperature - stats.log_sum;
}

RowGrad row_grad(const RowStats& stats, double grad_logprob, double grad_entropy, double temperature) {
  const double uniform = -(grad_logprob + grad_entropy * stats.entropy) / temperature;
  // One quiet NaN for all: the kernels round to bfloat16 by integer addition, which a NaN of all ones would overflow.
  return {stats.max, log2_scale(temperature), kLog2E * stats.log_sum, std::isnan(uniform) ? kNaN : uniform,
          -grad_entropy * kLn2 / temperature};
}

double label_grad(double logit, const RowStats& stats, double grad_logprob, double grad_entropy, double temperature) {
  const double log_p = label_logprob(logit, stats, temperature);
  const double p = std::exp(log_p);
  const double entropy_part = p == 0 ? 0 : grad_entropy * p * (log_p + stats.entropy);
  return (-grad_logprob * std::expm1(log_p) - entropy_part) / temperature;
}

namespace {

template <class T>
double load16(const void* x, int64_t i) {
  T lanes[8] = {static_cast<const T*>(x)[i]};
  portable::Simd::Vec even, odd;
  portable::Simd::load2(lanes, even, odd);
  return even[0];
}

template <class T>
void store16(void* x, int64_t i, double value) {
  T lanes[8];
  const portable::Simd::Vec all = portable::Simd::broadcast(static_cast<float>(std::isnan(value) ? kNaN : value));
  portable::Simd::store2(lanes, all, all);
  static_cast<T*>(x)[i] = lanes[0];
}

}  // namespace

double load_logit(LogitsType type, const void* x, int64_t i) {
  switch (type) {
    case kBFloat16:
      return load16<BFloat16>(x, i);
    case kFloat16:
      return load16<Float16>(x, i);
    case kFloat32:
      return static_cast<const float*>(x)[i];
    default:
      return static_cast<const double*>(x)[i];
  }
}

void store_logit(LogitsType type, void* x, int64_t i, double value) {
  switch (type) {
    case kBFloat16:
      return store16<BFloat16>(x, i, value);
    case kFloat16:
      return store16<Float16>(x, i, value);
    case kFloat32:
      static_cast<float*>(x)[i] = static_cast<float>(value);
      return;
    default:
      static_cast<double*>(x)[i] = value;
  }
}

}  // namespace aepo
