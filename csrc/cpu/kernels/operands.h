// How tiles are laid out for products, one type per arithmetic; a kernel is written once, over these names:
//
//   left    rows of tokens [rows][width], the operand whose units are broadcast: a tile, or the caller's own rows
//   across  X^T of a left X, as the operand whose units are broadcast
//   right   the operand in vectors: [depth][columns]
//
// FloatOperands keeps numbers in the accumulation type. BFloat16Operands keeps them in bfloat16, two neighbours along
// the depth of the product making a unit, for instructions that multiply pairs.
#pragma once

#include "cpu/kernels/amx.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/panel.h"

namespace longattn {
namespace {

// Rows of tiles indexed by keys: products may write a few past the last.
constexpr int64_t kKeyRows = kKeyBlock + 32;

// Width of rows in the accumulation type.
inline int64_t row_width(int64_t columns) { return round_up(columns, 16); }

template <class Operand>
struct Left {
  const Operand* rows;
  int64_t stride;
};

// The rows of keys [first, first + keys) where they lie, if they can be used as they are there.
template <class Operand>
inline const Operand* dense_rows(const AttentionParams& p, const Sequence& s, int64_t head, const Tensor4& x,
                                 DType dtype, int64_t first, int64_t keys, int64_t width, bool rotated) {
  if (rotated || p.key_mask || x.token != width || first + keys > s.lk) return nullptr;
  KeyRows rows(p, s, x, head);
  return rows.dtype() == dtype ? reinterpret_cast<const Operand*>(rows.run(first, keys)) : nullptr;
}

// Heads wider than this are summed in parts: with as many terms a chain's error is that of the scores' last digits.
constexpr int64_t kLongestChain = 128;

template <class T>
struct FloatOperands {
  using Sum = T;
  using Operand = T;
  using Dot = FusedMultiplyAdd<T>;
  struct Registers {};                  // to be set up before products
  static constexpr bool kPlain = true;  // a row of a left is a row of numbers of the accumulation type
  static constexpr int kExpTerms = kFullTerms<T>;
  static constexpr int64_t kStep = kKeyBlock;  // keys of one step of the forward
  static constexpr int64_t kScoreRows = kKeyRows;

  static int64_t left_size(int64_t columns) { return kKeyRows * row_width(columns); }
  static int64_t across_size(int64_t) { return 0; }  // a left read down its columns
  static int64_t panel_size(int64_t columns) { return kPanelRows * row_width(columns); }
  static int64_t rows_size(int64_t) { return 0; }  // rows are a right as they are

  static Left<Operand> load_left(const AttentionParams& p, const Sequence& s, int64_t head, const Tensor4& x,
                                 int64_t first, int64_t keys, int64_t columns, bool rotated, Operand* tile, Sum*) {
    const int64_t width = row_width(columns);
    constexpr DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
    if (columns == width)
      if (const Operand* rows = dense_rows<Operand>(p, s, head, x, dtype, first, keys, width, rotated))
        return {rows, width};
    load_keys<T>(p, s, head, x, first, keys, columns, width, rotated, tile);
    return {tile, width};
  }
  static Left<Operand> across(Left<Operand> left, int64_t, int64_t, Operand*) { return left; }
  static const Operand* right_of_rows(const Sum* rows, int64_t, Operand*) { return rows; }
  static void right_of_transposed_rows(const Sum* rows, int64_t columns, Operand* right, Sum*) {
    transpose<T>(rows, row_width(columns), kPanelRows, row_width(columns), right, kPanelRows);
  }

  // Rows of a panel, transposed, by way of `rows`: see load_panel.
  static void load_right(const Panel& panel, const Tensor4& x, int64_t columns, T factor, bool rotated,
                         bool against_sinks, Sum* rows, Operand* right, Sum* staging) {
    load_panel<T>(panel, x, columns, row_width(columns), factor, rotated, rows, against_sinks);
    right_of_transposed_rows(rows, columns, right, staging);
  }

