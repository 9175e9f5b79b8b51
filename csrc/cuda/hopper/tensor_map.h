// Tiles of tensors in global memory, fetched by the tensor memory accelerator (TMA).
#pragma once

#include <cuda.h>

#include "hopper/platform.h"

namespace longattn::hopper {

using TensorMap = CUtensorMap;

// PTX: Operand: Cache hints (createpolicy); the encodings of evict_first and evict_last over all of a line.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

// The box at (column, row, head, batch) of a 4-D map; what lies outside the tensor is 0. All bytes of the box count
// down on the barrier. PTX: cp.async.bulk.tensor; Tensors (Tiled mode, Out-of-bound access, Swizzling modes).
LONGATTN_DEVICE void load_tile(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, int head,
                               int batch, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(hint)
      : "memory");
}

}  // namespace longattn::hopper
