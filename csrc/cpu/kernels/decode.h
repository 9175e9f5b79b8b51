// Forward for a few rows, as decoding has them: keys and values are read where they lie, once, and no tile is made of
// them. Over blocks of keys,
//
//   S = K Q^T           [keys][kPanelRows], dot products along D
//   m' = max(m, colmax S)   P = exp2(c (S - m'))   l' = l exp2(c (m - m')) + colsum P
//   O' = O exp2(c (m - m')) + P^T V       [rows][Dv]
//
// with c as in forward.h. int8 is multiplied by its scales at the end of the first product, and before the second.
#pragma once

#include <type_traits>

#include "cpu/kernels/forward.h"

namespace longattn {
namespace {

constexpr int64_t kFewRows = 8;
// Rows to fetch into the second level of cache before they are read: pages end too soon for the processor to guess
// them, and the first level has too few places for lines on their way.
constexpr int64_t kAhead = 48;

template <class T>
struct DecodeScratch {
  T *queries, *queries_of_sinks, *staging, *scores, *sums;
  int64_t bytes;

  DecodeScratch(const AttentionParams& p, char* base) {
    Arena arena{base};
    queries = arena.take<T>(kPanelRows * row_width(p.head_dim));
    queries_of_sinks = p.frame > 0 ? arena.take<T>(kPanelRows * row_width(p.head_dim)) : queries;
    staging = arena.take<T>(kKeyBlock * row_width(larger(p.head_dim, p.v_head_dim)));
    scores = arena.take<T>(kKeyBlock * kPanelRows);
    sums = arena.take<T>(kFewRows * row_width(p.v_head_dim));
    bytes = arena.used;
  }
};

// Numbers in storage, as vectors of the accumulation type.
template <class T>
struct Plain {
  using Sum = T;
  static constexpr int64_t kBytes = sizeof(T);
  static Vec<T> load(const char* row, int64_t c) { return longattn::load<T>(reinterpret_cast<const T*>(row) + c); }
};
struct BFloat16 {
  using Sum = float;
  static constexpr int64_t kBytes = 2;
  static Vec<float> load(const char* row, int64_t c) {
    row += 2 * c;
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
    const __m512i wide = _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Whole __attribute__((vector_size(kVectorBytes)));
    Half bits;
    __builtin_memcpy(&bits, row, sizeof(bits));
    const Whole wide = __builtin_convertvector(bits, Whole) << 16;
#endif
    Vec<float> x;
    __builtin_memcpy(&x, &wide, sizeof(x));
    return x;
  }
};
template <class T>
struct Int8 {
  using Sum = T;
  static constexpr int64_t kBytes = 1;
  static Vec<T> load(const char* row, int64_t c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + c));
      const __m512i wide = _mm512_maskz_cvtepi8_epi32(0xffff, bytes);
      return reinterpret_cast<Vec<T>>(_mm512_maskz_cvtepi32_ps(0xffff, wide));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + c));
      return reinterpret_cast<Vec<T>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
    }
#endif
    int8_t numbers[kWidth<T>];
    T wide[kWidth<T>];
    __builtin_memcpy(numbers, row + c, sizeof(numbers));
    for (int i = 0; i < kWidth<T>; ++i) wide[i] = numbers[i];
    return longattn::load<T>(wide);
  }
};

// The keys of a block, or their values, row by row.
constexpr int64_t kSpare = 16;  // rows that products may read past the last
struct Block {
  const char* rows[kKeyBlock + kSpare];   // past the last: as the last
  const char* ahead[kKeyBlock + kSpare];  // what to fetch while a row is read; of another tensor, maybe: not to be read
  const float* scales[kKeyBlock];         // of int8
  int64_t keys;
};

// `next`: the first of `next_keys` rows that are read after these.
inline void locate_block(KeyRows* rows, int64_t first, int64_t keys, KeyRows* next, int64_t next_first,
                         int64_t next_keys, Block* block) {
  const bool scaled = rows->dtype() == DType::kInt8;
  block->keys = keys;
  for (int64_t j = 0; j < keys; ++j) {
    block->rows[j] = rows->at(first + j);
    if (scaled) block->scales[j] = &rows->scale(first + j);
  }
  for (int64_t j = keys; j < keys + kSpare; ++j) block->rows[j] = block->rows[keys - 1];
  const int64_t here = larger(0, keys - kAhead);  // rows whose turn to be fetched comes in this block
  for (int64_t j = 0; j < here; ++j) block->ahead[j] = block->rows[j + kAhead];
  for (int64_t j = here; j < keys + kSpare; ++j)
    block->ahead[j] = next_keys > 0 ? next->at(next_first + smaller(larger(0, j + kAhead - keys), next_keys - 1))
                                    : block->rows[keys - 1];
}