  static Sum* step_scores(Sum* scores, int64_t key) { return scores + key * kPanelRows; }
  static Operand* weights(Sum* scores, Operand*) { return scores; }  // in place
  static void store_right(Operand* right, int64_t j, int64_t lane, Vec<T> a, Vec<T> b) {
    store<T>(right + j * kPanelRows + lane, a);
    store<T>(right + (j + 1) * kPanelRows + lane, b);
  }
  static void store_left(Operand* left, int64_t j, int64_t lane, Vec<T> a) {
    store<T>(left + j * kPanelRows + lane, a);
  }
  static void pad_right(Operand*, int64_t) {}
  static void pad_left(Operand*, int64_t) {}

  static void left_times_panel(int64_t keys, int64_t lanes, int64_t columns, Left<Operand> left, int64_t skip,
                               const Operand* right, Sum* c) {
    const auto multiply = columns > kLongestChain ? product<Dot, Order::kRowMajor, Sums::kParts>
                                                  : product<Dot, Order::kRowMajor, Sums::kChain>;
    multiply(keys, lanes, columns, left.rows + skip * left.stride, left.stride, right, kPanelRows, c, kPanelRows,
             false);
  }
  static void across_times_weights(int64_t columns, int64_t lanes, int64_t keys, Left<Operand> across, int64_t skip,
                                   const Operand* weights, Sum* c, bool add) {
    const auto multiply = columns > kLongestChain ? product<Dot, Order::kColumnMajor, Sums::kParts>
                                                  : product<Dot, Order::kColumnMajor, Sums::kChain>;
    multiply(columns, lanes, keys, across.rows + skip * across.stride, across.stride, weights, kPanelRows, c,
             kPanelRows, add);
  }
  static void add_weights_times_rows(int64_t keys, int64_t columns, const Operand* weights, const Operand* right,
                                     Sum* c) {
    const int64_t width = row_width(columns);
    product<Dot, Order::kRowMajor>(keys, width, kPanelRows, weights, kPanelRows, right, width, c, width, true);
  }
};

#if defined(__AVX512BF16__)
constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
struct BFloat16Operands {
  using Sum = float;
  using Operand = uint16_t;
  using Registers = TileRegisters;
  static constexpr bool kPlain = false;
  static constexpr int kExpTerms = 5;
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kScoreRows = kStep;

  static constexpr int64_t kTileRows = 16;
  static constexpr int64_t kDepth = 32;  // operands hold zeros up to a multiple of this along the depth
  static constexpr int64_t kAcrossWidth = kKeyBlock + kDepth;
  static int64_t width_of(int64_t columns) { return round_up(columns, kDepth); }
  static int64_t left_size(int64_t columns) { return kKeyRows * width_of(columns); }
  static int64_t across_size(int64_t columns) { return width_of(columns) * kAcrossWidth; }
  static int64_t panel_size(int64_t columns) { return kPanelRows * width_of(columns); }
  static int64_t rows_size(int64_t columns) { return kPanelRows * row_width(columns); }

  static const uint32_t* units(const Operand* x) { return reinterpret_cast<const uint32_t*>(x); }

  // [keys][width]. A tile's rows up to a multiple of kDepth are zeroed too. Rows in place may hold anything after the
  // last: products read kTileRows rows at a time, and `across` reads whole multiples of kDepth.
  static Left<Operand> load_left(const AttentionParams& p, const Sequence& s, int64_t head, const Tensor4& x,
                                 int64_t first, int64_t keys, int64_t columns, bool rotated, Operand* left, Sum* row) {
    const int64_t width = width_of(columns);
    if (columns == width && keys % kDepth == 0)
      if (const Operand* rows =
              dense_rows<Operand>(p, s, head, x, DType::kBFloat16, first, keys + kTileRows - 1, width, rotated))
        return {rows, width};
    KeyRows rows(p, s, x, head);
    for (int64_t j = 0; j < keys; ++j) {
      Operand* to = left + j * width;
      if (p.key_mask && !p.key_mask[s.index * p.nk + first + j]) {
        std::memset(to, 0, width * sizeof(Operand));
        continue;
      }
      if (rotated || rows.dtype() != DType::kBFloat16) {
        rows.load(first + j, columns, row);
        if (rotated) rotate_row(row, p.rotated, p.k_angles, s.index, angle_of(p, s, first + j), p.interleaved, false);
        store_row(row, DType::kBFloat16, columns, reinterpret_cast<char*>(to));
        std::memset(to + columns, 0, (width - columns) * sizeof(Operand));
      } else {
        copy_row(reinterpret_cast<const Operand*>(rows.at(first + j)), columns, to);
      }
    }
    std::memset(left + keys * width, 0, (round_up(keys, kDepth) - keys) * width * sizeof(Operand));
    return {left, width};
  }

