// Elementary functions, and 16-bit numbers in pairs.
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

// 2^x, to 2 units in the last place. PTX: ex2.
LONGATTN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// PTX: lg2.
LONGATTN_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, to 1 unit in the last place. PTX: rcp.
LONGATTN_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to Element, the first in the low half. PTX: cvt.
template <class Element>
LONGATTN_DEVICE uint32_t pack(float low, float high);
template <>
LONGATTN_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
template <>
LONGATTN_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

// PTX: cvt.
template <class Element>
LONGATTN_DEVICE float2 unpack(uint32_t x);
template <>
LONGATTN_DEVICE float2 unpack<BFloat16>(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <>
LONGATTN_DEVICE float2 unpack<Half>(uint32_t x) {
  float2 y;
  asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
      : "=f"(y.x), "=f"(y.y)
      : "r"(x));
  return y;
}

}  // namespace longattn::hopper