// Sums of the lanes of N = kWidth vectors: of x[i] in lane i. Each step adds halves and puts two vectors side by side;
// pairing i with i + N / 2 leaves the lanes in order. Only inlined do the vectors stay in registers.
template <class T, int N = kWidth<T>>
__attribute__((always_inline)) inline Vec<T> lane_sums(Vec<T>* x) {
  using Zip = Lanes<kWidth<T>>;
#pragma GCC unroll 8
  for (int i = 0; i < N / 2; ++i)
    x[i] = Zip::template zip_low<T>(x[i], x[i + N / 2]) + Zip::template zip_high<T>(x[i], x[i + N / 2]);
  if constexpr (N > 2)
    return lane_sums<T, N / 2>(x);
  else
    return x[0];
}

// scores[j][r] = k_j . q_r for R rows, q [R][width]; columns of whole vectors.
template <class Stored, int R, class T = typename Stored::Sum>
inline void dot_products(const Block& block, int64_t columns, const T* queries, int64_t width, T* scores) {
  constexpr int W = kWidth<T>, K = W / R;  // keys at a time
  for (int64_t j = 0; j < block.keys; j += K) {
    Vec<T> sums[W] = {};  // of key k and row r at [k * R + r]
    for (int64_t c = 0; c < columns; c += W) {
      Vec<T> q[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) q[r] = load<T>(queries + r * width + c);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        __builtin_prefetch(block.ahead[j + k] + c * Stored::kBytes, 0, 2);
        const Vec<T> key = Stored::load(block.rows[j + k], c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[k * R + r] += key * q[r];
      }
    }
    T found[W];
    store<T>(found, lane_sums<T>(sums));
    for (int k = 0; k < K && j + k < block.keys; ++k)
      for (int r = 0; r < R; ++r) scores[(j + k) * kPanelRows + r] = found[k * R + r];
  }
}

// sums[r][c] = sums[r][c] * decay[r] + sum_j weights[j][r] v_j[c] for R rows and C vectors of columns.
template <class Stored, int R, int C, class T = typename Stored::Sum>
inline void add_values(const Block& block, int64_t c, const T* weights, const T* decay, T* sums, int64_t width) {
  constexpr int W = kWidth<T>;
  Vec<T> total[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < C; ++n) total[r][n] = load<T>(sums + r * width + c + n * W) * decay[r];
  for (int64_t j = 0; j < block.keys; ++j) {
    Vec<T> value[C];
#pragma GCC unroll 4
    for (int n = 0; n < C; ++n) {
      __builtin_prefetch(block.ahead[j] + (c + n * W) * Stored::kBytes, 0, 2);
      value[n] = Stored::load(block.rows[j], c + n * W);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const T weight = weights[j * kPanelRows + r];
#pragma GCC unroll 4
      for (int n = 0; n < C; ++n) total[r][n] += weight * value[n];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < C; ++n) store<T>(sums + r * width + c + n * W, total[r][n]);
}

// Calls f with the number of rows that is handled next, as a constant, and the first of them.
template <class T, class F>
inline void by_rows(int64_t rows, F f) {
  constexpr int kMost = kWidth<T> < 4 ? kWidth<T> : 4;
  int64_t r = 0;
  for (; rows - r > 1; r += kMost) f(std::integral_constant<int, kMost>{}, r);
  if (r < rows) f(std::integral_constant<int, 1>{}, r);
}

// Calls f(Stored, block, columns) for the rows of a block: where they lie, if they are whole vectors of numbers that
// need no more than widening, else converted.
template <class T, class F>
inline void with_rows(const AttentionParams& p, const Sequence& s, int64_t kv_head, const Tensor4& x, int64_t first,
                      const Block& block, int64_t columns, DType dtype, bool rotated, T* staging, F f) {
  if (columns % kWidth<T> == 0 && !rotated && !p.key_mask) {
    if (dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32)) return f(Plain<T>{}, block, columns);
    if (dtype == DType::kInt8) return f(Int8<T>{}, block, columns);
    if constexpr (sizeof(T) == 4)
      if (dtype == DType::kBFloat16) return f(BFloat16{}, block, columns);
  }
  const int64_t width = row_width(columns);
  load_keys<T>(p, s, kv_head, x, first, block.keys, columns, width, rotated, staging);
  Block converted;
  converted.keys = block.keys;
  for (int64_t j = 0; j < block.keys + kSpare; ++j)
    converted.rows[j] = converted.ahead[j] =
        reinterpret_cast<const char*>(staging + smaller(j, block.keys - 1) * width);
  f(Plain<T>{}, converted, width);
}

