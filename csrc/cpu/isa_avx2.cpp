#include "isa.h"

#if defined(__x86_64__)
#include "simd_avx2.h"

#include "kept_grad.h"
#include "logits_grad.h"
#include "sample_passes.h"
#include "token_stats.h"

namespace aepo {

const RowKernels kAvx2 = {
    "avx2",
    {avx2::token_stats<avx2::Simd, BFloat16>, avx2::token_stats<avx2::Simd, Float16>,
     avx2::token_stats<avx2::Simd, float>, token_stats_float64},
    {avx2::logits_grad<avx2::Simd, BFloat16>, avx2::logits_grad<avx2::Simd, Float16>,
     avx2::logits_grad<avx2::Simd, float>, logits_grad_float64},
    {avx2::draw<avx2::Simd, BFloat16>, avx2::draw<avx2::Simd, Float16>, avx2::draw<avx2::Simd, float>,
     draw_float64},
    {avx2::above<avx2::Simd, BFloat16>, avx2::above<avx2::Simd, Float16>, avx2::above<avx2::Simd, float>,
     above_float64},
    {avx2::kept_stats<avx2::Simd, BFloat16>, avx2::kept_stats<avx2::Simd, Float16>,
     avx2::kept_stats<avx2::Simd, float>, kept_stats_float64},
    {avx2::kept_grad<avx2::Simd, BFloat16>, avx2::kept_grad<avx2::Simd, Float16>,
     avx2::kept_grad<avx2::Simd, float>, kept_grad_float64},
};

}  // namespace aepo
#endif
