#include "isa.h"

#if defined(__x86_64__)
#include "simd_avx512.h"

#include "kept_grad.h"
#include "logits_grad.h"
#include "sample_passes.h"
#include "token_stats.h"

namespace aepo {

const RowKernels kAvx512 = {
    "avx512",
    {avx512::token_stats<avx512::Simd, BFloat16>, avx512::token_stats<avx512::Simd, Float16>,
     avx512::token_stats<avx512::Simd, float>, token_stats_float64},
    {avx512::logits_grad<avx512::Simd, BFloat16>, avx512::logits_grad<avx512::Simd, Float16>,
     avx512::logits_grad<avx512::Simd, float>, logits_grad_float64},
    {avx512::draw<avx512::Simd, BFloat16>, avx512::draw<avx512::Simd, Float16>, avx512::draw<avx512::Simd, float>,
     draw_float64},
    {avx512::above<avx512::Simd, BFloat16>, avx512::above<avx512::Simd, Float16>, avx512::above<avx512::Simd, float>,
     above_float64},
    {avx512::kept_stats<avx512::Simd, BFloat16>, avx512::kept_stats<avx512::Simd, Float16>,
     avx512::kept_stats<avx512::Simd, float>, kept_stats_float64},
    {avx512::kept_grad<avx512::Simd, BFloat16>, avx512::kept_grad<avx512::Simd, Float16>,
     avx512::kept_grad<avx512::Simd, float>, kept_grad_float64},
};

}  // namespace aepo
#endif
