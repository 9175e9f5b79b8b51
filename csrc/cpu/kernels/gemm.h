// Register-tiled products of small tiles: C[m][n] = sum_k A(m, k) B[k][n], added to what C holds if `add`. One unit of
// a row of A is broadcast against vectors of B; kRegisterRows rows by kRegisterColumns vectors of C stay in registers.
// A unit is a number, or a pair of bfloat16 numbers for the instructions that multiply pairs and add both products:
// then k counts pairs, and B[k][n] holds a pair too.
#pragma once

#include "cpu/kernels/simd.h"

namespace longattn {
namespace {

template <class T>
struct FusedMultiplyAdd {
  using Sum = T;
  using Unit = T;
  using UnitVec = Vec<T>;
  static inline UnitVec load_units(const Unit* p) { return load<T>(p); }
  static inline Vec<T> add(Vec<T> sum, const Unit* a, UnitVec b) { return sum + *a * b; }
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
struct PairDotProduct {
  using Sum = float;
  using Unit = uint32_t;  // two bfloat16 numbers
  using UnitVec = __m512i;
  static inline UnitVec load_units(const Unit* p) { return _mm512_loadu_si512(p); }
  static inline Vec<float> add(Vec<float> sum, const Unit* a, UnitVec b) {
    int32_t unit;
    __builtin_memcpy(&unit, a, sizeof(unit));  // rows may start between units
    return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                         reinterpret_cast<__m512bh>(_mm512_set1_epi32(unit)),
                                                         reinterpret_cast<__m512bh>(b)));
  }
};
#endif

enum class Order { kRowMajor, kColumnMajor };  // of A: A(m, k) = a[m * lda + k], or a[k * lda + m]

#if defined(__aarch64__)
constexpr int kRegisterRows = 5;  // GCC loads the units of all rows before it multiplies: with 6, sums are spilled
#else
constexpr int kRegisterRows = 6;
#endif

// How sums run along the depth. One chain rounds every term to the size of the sum so far; parts of kPartTerms terms,
// each summed by itself, round to the size of a part.
enum class Sums { kChain, kParts };
constexpr int64_t kPartTerms = 64;

template <class Dot, Order order, Sums sums, int Rows, int Columns>
inline void tile_product(int64_t depth, const typename Dot::Unit* __restrict a, int64_t lda,
                         const typename Dot::Unit* __restrict b, int64_t ldb, typename Dot::Sum* __restrict c,
                         int64_t ldc, bool add) {
  using T = typename Dot::Sum;
  constexpr int W = kWidth<T>;
  constexpr bool kParts = sums == Sums::kParts;
  Vec<T> sum[Rows][Columns];
  int64_t k = 0;
  do {
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < Columns; ++n) {
        sum[m][n] = Vec<T>{};
        if (!kParts && add) sum[m][n] = load<T>(c + m * ldc + n * W);
      }
    const int64_t stop = kParts && depth - k > kPartTerms ? k + kPartTerms : depth;
    for (; k < stop; ++k) {
      typename Dot::UnitVec row[Columns];
#pragma GCC unroll 8
      for (int n = 0; n < Columns; ++n) row[n] = Dot::load_units(b + k * ldb + n * W);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < Columns; ++n)
          sum[m][n] = Dot::add(sum[m][n], order == Order::kRowMajor ? a + m * lda + k : a + k * lda + m, row[n]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < Columns; ++n) {
        T* to = c + m * ldc + n * W;
        store<T>(to, kParts && add ? load<T>(to) + sum[m][n] : sum[m][n]);
      }
    add = true;
  } while (kParts && k < depth);
}

template <class Dot, Order order, Sums sums, int Columns>
inline void column_product(int64_t rows, int64_t depth, const typename Dot::Unit* a, int64_t lda,
                           const typename Dot::Unit* b, int64_t ldb, typename Dot::Sum* c, int64_t ldc, bool add) {
  const int64_t step = order == Order::kRowMajor ? lda : 1;
  int64_t m = 0;
  for (; m + kRegisterRows <= rows; m += kRegisterRows)
    tile_product<Dot, order, sums, kRegisterRows, Columns>(depth, a + m * step, lda, b, ldb, c + m * ldc, ldc, add);
  const typename Dot::Unit* tail = a + m * step;
  switch (rows - m) {
    case 5:
      return tile_product<Dot, order, sums, 5, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, add);
    case 4:
      return tile_product<Dot, order, sums, 4, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, add);
    case 3:
      return tile_product<Dot, order, sums, 3, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, add);
    case 2:
      return tile_product<Dot, order, sums, 2, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, add);
    case 1:
      return tile_product<Dot, order, sums, 1, Columns>(depth, tail, lda, b, ldb, c + m * ldc, ldc, add);
  }
}

// rows x columns, `columns` a multiple of the vector width; strides of a and b in units.
template <class Dot, Order order, Sums sums = Sums::kChain>
void product(int64_t rows, int64_t columns, int64_t depth, const typename Dot::Unit* a, int64_t lda,
             const typename Dot::Unit* b, int64_t ldb, typename Dot::Sum* c, int64_t ldc, bool add) {
  constexpr int W = kWidth<typename Dot::Sum>;
  for (int64_t n = 0; n < columns;) {
    const int64_t vectors = (columns - n) / W;
    if (kRegisterColumns >= 4 && vectors >= 4) {
      column_product<Dot, order, sums, kRegisterColumns>(rows, depth, a, lda, b + n, ldb, c + n, ldc, add);
      n += kRegisterColumns * W;
    } else if (vectors >= 2) {
      column_product<Dot, order, sums, 2>(rows, depth, a, lda, b + n, ldb, c + n, ldc, add);
      n += 2 * W;
    } else {
      column_product<Dot, order, sums, 1>(rows, depth, a, lda, b + n, ldb, c + n, ldc, add);
      n += W;
    }
  }
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
// Of bfloat16 pairs; `rows` of c may be exceeded by what amx.h does, never here.
inline void pair_product(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t lda,
                         const uint32_t* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  product<PairDotProduct, Order::kRowMajor>(rows, columns, depth, a, lda, b, ldb, c, ldc, add);
}
#endif

}  // namespace
}  // namespace longattn
