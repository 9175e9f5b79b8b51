// Products of bfloat16 pairs on the tile registers of AMX: 16 rows by 16 columns of C, 32 numbers deep, per
// instruction.
#pragma once

#include "cpu/kernels/gemm.h"

namespace longattn {
namespace {

#if defined(__AMX_BF16__)

// The intrinsics do not tell the compiler what memory they read: stores before this are done before loads of tiles
// after it.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// All eight tiles are 16 rows of 64 bytes while this lives; released at the end, or every context switch would save
// them.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

constexpr int64_t kTile = 16;

// A block of kRows x kColumns tiles of C, each at most 2. Tiles 0-3 sum, 4-5 hold rows of A, 6-7 columns of B.
template <int kRows, int kColumns>
inline void tile_block(int64_t depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                       int64_t ldc, bool add) {
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    if (kColumns > 1) _tile_loadd(1, c + kTile, ldc * 4);
    if (kRows > 1) _tile_loadd(2, c + kTile * ldc, ldc * 4);
    if (kRows > 1 && kColumns > 1) _tile_loadd(3, c + kTile * ldc + kTile, ldc * 4);
  } else {
    _tile_zero(0);
    if (kColumns > 1) _tile_zero(1);
    if (kRows > 1) _tile_zero(2);
    if (kRows > 1 && kColumns > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTile) {
    _tile_loadd(6, b + k * ldb, ldb * 4);
    _tile_loadd(4, a + k, lda * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns > 1) {
      _tile_loadd(7, b + k * ldb + kTile, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows > 1) {
      _tile_loadd(5, a + kTile * lda + k, lda * 4);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (kRows > 1 && kColumns > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  if (kColumns > 1) _tile_stored(1, c + kTile, ldc * 4);
  if (kRows > 1) _tile_stored(2, c + kTile * ldc, ldc * 4);
  if (kRows > 1 && kColumns > 1) _tile_stored(3, c + kTile * ldc + kTile, ldc * 4);
}

template <int kRows>
inline void tile_row(int64_t columns, int64_t depth, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                     float* c, int64_t ldc, bool add) {
  int64_t n = 0;
  for (; n + kTile < columns; n += 2 * kTile) tile_block<kRows, 2>(depth, a, lda, b + n, ldb, c + n, ldc, add);
  if (n < columns) tile_block<kRows, 1>(depth, a, lda, b + n, ldb, c + n, ldc, add);
}

// C = A B, or C += A B, for bfloat16 pairs, `columns` and `depth` multiples of 16. Rows go up to a multiple of 16:
// those of a are read, and those of c written, past the last.
inline void pair_product(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t lda,
                         const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  finish_stores();
  int64_t m = 0;
  for (; m + kTile < rows; m += 2 * kTile) tile_row<2>(columns, depth, a + m * lda, lda, b, ldb, c + m * ldc, ldc, add);
  if (m < rows) tile_row<1>(columns, depth, a + m * lda, lda, b, ldb, c + m * ldc, ldc, add);
}

#else

struct TileRegisters {};

#endif

}  // namespace
}  // namespace longattn
