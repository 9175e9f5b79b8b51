// How a kernel is spelled. The headers of this folder are the only ones that know the hardware: tests/emulator has one
// of the same name for each, with the same functions, and compiles the kernels for a CPU.
//
// "PTX:" names the section of NVIDIA's PTX ISA 9.0 that a function stands on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define LONGATTN_DEVICE __device__ __forceinline__
#define LONGATTN_HOST_DEVICE __host__ __device__ __forceinline__
#define LONGATTN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define LONGATTN_PARAMS const __grid_constant__

namespace longattn::hopper {

// Elements of the operands.
struct Half {};
struct BFloat16 {};

// PTX: Special Registers (%tid, %ctaid, %nctaid).
LONGATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LONGATTN_DEVICE int3 block_index() {
  return make_int3(static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z));
}
LONGATTN_DEVICE int3 block_count() {
  return make_int3(static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z));
}

}  // namespace longattn::hopper
