// Lanes in the vector extension of GCC and Clang: 4 float32 or 2 float64 in a 16-byte register of any x86-64 (SSE2) or
// ARM (NEON). Also the only float64 path: float64 logits are for checking gradients, not for speed.
#pragma once

#include <cmath>
#include <cstring>

#include "scalar_types.h"

#define AEPO_ISA
#define AEPO_ISA_NAME portable
#define AEPO_INLINE __attribute__((always_inline)) static inline

namespace aepo::portable {

// What both widths share; Mask is the integer vector that a comparison gives.
template <class Scalar_>
struct Lanes {
  using Scalar = Scalar_;
  typedef Scalar Vec __attribute__((vector_size(16)));
  static constexpr int kWidth = 16 / sizeof(Scalar);
  static constexpr int kChunk = 8;
  static constexpr bool kExp2TakesAll = false;

  AEPO_INLINE Vec broadcast(Scalar v) { return v - Vec{}; }
  AEPO_INLINE Vec first_lane(Scalar v) { return Vec{v}; }
  AEPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  AEPO_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
  AEPO_INLINE bool any_greater(Vec a, Vec b) {
    const auto greater = a > b;
    bool any = false;
    for (int i = 0; i < kWidth; i++) any |= greater[i] != 0;
    return any;
  }
  AEPO_INLINE Vec if_equal(Vec a, Vec b, Vec yes, Vec no) { return a == b ? yes : no; }
  AEPO_INLINE Vec if_greater(Vec a, Vec b, Vec yes, Vec no) { return a > b ? yes : no; }

  typedef uint64_t Wide __attribute__((vector_size(16)));
  AEPO_INLINE Wide multiply(Wide a, Wide b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
  AEPO_INLINE Vec load(const Scalar* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  AEPO_INLINE void store(Scalar* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  AEPO_INLINE void load2(const Scalar* p, Vec& a, Vec& b) {
    a = load(p);
    b = load(p + kWidth);
  }
  AEPO_INLINE void store2(Scalar* p, Vec a, Vec b) {
    store(p, a);
    store(p + kWidth, b);
  }
};

struct SimdDouble : Lanes<double> {
  static constexpr double kMinExponent = -1100.0;
  AEPO_INLINE Vec exp2(Vec y) { return Vec{std::exp2(y[0]), std::exp2(y[1])}; }
};

struct Simd : Lanes<float> {
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  using Lanes<float>::load2;
  using Lanes<float>::store2;
  static constexpr float kMinExponent = -127.0f;

  // As in simd_avx2.h. The floor is a truncation corrected below 0: SSE2 has no rounding instruction.
  AEPO_INLINE Vec exp2(Vec y) {
    Ints n = __builtin_convertvector(y, Ints);
    n += __builtin_convertvector(n, Vec) > y;  // a true comparison is -1
    const Vec f = y - __builtin_convertvector(n, Vec);
    Vec p = fma(broadcast(kExp2[4]), f, broadcast(kExp2[3]));
    p = fma(p, f, broadcast(kExp2[2]));
    p = fma(p, f, broadcast(kExp2[1]));
    p = fma(p, f, broadcast(kExp2[0]));
    p = fma(p, f, broadcast(1.0f));
    return (Vec)((Bits)p + ((Bits)n << 23));
  }

  // 16-bit types: even elements into a, odd ones into b.
  AEPO_INLINE void load2(const BFloat16* p, Vec& a, Vec& b) {
    const Bits v = load_bits(p);
    a = (Vec)(v << 16);
    b = (Vec)(v & 0xffff0000u);
  }
  AEPO_INLINE void load2(const Float16* p, Vec& a, Vec& b) {
    const Bits v = load_bits(p);
    a = from_half(v & 0xffffu);
    b = from_half(v >> 16);
  }
  AEPO_INLINE void store2(BFloat16* p, Vec a, Vec b) {
    const Bits v = (round_to_bf16(a) >> 16) | (round_to_bf16(b) & 0xffff0000u);
    std::memcpy(p, &v, sizeof v);
  }
  AEPO_INLINE void store2(Float16* p, Vec a, Vec b) {
    const Bits v = to_half(a) | (to_half(b) << 16);
    std::memcpy(p, &v, sizeof v);
  }

 private:
  AEPO_INLINE Bits load_bits(const void* p) {
    Bits v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  AEPO_INLINE Bits round_to_bf16(Vec v) {
    const Bits bits = (Bits)v;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  // The exponent is rebiased by a product with 2^112, which also normalises the denormals; inf and NaN keep all ones.
  AEPO_INLINE Vec from_half(Bits h) {
    const Bits magnitude = (h & 0x7fffu) << 13;
    const Bits scaled = (Bits)((Vec)magnitude * 0x1p112f);
    const Bits special = magnitude | 0x7f800000u;
    return (Vec)((magnitude >= 0x0f800000u ? special : scaled) | ((h & 0x8000u) << 16));
  }
  // To nearest even. Adding 0.5 to a number below 2^-14 leaves its multiple of 2^-24 in the low bits: the denormals.
  AEPO_INLINE Bits to_half(Vec v) {
    const Bits sign = ((Bits)v >> 16) & 0x8000u;
    const Bits bits = (Bits)v & 0x7fffffffu;
    const Bits normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    const Bits denormal = (Bits)((Vec)bits + 0.5f) - 0x3f000000u;
    const Bits large = bits > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
    return sign | (bits < 0x38800000u ? denormal : bits < 0x47800000u ? normal : large);
  }
};

}  // namespace aepo::portable
