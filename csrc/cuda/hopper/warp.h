// What the threads of a warp, or of a block, do together.
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// PTX: bar.warp.sync.
LONGATTN_DEVICE void sync_warp() { __syncwarp(); }

// Of all `threads` of the block. PTX: barrier.
LONGATTN_DEVICE void sync_block(int) { __syncthreads(); }

// The value of lane `source`. PTX: shfl.sync.
template <class T>
LONGATTN_DEVICE T from_lane(T value, int source) {
  return __shfl_sync(kWholeWarp, value, source);
}

// The value of lane (own ^ bits). PTX: shfl.sync.
template <class T>
LONGATTN_DEVICE T from_lane_xor(T value, int bits) {
  return __shfl_xor_sync(kWholeWarp, value, bits);
}

// Bit i: the predicate of lane i. PTX: vote.sync.
LONGATTN_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(kWholeWarp, predicate); }

}  // namespace longattn::hopper
