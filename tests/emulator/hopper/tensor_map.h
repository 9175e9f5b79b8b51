#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

using emulator::TensorMap;

constexpr uint64_t kEvictFirst = 0, kEvictLast = 0;

inline void load_tile(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, int head, int batch,
                      uint64_t, Location at = Location::here()) {
  const int corner[4] = {column, row, head, batch};
  emulator::load_tile(to, *map, barrier, corner, at);
}

}  // namespace longattn::hopper
