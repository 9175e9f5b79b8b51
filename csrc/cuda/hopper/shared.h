// Shared memory by 32-bit address of the shared window: kernels hold no pointers into it.
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

extern __shared__ uint8_t dynamic_shared_memory[];

// The block's dynamic shared memory, rounded up to the 1024 bytes at which a swizzle pattern repeats. PTX: cvta.
LONGATTN_DEVICE uint32_t shared_base() {
  return (static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory)) + 1023) & ~1023u;
}

// PTX: ld, st (of .shared).
LONGATTN_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
LONGATTN_DEVICE float2 load_shared_pair(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
template <class Words>
LONGATTN_DEVICE Words load_shared_words(uint32_t address);
template <>
LONGATTN_DEVICE uint2 load_shared_words<uint2>(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
template <>
LONGATTN_DEVICE uint4 load_shared_words<uint4>(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
LONGATTN_DEVICE void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
LONGATTN_DEVICE void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
LONGATTN_DEVICE void store_shared(uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers, held as wgmma's A fragments are; lane i gives the address of row i % 8 of
// matrix i / 8. PTX: stmatrix.
LONGATTN_DEVICE void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

}  // namespace longattn::hopper