  // [width][kAcrossWidth]
  static Left<Operand> across(Left<Operand> left, int64_t keys, int64_t columns, Operand* out) {
    const int64_t width = width_of(columns), padded = round_up(keys, kDepth);
    for (int64_t j = 0; j < padded; j += 32)
      for (int64_t c = 0; c < width; c += 8)
        transpose_32x8(left.rows + j * left.stride + c, left.stride, out + c * kAcrossWidth + j, kAcrossWidth);
    for (int64_t c = 0; c < width; ++c)
      std::memset(out + c * kAcrossWidth + padded, 0, (kAcrossWidth - padded) * sizeof(Operand));
    return {out, kAcrossWidth};
  }

  // [32 pairs of rows][width] units
  static const Operand* right_of_rows(const Sum* rows, int64_t columns, Operand* right) {
    const int64_t width = row_width(columns);
    for (int64_t r = 0; r < kPanelRows; r += 2)
      for (int64_t c = 0; c < width; c += 16)
        store_pairs(right + r * width + 2 * c, load<float>(rows + r * width + c),
                    load<float>(rows + (r + 1) * width + c));
    return right;
  }

  // [width / 2 pairs][64] units
  static void right_of_transposed_rows(const Sum* rows, int64_t columns, Operand* right, Sum* staging) {
    const int64_t from = row_width(columns), width = width_of(columns);
    Operand* packed = reinterpret_cast<Operand*>(staging);
    for (int64_t r = 0; r < kPanelRows; ++r) {
      for (int64_t c = 0; c < from; c += 16) store_bfloat16(packed + r * width + c, load<float>(rows + r * from + c));
      std::memset(packed + r * width + from, 0, (width - from) * sizeof(Operand));
    }
    transpose_units(packed, width / 2, kPanelRows, width / 2, right, kPanelRows);
  }

  // Rows of a panel, transposed, by way of `rows`, or straight if their numbers stay as they are: see load_panel.
  static void load_right(const Panel& panel, const Tensor4& x, int64_t columns, float factor, bool rotated,
                         bool against_sinks, Sum* rows, Operand* right, Sum* staging) {
    if (rotated || factor != 1) {
      load_panel<float>(panel, x, columns, row_width(columns), factor, rotated, rows, against_sinks);
      return right_of_transposed_rows(rows, columns, right, staging);
    }
    const int64_t width = width_of(columns);
    Operand* packed = reinterpret_cast<Operand*>(staging);
    for (int64_t r = 0; r < panel.rows; ++r) {
      const Row row = locate(panel, r);
      const char* from = row_address(x, DType::kBFloat16, panel.sequence.row, row.head, row.token);
      copy_row(reinterpret_cast<const Operand*>(from), columns, packed + r * width);
    }
    std::memset(packed + panel.rows * width, 0, (kPanelRows - panel.rows) * width * sizeof(Operand));
    transpose_units(packed, width / 2, kPanelRows, width / 2, right, kPanelRows);
  }

