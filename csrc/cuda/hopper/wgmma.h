// Products of a warpgroup's tensor cores: D[64 x N] (float32, in registers) of A[64 x 16] and B[16 x N].
//
// Of an accumulator d, thread t of the warpgroup, in lane l of warp w, holds in d[4 j + {0, 1}] row 16 w + l / 4,
// columns 8 j + 2 (l % 4) + {0, 1}, and in d[4 j + {2, 3}] the same columns of 8 rows further down. Packed in pairs in
// that order they are fragments of A: those of columns 16 k.. are pairs 4 k to 4 k + 3. PTX: Register Fragments
// (wgmma).
#pragma once

#include "hopper/platform.h"
#include "hopper/wgmma_operands.h"

namespace longattn::hopper {

// Operands in shared memory are tiles of 128-byte rows in 128-byte swizzle, as TMA writes them: 64 elements of the
// inner dimension. Their descriptors differ in the low word alone; the high word holds 1024 bytes between groups of 8
// rows, and the swizzle. PTX: Matrix Descriptor Format; Strides (Leading and Stride dimension byte offset).
constexpr uint32_t kDescriptorHigh = 0x40000040u;

// K-major (rows along M or N): `leading` is ignored; 16 columns further are 32 bytes, 64 columns the next tile.
// MN-major (rows along K): `leading` is the distance in bytes of tiles of 64 along M or N; 16 rows further are 2048
// bytes.
LONGATTN_DEVICE uint32_t descriptor(uint32_t address, uint32_t leading) {
  return ((address & 0x3ffffu) >> 4) | ((leading >> 4) << 16);
}

// What is to be added to a descriptor to point so many bytes further.
LONGATTN_HOST_DEVICE constexpr uint32_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

// Registers written before are seen by the products after. PTX: wgmma.fence.
LONGATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products. PTX: wgmma.commit_group.
LONGATTN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all but the N newest groups. PTX: wgmma.wait_group.
template <int N>
LONGATTN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

enum Major : int { kAlongK = 0, kAlongMN = 1 };

// PTX: wgmma.mma_async.
//   multiply<MajorA, MajorB>(d, a, b)        D = A B, both in shared memory
//   multiply_add<MajorA, MajorB>(d, a, b)    D += A B
//   multiply_add<MajorB>(d, fragment, b)     D += A B, A in registers: fragment[0..3]
template <class Element, int N>
struct Wgmma;

// R to R6: the numbers of operands after the N / 2 registers of D.
#define LONGATTN_READ_WRITTEN(x) "+f"(x)
#define LONGATTN_WRITTEN(x) "=f"(x)
#define LONGATTN_WGMMA(ELEMENT, TYPE, N, R, R1, R2, R3, R4, R5, R6)                                                    \
  template <>                                                                                                          \
  struct Wgmma<ELEMENT, N> {                                                                                           \
    template <int MajorA, int MajorB>                                                                                  \
    static LONGATTN_DEVICE void multiply(float (&d)[R], uint32_t a, uint32_t b) {                                      \
      asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nmov.b64 a, {%" #R ", %" #R2 "};\nmov.b64 b, {%" #R1 ", %" #R2 \
                   "};\nsetp.ne.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE         \
                   " {" LONGATTN_NAMES_##R "}, a, b, add, 1, 1, %" #R3 ", %" #R4 ";\n}\n"                              \
                   : LONGATTN_LIST_OF_##R(LONGATTN_WRITTEN, d)                                                         \
                   : "r"(a), "r"(b), "r"(kDescriptorHigh), "n"(MajorA), "n"(MajorB));                                  \
    }                                                                                                                  \
    template <int MajorA, int MajorB>                                                                                  \
    static LONGATTN_DEVICE void multiply_add(float (&d)[R], uint32_t a, uint32_t b) {                                  \
      asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nmov.b64 a, {%" #R ", %" #R2 "};\nmov.b64 b, {%" #R1 ", %" #R2 \
                   "};\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE         \
                   " {" LONGATTN_NAMES_##R "}, a, b, add, 1, 1, %" #R3 ", %" #R4 ";\n}\n"                              \
                   : LONGATTN_LIST_OF_##R(LONGATTN_READ_WRITTEN, d)                                                    \
                   : "r"(a), "r"(b), "r"(kDescriptorHigh), "n"(MajorA), "n"(MajorB));                                  \
    }                                                                                                                  \
    template <int MajorB>                                                                                              \
    static LONGATTN_DEVICE void multiply_add(float (&d)[R], const uint32_t* fragment, uint32_t b) {                    \
      asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nmov.b64 b, {%" #R4 ", %" #R5                                     \
                   "};\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE         \
                   " {" LONGATTN_NAMES_##R "}, {%" #R ", %" #R1 ", %" #R2 ", %" #R3 "}, b, add, 1, 1, %" #R6 ";\n}\n"  \
                   : LONGATTN_LIST_OF_##R(LONGATTN_READ_WRITTEN, d)                                                    \
                   : "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3]), "r"(b),                   \
                     "r"(kDescriptorHigh), "n"(MajorB));                                                               \
    }                                                                                                                  \
  };
#define LONGATTN_WGMMA_OF_WIDTH(...)            \
  LONGATTN_WGMMA(BFloat16, "bf16", __VA_ARGS__) \
  LONGATTN_WGMMA(Half, "f16", __VA_ARGS__)

LONGATTN_WGMMA_OF_WIDTH(64, 32, 33, 34, 35, 36, 37, 38)
LONGATTN_WGMMA_OF_WIDTH(80, 40, 41, 42, 43, 44, 45, 46)
LONGATTN_WGMMA_OF_WIDTH(96, 48, 49, 50, 51, 52, 53, 54)
LONGATTN_WGMMA_OF_WIDTH(112, 56, 57, 58, 59, 60, 61, 62)
LONGATTN_WGMMA_OF_WIDTH(128, 64, 65, 66, 67, 68, 69, 70)
LONGATTN_WGMMA_OF_WIDTH(176, 88, 89, 90, 91, 92, 93, 94)
LONGATTN_WGMMA_OF_WIDTH(192, 96, 97, 98, 99, 100, 101, 102)
LONGATTN_WGMMA_OF_WIDTH(256, 128, 129, 130, 131, 132, 133, 134)

#undef LONGATTN_WGMMA_OF_WIDTH
#undef LONGATTN_WGMMA
#undef LONGATTN_WRITTEN
#undef LONGATTN_READ_WRITTEN

}  // namespace longattn::hopper
