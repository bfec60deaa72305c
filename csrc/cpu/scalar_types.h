// The 16-bit storage types, and the polynomial that every float32 path shares.
#pragma once

#include <cstdint>
#include <limits>

namespace aepo {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
constexpr T minus_infinity() {
  return -std::numeric_limits<T>::infinity();
}
template <>
constexpr BFloat16 minus_infinity() {
  return {0xff80};
}
template <>
constexpr Float16 minus_infinity() {
  return {0xfc00};
}

// 2^f on [0, 1) = 1 + f (k[0] + f (k[1] + ...)): minimax in relative error (8e-8, and 1.4e-7 or about 1 ulp when
// evaluated in float32), with the constant fixed at 1 so that 2^0 is exactly 1.
constexpr float kExp2[5] = {0.693151311807523f, 0.24016445013606755f, 0.055799913145968064f, 0.009017030284436749f,
                            0.0018671300819070081f};

constexpr double kLn2 = 0.693147180559945309;
constexpr double kLog2E = 1.44269504088896341;

}  // namespace aepo
