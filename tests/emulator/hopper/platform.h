// The emulator's spelling of a kernel. Each header of this folder stands for the one of csrc/cuda/hopper of its name.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define LONGATTN_DEVICE inline
#define LONGATTN_HOST_DEVICE inline
#define LONGATTN_KERNEL(threads) inline void
#define LONGATTN_PARAMS const

using std::max;
using std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}

namespace longattn::hopper {

using emulator::Location;

struct Half {};
struct BFloat16 {};

inline int thread_index() { return emulator::place->thread; }
inline int3 block_index() { return emulator::place->block; }
inline int3 block_count() { return emulator::place->blocks; }

}  // namespace longattn::hopper
