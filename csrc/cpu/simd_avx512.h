// 16 float32 lanes in AVX-512 (F, BW, DQ, VL: every AVX-512 server processor since Skylake-X).
#pragma once

// GCC 12 takes its own headers' undefined pass-through operands for uninitialised variables (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "scalar_types.h"

// The instruction set is an attribute of our own functions only. With -m flags or a target pragma, an inline function
// of a standard header compiled here could be the copy that the linker keeps, and the portable path would meet AVX-512.
#define AEPO_ISA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define AEPO_ISA_NAME avx512
#define AEPO_INLINE AEPO_ISA __attribute__((always_inline)) static inline

namespace aepo::avx512 {

struct Simd {
  using Scalar = float;
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kChunk = 8;                // vectors held in registers between two looks at the maximum
  static constexpr float kMinExponent = -160.0f;  // exp2 of it is exactly 0
  static constexpr bool kExp2TakesAll = true;     // else exp2 takes y >= kMinExponent

  AEPO_INLINE Vec broadcast(float v) { return _mm512_set1_ps(v); }
  AEPO_INLINE Vec first_lane(float v) { return _mm512_maskz_mov_ps(1, broadcast(v)); }
  AEPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // b where either is NaN
  AEPO_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  AEPO_INLINE bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  AEPO_INLINE Vec if_equal(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), yes);
  }
  AEPO_INLINE Vec if_greater(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes);
  }
  AEPO_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  AEPO_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }

  // Integer lanes for random words; the product is that of the lower halves.
  typedef uint64_t Wide __attribute__((vector_size(64)));
  AEPO_INLINE Wide multiply(Wide a, Wide b) { return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b); }

  // 2^y of any y: vreduceps takes the fraction (0 of -inf), vscalefps adds the exponent, one micro-operation each.
  AEPO_INLINE Vec exp2(Vec y) {
    const Vec f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF);
    Vec p = fma(broadcast(kExp2[4]), f, broadcast(kExp2[3]));
    p = fma(p, f, broadcast(kExp2[2]));
    p = fma(p, f, broadcast(kExp2[1]));
    p = fma(p, f, broadcast(kExp2[0]));
    p = fma(p, f, broadcast(1.0f));
    return _mm512_scalef_ps(p, y);
  }

  // 2 kWidth logits, in an order that store2 undoes: for bfloat16 even and odd elements, because a shift and a mask
  // widen them where they stand.
  AEPO_INLINE void load2(const BFloat16* p, Vec& a, Vec& b) {
    const __m512i v = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)));
  }
  AEPO_INLINE void load2(const Float16* p, Vec& a, Vec& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  AEPO_INLINE void load2(const float* p, Vec& a, Vec& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }

  // To nearest even, in 16-bit lanes: upper and lower halves of both vectors apart, and 1 more where a lower half is
  // above 0x8000, or is 0x8000 beside an odd upper one. Inf stays inf, and NaN stays NaN unless its upper bits are all
  // ones, which row_grad() sees to. Rounding each vector in 32-bit lanes took 10 instructions instead of 7, 12.0 cycles
  // per 16 logits instead of 11.3 for the whole gradient (Zen 4).
  AEPO_INLINE void store2(BFloat16* p, Vec a, Vec b) {
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b), one = _mm512_set1_epi16(1);
    const __m512i upper = _mm512_mask_mov_epi16(_mm512_srli_epi32(x, 16), 0xaaaaaaaa, y);
    const __m512i lower = _mm512_mask_mov_epi16(_mm512_slli_epi32(y, 16), 0x55555555, x);
    const __m512i lower_or_odd = _mm512_ternarylogic_epi32(lower, upper, one, 0xf8);  // lower | (upper & one)
    const __mmask32 up = _mm512_cmpgt_epu16_mask(lower_or_odd, _mm512_set1_epi16(-0x8000));
    _mm512_storeu_si512(p, _mm512_mask_add_epi16(upper, up, upper, one));
  }
  AEPO_INLINE void store2(Float16* p, Vec a, Vec b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }
  AEPO_INLINE void store2(float* p, Vec a, Vec b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + 16, b);
  }
};

}  // namespace aepo::avx512
