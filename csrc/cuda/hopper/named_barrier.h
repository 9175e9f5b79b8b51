// Barriers 0..15 of a block, of whole warps. Barrier 0 is sync_block's.
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

// Waits until so many threads have arrived. PTX: barrier (bar.sync).
LONGATTN_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives without waiting. PTX: barrier (bar.arrive).
LONGATTN_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace longattn::hopper