// Multiplies a column of numbers by the scales of a block's rows, if they are stored with scales.
template <class Stored, class T = typename Stored::Sum>
inline void multiply_by_scales(const Block& block, int64_t rows, T* numbers) {
  if constexpr (std::is_same_v<Stored, Int8<T>>)
    for (int64_t j = 0; j < block.keys; ++j)
      for (int64_t n = 0; n < rows; n += kWidth<T>) {
        T* at = numbers + j * kPanelRows + n;
        store<T>(at, load<T>(at) * static_cast<T>(*block.scales[j]));
      }
}

// Scores become weights, m and l move on, and decay is what the sums so far are to be multiplied by.
template <class T>
inline void weigh_block(int64_t keys, int64_t rows, T exponent, T* scores, T* largest, T* total, T* decay) {
  constexpr int W = kWidth<T>;
  const Vec<T> unseen = splat<T>(-kInfinity);
  for (int64_t n = 0; n < rows; n += W) {
    const Vec<T> before = load<T>(largest + n);
    Vec<T> top = before;
    for (int64_t j = 0; j < keys; ++j) top = maximum<T>(load<T>(scores + j * kPanelRows + n), top);
    const Vec<T> reference = top == unseen ? Vec<T>{} : top;  // -inf - -inf would be NaN
    const Vec<T> fall = exp2<T, kFullTerms<T>>((before - reference) * exponent);
    Vec<T> sum{};
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<T> weight = exp2<T, kFullTerms<T>>((load<T>(scores + j * kPanelRows + n) - reference) * exponent);
      sum += weight;
      store<T>(scores + j * kPanelRows + n, weight);
    }
    store<T>(largest + n, top);
    store<T>(decay + n, fall);
    store<T>(total + n, load<T>(total + n) * fall + sum);
  }
}

