#include "isa.h"
#include "simd_portable.h"

#include "kept_grad.h"
#include "logits_grad.h"
#include "sample_passes.h"
#include "token_stats.h"

namespace aepo {

SegmentStats token_stats_float64(const void* x, int64_t n, double scale) {
  return portable::token_stats<portable::SimdDouble, double>(x, n, scale);
}

void logits_grad_float64(const void* x, void* out, int64_t n, const RowGrad& grad) {
  portable::logits_grad<portable::SimdDouble, double>(x, out, n, grad);
}

SegmentStats kept_stats_float64(const void* x, int64_t n, double scale, const Kept& kept) {
  return portable::kept_stats<portable::SimdDouble, double>(x, n, scale, kept);
}

void kept_grad_float64(const void* x, void* out, int64_t n, const RowGrad& grad, const Kept& kept) {
  portable::kept_grad<portable::SimdDouble, double>(x, out, n, grad, kept);
}

void draw_float64(const void* x, int64_t n, int64_t first, const DrawRow& row, Draw& best) {
  portable::draw<portable::SimdDouble, double>(x, n, first, row, best);
}

void above_float64(const void* x, int64_t n, double threshold, double max, double scale, Above& total) {
  portable::above<portable::SimdDouble, double>(x, n, threshold, max, scale, total);
}

const RowKernels kPortable = {
    "portable",
    {portable::token_stats<portable::Simd, BFloat16>, portable::token_stats<portable::Simd, Float16>,
     portable::token_stats<portable::Simd, float>, token_stats_float64},
    {portable::logits_grad<portable::Simd, BFloat16>, portable::logits_grad<portable::Simd, Float16>,
     portable::logits_grad<portable::Simd, float>, logits_grad_float64},
    {portable::draw<portable::Simd, BFloat16>, portable::draw<portable::Simd, Float16>, portable::draw<portable::Simd, float>,
     draw_float64},
    {portable::above<portable::Simd, BFloat16>, portable::above<portable::Simd, Float16>, portable::above<portable::Simd, float>,
     above_float64},
    {portable::kept_stats<portable::Simd, BFloat16>, portable::kept_stats<portable::Simd, Float16>,
     portable::kept_stats<portable::Simd, float>, kept_stats_float64},
    {portable::kept_grad<portable::Simd, BFloat16>, portable::kept_grad<portable::Simd, Float16>,
     portable::kept_grad<portable::Simd, float>, kept_grad_float64},
};

}  // namespace aepo