  static Sum* step_scores(Sum* scores, int64_t) { return scores; }  // soon read: in the nearest cache
  static Operand* weights(Sum*, Operand* own) { return own; }
  static void store_right(Operand* right, int64_t j, int64_t lane, Vec<float> a, Vec<float> b) {
    store_pairs(right + j * kPanelRows + 2 * lane, a, b);
  }
  static void store_left(Operand* left, int64_t j, int64_t lane, Vec<float> a) {
    store_bfloat16(left + j * kPanelRows + lane, a);
  }
  static void pad_right(Operand* right, int64_t keys) {
    const int64_t even = round_up(keys, 2);
    std::memset(right + even * kPanelRows, 0, (round_up(keys, kDepth) - even) * kPanelRows * sizeof(Operand));
  }
  static void pad_left(Operand* left, int64_t keys) {
    std::memset(left + keys * kPanelRows, 0, (round_up(keys, kDepth) - keys) * kPanelRows * sizeof(Operand));
  }

  static void left_times_panel(int64_t keys, int64_t lanes, int64_t columns, Left<Operand> left, int64_t skip,
                               const Operand* right, Sum* c) {
    pair_product(keys, lanes, width_of(columns) / 2, units(left.rows + skip * left.stride), left.stride / 2,
                 units(right), kPanelRows, c, kPanelRows, false);
  }
  static void across_times_weights(int64_t columns, int64_t lanes, int64_t keys, Left<Operand> across, int64_t skip,
                                   const Operand* weights, Sum* c, bool add) {
    pair_product(columns, lanes, round_up(keys, kDepth) / 2, units(across.rows + skip), across.stride / 2,
                 units(weights), kPanelRows, c, kPanelRows, add);
  }
  static void add_weights_times_rows(int64_t keys, int64_t columns, const Operand* weights, const Operand* right,
                                     Sum* c) {
    const int64_t width = row_width(columns);
    pair_product(keys, width, kPanelRows / 2, units(weights), kPanelRows / 2, units(right), width, c, width, true);
  }

 private:
  // dst[c][r] = src[r][c]. A vector takes 8 numbers of each of 4 rows, 8 rows apart; zips in its quarters do the rest.
  static void transpose_32x8(const Operand* src, int64_t stride, Operand* dst, int64_t dst_stride) {
    __m512i x[8], y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const auto quarter = [&](int n) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + (8 * n + i) * stride));
      };
      x[i] = _mm512_castsi128_si512(quarter(0));
      x[i] = _mm512_inserti32x4(x[i], quarter(1), 1);
      x[i] = _mm512_inserti32x4(x[i], quarter(2), 2);
      x[i] = _mm512_inserti32x4(x[i], quarter(3), 3);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = _mm512_unpacklo_epi16(x[i], x[i + 4]);
      y[2 * i + 1] = _mm512_unpackhi_epi16(x[i], x[i + 4]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = _mm512_unpacklo_epi16(y[i], y[i + 4]);
      x[2 * i + 1] = _mm512_unpackhi_epi16(y[i], y[i + 4]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = _mm512_unpacklo_epi16(x[i], x[i + 4]);
      y[2 * i + 1] = _mm512_unpackhi_epi16(x[i], x[i + 4]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm512_storeu_si512(dst + i * dst_stride, y[i]);
  }
  // Zeros follow up to width_of(columns).
  static void copy_row(const Operand* from, int64_t columns, Operand* to) {
    for (int64_t c = 0; c < columns; c += 32) {
      const __mmask32 present = columns - c >= 32 ? ~__mmask32{0} : (__mmask32{1} << (columns - c)) - 1;
      _mm512_storeu_si512(to + c, _mm512_maskz_loadu_epi16(present, from + c));
    }
  }
  static void transpose_units(const Operand* src, int64_t stride, int64_t rows, int64_t columns, Operand* dst,
                              int64_t dst_stride) {
    transpose<float>(reinterpret_cast<const float*>(src), stride, rows, columns, reinterpret_cast<float*>(dst),
                     dst_stride);
  }
  static void store_bfloat16(Operand* dst, Vec<float> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))));
  }
  // Units (a[lane], b[lane]).
  static void store_pairs(Operand* dst, Vec<float> a, Vec<float> b) {
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
    _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(_mm512_loadu_si512(kPairs), reinterpret_cast<__m512i>(both)));
  }
};
#endif

}  // namespace
}  // namespace longattn