template <class T>
void decode_tile(const AttentionParams& p, const QueryTile& tile, char* memory) {
  constexpr int W = kWidth<T>;
  const int64_t group = p.q_heads / p.kv_heads, rows = tile.queries * group;
  const DecodeScratch<T> scratch(p, memory);
  const ScoreScale scale = score_scale(p);
  const T natural = static_cast<T>(scale.natural), exponent = static_cast<T>(scale.natural * kLog2e);
  const int64_t width = row_width(p.head_dim), v_width = row_width(p.v_head_dim);

  Panel panel = make_panel(p, tile.sequence, tile.kv_head, group, tile.first_query * group, rows);
  restrict(tile.first_key, tile.last_key, &panel.range);
  load_panel<T>(panel, p.q, p.head_dim, width, static_cast<T>(scale.query), p.rotated > 0, scratch.queries);
  if (p.frame > 0)
    load_panel<T>(panel, p.q, p.head_dim, width, static_cast<T>(scale.query), p.rotated > 0, scratch.queries_of_sinks,
                  true);
  std::memset(scratch.sums, 0, kFewRows * v_width * sizeof(T));
  std::memset(scratch.scores, 0, kKeyBlock * kPanelRows * sizeof(T));  // lanes without a row
  alignas(64) T largest[kFewRows + W], total[kFewRows + W], decay[kFewRows + W];
  for (int64_t r = 0; r < kFewRows + W; ++r) {
    largest[r] = T(-kInfinity);
    total[r] = T(0);
  }

  KeyRows keys(p, tile.sequence, p.k, tile.kv_head), values(p, tile.sequence, p.v, tile.kv_head);
  Block stored_rows;
  const PanelRange& range = panel.range;
  for (int segment = 0; segment < 2; ++segment) {
    const bool sinks = segment == 0;
    const int64_t start = sinks ? range.sinks_start : range.start, stop = sinks ? range.sinks_stop : range.stop;
    const T* queries = sinks ? scratch.queries_of_sinks : scratch.queries;
    for (int64_t first = start; first < stop; first += kKeyBlock) {
      const int64_t count = smaller(kKeyBlock, stop - first);
      locate_block(&keys, first, count, &values, first, count, &stored_rows);
      with_rows<T>(p, tile.sequence, tile.kv_head, p.k, first, stored_rows, p.head_dim, keys.dtype(), turns_keys(p),
                   scratch.staging, [&](auto stored, const Block& block, int64_t columns) {
                     using Stored = decltype(stored);
                     by_rows<T>(rows, [&](auto some, int64_t r) {
                       dot_products<Stored, decltype(some)::value>(block, columns, queries + r * width, width,
                                                                   scratch.scores + r);
                     });
                     multiply_by_scales<Stored>(block, rows, scratch.scores);
                   });
      if (adjusts(p)) adjust<T>(panel, first, count, scratch.scores, nullptr);
      hide<T>(panel, first, count, scratch.scores);
      weigh_block<T>(count, rows, exponent, scratch.scores, largest, total, decay);
      locate_block(&values, first, count, &keys, first + count, stop - first - count, &stored_rows);
      with_rows<T>(p, tile.sequence, tile.kv_head, p.v, first, stored_rows, p.v_head_dim, values.dtype(), false,
                   scratch.staging, [&](auto stored, const Block& block, int64_t columns) {
                     using Stored = decltype(stored);
                     multiply_by_scales<Stored>(block, rows, scratch.scores);
                     by_rows<T>(rows, [&](auto some, int64_t r) {
                       constexpr int R = decltype(some)::value;
                       T* sums = scratch.sums + r * v_width;
                       int64_t c = 0;
                       for (; c + 4 * W <= columns; c += 4 * W)
                         add_values<Stored, R, 4>(block, c, scratch.scores + r, decay + r, sums, v_width);
                       for (; c < columns; c += W)
                         add_values<Stored, R, 1>(block, c, scratch.scores + r, decay + r, sums, v_width);
                     });
                   });
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    T* values = scratch.sums + r * v_width;
    const T inverse = total[r] == 0 ? T(0) : static_cast<T>(1 / static_cast<double>(total[r]));
    const double lse =
        total[r] == 0 ? -kInfinity : static_cast<double>(largest[r]) * natural + ::log(static_cast<double>(total[r]));
    for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] *= inverse;
    if (!tile.partial) {
      finish_row<T>(panel, r, lse, values);
      continue;
    }
    T* to = reinterpret_cast<T*>(tile.partial) + r * (p.v_head_dim + 1);
    std::memcpy(to, values, p.v_head_dim * sizeof(T));
    to[p.v_head_dim] = static_cast<T>(lse);
  }
}

// Whether decode_tile computes a tile.
inline bool has_few_rows(const AttentionParams& p, const QueryTile& tile) {
  return tile.queries * (p.q_heads / p.kv_heads) <= kFewRows && p.dropout_p == 0;
}

// The first row of a panel that decode_tile has computed; it and all after it are of the last tile.
inline int64_t first_of_few(const Panel& panel) {
  const AttentionParams& p = *panel.params;
  const int64_t queries = panel.sequence.lq, first = (queries - 1) / queries_of_tile(p) * queries_of_tile(p);
  if (!has_few_rows(p, {panel.sequence, panel.kv_head, first, queries - first})) return panel.rows;
  return smaller(panel.rows, larger(0, first * panel.group - panel.first_row));
}

// Products of keys with the rows of a panel from `first` on, as decode_tile has them: a weight is exp(score - lse), and
// would be off by all that two ways to sum a score differ by.
template <class T>
inline void few_dot_products(const Panel& panel, int64_t first, int64_t keys, const T* rows, int64_t stride,
                             const T* queries, int64_t width, T* scores) {
  Block block;
  block.keys = keys;
  for (int64_t j = 0; j < keys + kSpare; ++j)
    block.rows[j] = block.ahead[j] = reinterpret_cast<const char*>(rows + smaller(j, keys - 1) * stride);
  for (int64_t r = first; r < panel.rows; ++r)
    dot_products<Plain<T>, 1>(block, width, queries + r * width, width, scores + r);
}

}  // namespace
}  // namespace longattn
