// The host's side: tensor maps and launches. Links neither libcuda nor torch: the driver's one function is asked for at
// run time, through the static runtime.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include "hopper/platform.h"
#include "hopper/tensor_map.h"

namespace longattn::hopper {

// The description that a tensor map is made from: 16-bit elements, 128-byte swizzle, zeros outside.
struct MapShape {
  uint64_t sizes[4];    // column, row, head, batch
  uint64_t strides[3];  // bytes, of row, head, batch
  uint32_t box[4];
};

// nullptr, or what went wrong.
template <class Element>
const char* encode(TensorMap* map, const void* data, const MapShape& shape) {
  static const auto encode_tiled = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  if (!encode_tiled) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result = encode_tiled(
      map, std::is_same_v<Element, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      const_cast<void*>(data), shape.sizes, shape.strides, shape.box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor";
}

// Streaming multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Starts a kernel; nullptr, or what went wrong.
template <class Kernel, class Params>
const char* launch(Kernel kernel, const char*, dim3 blocks, int threads, int shared_bytes, void* stream,
                   const Params& params) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace longattn::hopper
