#pragma once

#include "hopper/platform.h"
#include "hopper/tensor_map.h"

namespace longattn::hopper {

struct MapShape {
  uint64_t sizes[4];
  uint64_t strides[3];
  uint32_t box[4];
};

// With what cuTensorMapEncodeTiled is documented to refuse.
template <class Element>
const char* encode(TensorMap* map, const void* data, const MapShape& shape) {
  if (reinterpret_cast<uintptr_t>(data) % 16) return "a tensor map's data stands at a multiple of 16 bytes";
  for (int i = 0; i < 4; ++i) {
    if (shape.sizes[i] < 1 || shape.sizes[i] > 1ull << 32) return "a tensor map's sizes are 1 to 2^32";
    if (shape.box[i] < 1 || shape.box[i] > 256) return "a tensor map's box is 1 to 256 wide";
    if (i && (shape.strides[i - 1] % 16 || !shape.strides[i - 1] || shape.strides[i - 1] >= 1ull << 40))
      return "a tensor map's strides are multiples of 16 bytes below 2^40";
    map->sizes[i] = shape.sizes[i];
    map->box[i] = shape.box[i];
    map->strides[i] = i ? shape.strides[i - 1] : 2;
  }
  if (shape.box[0] != 64) return "a swizzled row has 128 bytes";
  map->data = static_cast<uint8_t*>(const_cast<void*>(data));
  map->valid = true;
  return nullptr;
}

inline int multiprocessors() { return emulator::options.processors; }

template <class Kernel, class Params>
const char* launch(Kernel kernel, const char* name, dim3 blocks, int threads, int shared_bytes, void*,
                   const Params& params) {
  return emulator::launch(blocks, threads, static_cast<size_t>(shared_bytes), name, [&] { kernel(params); });
}

}  // namespace longattn::hopper
