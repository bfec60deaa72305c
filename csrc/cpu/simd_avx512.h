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
  AEPO_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }

  // Integer lanes for random words; the product is that of the lower halves.
  typedef uint64_t Wide __attribute__((vector_size(64)));
  AEPO_INLINE Wide multiply(Wide a, Wide b) { return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b); }

  // 2^y for y >= kMinExponent: vreduceps takes the fraction, vscalefps adds the exponent, one micro-operation each.
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

  AEPO_INLINE void store2(BFloat16* p, Vec a, Vec b) {
    const __m512i even = _mm512_srli_epi32(round_to_bf16(a), 16);
    _mm512_storeu_si512(p, _mm512_mask_mov_epi16(even, 0xaaaaaaaa, round_to_bf16(b)));
  }
  AEPO_INLINE void store2(Float16* p, Vec a, Vec b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }
  AEPO_INLINE void store2(float* p, Vec a, Vec b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + 16, b);
  }

 private:
  // To nearest even, in the upper half of each lane. Inf stays inf, and NaN stays NaN unless its low bits
  // are all ones, which row_grad() sees to.
  AEPO_INLINE __m512i round_to_bf16(Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
};

}  // namespace aepo::avx512
