// Tiles in shared memory, and rows in global memory. A tile of `rows` rows is `slabs` times [rows][64] elements, each
// slab a swizzled box of TMA.
#pragma once

#include "call.h"
#include "hopper/mbarrier.h"
#include "hopper/numbers.h"
#include "hopper/shared.h"
#include "hopper/tensor_map.h"
#include "hopper/warp.h"

namespace longattn::cuda {

using namespace hopper;

constexpr int kSlab = 64;             // elements
constexpr int kRowBytes = 2 * kSlab;  // of a slab

LONGATTN_HOST_DEVICE constexpr int slabs(int width) { return (width + kSlab - 1) / kSlab; }
LONGATTN_HOST_DEVICE constexpr int tile_bytes(int rows, int width) { return rows * slabs(width) * kRowBytes; }

// What to add to a descriptor for step k of 16 along a tile's columns (K-major) or rows (MN-major).
LONGATTN_HOST_DEVICE constexpr uint32_t along_columns(int k, int rows) {
  return static_cast<uint32_t>(k / 4 * rows * kRowBytes + k % 4 * 32) >> 4;
}
LONGATTN_HOST_DEVICE constexpr uint32_t along_rows(int k) { return static_cast<uint32_t>(k * 16 * kRowBytes) >> 4; }

// One thread fetches a tile.
template <int Rows, int Width>
LONGATTN_DEVICE void fetch(uint32_t to, const TensorMap* map, uint32_t barrier, int row, int head, int batch,
                           uint64_t hint) {
#pragma unroll
  for (int s = 0; s < slabs(Width); ++s)
    load_tile(to + s * Rows * kRowBytes, map, barrier, s * kSlab, row, head, batch, hint);
}

// Puts zeros in a row: in place of what no query sees and may be NaN, which a weight of 0 does not remove.
template <int Rows, int Width>
LONGATTN_DEVICE void clear_row(uint32_t tile, int row) {
#pragma unroll 1
  for (int i = 0; i < slabs(Width) * 8; ++i)
    store_shared(tile + (i / 8 * Rows + row) * kRowBytes + i % 8 * 16, make_uint4(0, 0, 0, 0));
}

// An accumulator [64 x Width] times a factor for each of a thread's two rows, as 16-bit rows in global memory: 16 bytes
// at once, after an exchange of words among the 4 lanes that share a row. rows[r] is nullptr where there is none.
template <class Element, int Width>
LONGATTN_DEVICE void store_rows(const float (&x)[Width / 2], const float (&factor)[2], uint16_t* const (&rows)[2],
                                int width) {
  const int lane = thread_index() % 4;
#pragma unroll
  for (int block = 0; block < Width / 32; ++block)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 16 * block + 4 * j + 2 * r;
        words[j] = pack<Element>(x[i] * factor[r], x[i + 1] * factor[r]);
      }
#pragma unroll
      for (int bit = 1; bit <= 2; bit <<= 1)
#pragma unroll
        for (int a = 0; a < 4; ++a)
          if (!(a & bit)) {
            const uint32_t got = from_lane_xor(lane & bit ? words[a] : words[a | bit], bit);
            if (lane & bit)
              words[a] = got;
            else
              words[a | bit] = got;
          }
      const int column = block * 32 + lane * 8;
      if (rows[r] && column < width)
        *reinterpret_cast<uint4*>(rows[r] + column) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// A whole warp waits. One lane looks: the barrier may go through its next phase before a slow lane has seen this one.
LONGATTN_DEVICE void wait_as_warp(uint32_t barrier, uint32_t parity) {
  if (thread_index() % 32 == 0) mbarrier_wait(barrier, parity);
  sync_warp();
}

LONGATTN_DEVICE uint16_t* row_of(const LongattnRows& x, int batch, int head, int token) {
  return static_cast<uint16_t*>(x.data) + batch * x.batch + head * x.head + token * x.token;
}

// A stage of a ring of buffers, and the parity of its barriers.
template <int Stages>
struct Ring {
  uint32_t stage, parity;
  LONGATTN_DEVICE void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace longattn::cuda
