// Register-tiled products of small tiles: C[m][n] (+)= sum_k A(m, k) B[k][n], rows of B and C contiguous. One row of A is broadcast
// against vectors of B; 6 rows by kRegisterColumns vectors of C stay in registers.
#pragma once

#include "cpu/kernels/simd.h"

namespace longattn {
namespace {

enum class Order { kRowMajor, kColumnMajor };  // of A: A(m, k) = a[m * lda + k], or a[k * lda + m]

constexpr int kRegisterRows = 6;

// What C holds before the sum: nothing, itself, or itself times a factor per column.
template <class T>
struct Start {
  enum Kind { kZero, kAdd, kScale } kind;
  const T* factor;  // [n], for kScale
};

template <class T, Order order, int Rows, int Columns>
inline void tile_product(int64_t depth, const T* __restrict a, int64_t lda, const T* __restrict b, int64_t ldb,
                         T* __restrict c, int64_t ldc, Start<T> start) {
  constexpr int W = kWidth<T>;
  Vec<T> sum[Rows][Columns];
  for (int m = 0; m < Rows; ++m)
    for (int n = 0; n < Columns; ++n) {
      sum[m][n] = Vec<T>{};
      if (start.kind == Start<T>::kAdd) sum[m][n] = load<T>(c + m * ldc + n * W);
      if (start.kind == Start<T>::kScale) sum[m][n] = load<T>(c + m * ldc + n * W) * load<T>(start.factor + n * W);
    }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[Columns];
#pragma GCC unroll 8
    for (int n = 0; n < Columns; ++n) row[n] = load<T>(b + k * ldb + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const T x = order == Order::kRowMajor ? a[m * lda + k] : a[k * lda + m];
#pragma GCC unroll 8
      for (int n = 0; n < Columns; ++n) sum[m][n] += x * row[n];
    }
  }
  for (int m = 0; m < Rows; ++m)
    for (int n = 0; n < Columns; ++n) store<T>(c + m * ldc + n * W, sum[m][n]);
}

template <class T, Order order, int Columns>
inline void column_product(int64_t rows, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                           int64_t ldc, Start<T> start) {
  const int64_t step = order == Order::kRowMajor ? lda : 1;
  int64_t m = 0;
  for (; m + kRegisterRows <= rows; m += kRegisterRows)
    tile_product<T, order, kRegisterRows, Columns>(depth, a + m * step, lda, b, ldb, c + m * ldc, ldc, start);
  const T* tail = a + m * step;
  switch (rows - m) {
    case 5: return tile_product<T, order, 5, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, start);
    case 4: return tile_product<T, order, 4, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, start);
    case 3: return tile_product<T, order, 3, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, start);
    case 2: return tile_product<T, order, 2, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, start);
    case 1: return tile_product<T, order, 1, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, start);
  }
}

// rows x columns, `columns` a multiple of the vector width.
template <class T, Order order>
void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
             int64_t ldc, Start<T> start) {
  constexpr int W = kWidth<T>;
  for (int64_t n = 0; n < columns;) {
    const Start<T> here{start.kind, start.factor ? start.factor + n : nullptr};
    const int64_t vectors = (columns - n) / W;
    if (kRegisterColumns >= 4 && vectors >= 4) {
      column_product<T, order, kRegisterColumns>(rows, depth, a, lda, b + n, ldb, c + n, ldc, here);
      n += kRegisterColumns * W;
    } else if (vectors >= 2) {
      column_product<T, order, 2>(rows, depth, a, lda, b + n, ldb, c + n, ldc, here);
      n += 2 * W;
    } else {
      column_product<T, order, 1>(rows, depth, a, lda, b + n, ldb, c + n, ldc, here);
      n += W;
    }
  }
}

}  // namespace
}  // namespace longattn
