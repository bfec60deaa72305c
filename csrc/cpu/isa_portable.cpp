#include "isa.h"
#include "simd_portable.h"

#include "logits_grad.h"
#include "token_stats.h"

namespace aepo {

SegmentStats token_stats_float64(const void* x, int64_t n, double scale) {
  return portable::token_stats<portable::SimdDouble, double>(x, n, scale);
}

void logits_grad_float64(const void* x, void* out, int64_t n, const RowGrad& grad) {
  portable::logits_grad<portable::SimdDouble, double>(x, out, n, grad);
}

const RowKernels kPortable = {
    "portable",
    {portable::token_stats<portable::Simd, BFloat16>, portable::token_stats<portable::Simd, Float16>,
     portable::token_stats<portable::Simd, float>, token_stats_float64},
    {portable::logits_grad<portable::Simd, BFloat16>, portable::logits_grad<portable::Simd, Float16>,
     portable::logits_grad<portable::Simd, float>, logits_grad_float64},
};

}  // namespace aepo
