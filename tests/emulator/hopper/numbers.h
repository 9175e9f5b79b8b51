#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline float exp2_approx(float x, Location at = Location::here()) {
  emulator::check_used(x, at);
  return flushed(exp2f(flushed(x)));
}
inline float log2_approx(float x, Location at = Location::here()) {
  emulator::check_used(x, at);
  return log2f(flushed(x));
}
inline float reciprocal_approx(float x, Location at = Location::here()) {
  emulator::check_used(x, at);
  return flushed(1.0f / flushed(x));
}

template <class Element>
uint16_t rounded(float x) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
  }
}
template <class Element>
uint32_t pack(float low, float high, Location at = Location::here()) {
  emulator::check_used(low, at);
  emulator::check_used(high, at);
  return rounded<Element>(low) | static_cast<uint32_t>(rounded<Element>(high)) << 16;
}
template <class Element>
float2 unpack(uint32_t x) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
  } else {
    _Float16 halves[2];
    memcpy(halves, &x, 4);
    return {static_cast<float>(halves[0]), static_cast<float>(halves[1])};
  }
}

}  // namespace longattn::hopper
