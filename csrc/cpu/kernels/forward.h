// Forward: for each panel of queries, over blocks of keys,
//
//   S = K Q^T                         [keys, 64]: queries in lanes, so that maxima and sums run down columns
//   m' = max(m, rowmax S)             P = exp2(c S - c m')
//   l' = l exp2(c m - c m') + sum P   O' = O exp2(c m - c m') + V^T P    [Dv, 64]
//
// with c = scale log2(e). At the end out = O / l and lse = (c m + log2 l) ln 2.
#pragma once

#include <cmath>

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/panel.h"

namespace longattn {
namespace {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.6931471805599453094;

// The factor on q and the factor c on scores, so that c > 0 whatever the sign of scale.
struct ScoreScale {
  double query, exponent;
};

inline ScoreScale score_scale(const AttentionParams& p) {
  if (p.scale == 0.0) return {0.0, kLog2e};
  return {p.scale < 0 ? -1.0 : 1.0, (p.scale < 0 ? -p.scale : p.scale) * kLog2e};
}

template <class T>
struct PanelState {  // of the online softmax; lanes
  alignas(64) T largest[kPanelRows];  // m
  alignas(64) T total[kPanelRows];    // l
  alignas(64) T decay[kPanelRows];    // exp2(c m - c m')
};

template <class T>
struct ForwardScratch {
  T *queries, *rows, *keys, *values, *scores, *sums;
  PanelState<T>* states;
  Panel* panels;
  int64_t key_width, value_width, bytes;

  ForwardScratch(const AttentionParams& p, int64_t count, char* base) {
    Arena arena{base};
    key_width = round_up(p.head_dim, 16);
    value_width = round_up(p.v_head_dim, 16);
    queries = arena.take<T>(count * p_padded(p.head_dim) * kPanelRows);    // [panel][D][64]
    sums = arena.take<T>(count * p_padded(p.v_head_dim) * kPanelRows);     // [panel][Dv][64]
    states = arena.take<PanelState<T>>(count);
    panels = arena.take<Panel>(count);
    rows = arena.take<T>(kPanelRows * larger(key_width, value_width));      // [64][width]
    keys = arena.take<T>(kKeyBlock * key_width);
    values = arena.take<T>(kKeyBlock * value_width);
    scores = arena.take<T>(kKeyBlock * kPanelRows);                         // [keys][64]
    bytes = arena.used;
  }
  static int64_t p_padded(int64_t width) { return round_up(width, 16); }
};

// Scores of keys [first, first + keys) relative to `base` become -inf where a query must not see the key, then weights; the
// state moves on. `full` rows, those of [full_start, full_stop), need no test.
template <class T>
inline void softmax_step(const Panel& panel, int64_t base, int64_t keys, T exponent, T* scores, PanelState<T>* state) {
  constexpr int W = kWidth<T>;
  constexpr int kVectors = kPanelRows / W;
  const AttentionParams& p = *panel.params;
  const bool* visible = p.key_mask ? p.key_mask + panel.sequence.index * p.nk + base : nullptr;
  const int64_t full_start = panel.range.full_start - base, full_stop = panel.range.full_stop - base;
  const Vec<T> hidden = splat<T>(-kInfinity);
  LaneLimits<T> limits;
  if (full_start > 0 || full_stop < keys) lane_limits<T>(panel, base, keys, &limits);
  for (int64_t j = 0; j < keys; ++j) {
    T* row = scores + j * kPanelRows;
    if (visible && !visible[j]) {
      for (int n = 0; n < kVectors; ++n) store<T>(row + n * W, hidden);
    } else if (j < full_start || j >= full_stop) {
      const bool sink = base + j < p.sinks;
      for (int n = 0; n < kVectors; ++n) {
        const IntVec<T> seen = sees<T>(limits, n * W, static_cast<Int<T>>(j), sink);
        store<T>(row + n * W, seen ? load<T>(row + n * W) : hidden);
      }
    }
  }
  for (int n = 0; n < kVectors; ++n) {
    T* column = scores + n * W;
    const Vec<T> before = load<T>(state->largest + n * W);
    Vec<T> largest = before, other = before;
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      largest = maximum<T>(load<T>(column + j * kPanelRows), largest);
      other = maximum<T>(load<T>(column + (j + 1) * kPanelRows), other);
    }
    if (j < keys) largest = maximum<T>(load<T>(column + j * kPanelRows), largest);
    largest = maximum<T>(largest, other);
    const Vec<T> unseen = splat<T>(-kInfinity);
    const Vec<T> reference = largest == unseen ? Vec<T>{} : largest * exponent;  // -inf - -inf would be NaN
    const Vec<T> decay = exp2<T>(before * exponent - reference);
    Vec<T> sum{}, other_sum{};
    for (j = 0; j + 2 <= keys; j += 2) {
      const Vec<T> a = exp2<T>(load<T>(column + j * kPanelRows) * exponent - reference);
      const Vec<T> b = exp2<T>(load<T>(column + (j + 1) * kPanelRows) * exponent - reference);
      store<T>(column + j * kPanelRows, a);
      store<T>(column + (j + 1) * kPanelRows, b);
      sum += a;
      other_sum += b;
    }
    if (j < keys) {
      const Vec<T> a = exp2<T>(load<T>(column + j * kPanelRows) * exponent - reference);
      store<T>(column + j * kPanelRows, a);
      sum += a;
    }
    store<T>(state->largest + n * W, largest);
    store<T>(state->decay + n * W, decay);
    store<T>(state->total + n * W, load<T>(state->total + n * W) * decay + (sum + other_sum));
  }
}

// out = O / l, lse = (c m + log2 l) ln 2; rows that saw nothing give 0 and -inf.
template <class T>
inline void finish_panel(const Panel& panel, T exponent, const PanelState<T>& state, const T* sums, int64_t width, T* rows) {
  const AttentionParams& p = *panel.params;
  transpose<T>(sums, kPanelRows, round_up(p.v_head_dim, 16), kPanelRows, rows, width);
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Row row = locate(panel, r);
    const T total = state.total[r];
    const T inverse = total == T(0) ? T(0) : T(1) / total;
    T* values = rows + r * width;
    for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] *= inverse;
    store_row(values, p.dtype, p.v_head_dim, row_address(p.out, p.dtype, panel.sequence.row, row.head, row.token));
    const T lse = total == T(0) ? T(-kInfinity)
                                : static_cast<T>((static_cast<double>(state.largest[r]) * exponent) * kLn2 +
                                                 ::log(static_cast<double>(total)));
    *at<T>(p.lse, row_index(panel, row)) = lse;
  }
}

template <class T>
void forward_tile(const AttentionParams& p, const QueryTile& tile, char* memory) {
  const int64_t group = p.q_heads / p.kv_heads;
  const int64_t first_row = tile.first_query * group, rows = tile.queries * group;
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  const ForwardScratch<T> scratch(p, panels, memory);
  const ScoreScale scale = score_scale(p);
  const T exponent = static_cast<T>(scale.exponent);
  const int64_t query_stride = scratch.p_padded(p.head_dim) * kPanelRows;
  const int64_t sum_stride = scratch.p_padded(p.v_head_dim) * kPanelRows;

  Panel* panel = scratch.panels;
  PanelRange all{INT64_MAX, 0, INT64_MAX, 0, 0, 0};
  for (int64_t n = 0; n < panels; ++n) {
    panel[n] = make_panel(p, tile.sequence, tile.kv_head, first_row + n * kPanelRows,
                          smaller(kPanelRows, rows - n * kPanelRows));
    const PanelRange& range = panel[n].range;
    if (range.sinks_start < range.sinks_stop) {
      all.sinks_start = smaller(all.sinks_start, range.sinks_start);
      all.sinks_stop = larger(all.sinks_stop, range.sinks_stop);
    }
    if (range.start < range.stop) {
      all.start = smaller(all.start, range.start);
      all.stop = larger(all.stop, range.stop);
    }
    load_panel<T>(panel[n], p.q, p.head_dim, scratch.key_width, static_cast<T>(scale.query), p.rotated > 0, scratch.rows);
    transpose<T>(scratch.rows, scratch.key_width, kPanelRows, scratch.key_width, scratch.queries + n * query_stride,
                 kPanelRows);
    std::memset(scratch.sums + n * sum_stride, 0, sum_stride * sizeof(T));
    for (int64_t r = 0; r < kPanelRows; ++r) {
      scratch.states[n].largest[r] = T(-kInfinity);
      scratch.states[n].total[r] = T(0);
    }
  }

  for (int segment = 0; segment < 2; ++segment) {
    const bool sinks = segment == 0;
    const int64_t start = sinks ? all.sinks_start : all.start, stop = sinks ? all.sinks_stop : all.stop;
    for (int64_t first = start; first < stop; first += kKeyBlock) {
      const int64_t last = smaller(first + kKeyBlock, stop);
      load_keys<T>(p, tile.sequence, tile.kv_head, p.k, first, last - first, p.head_dim, scratch.key_width,
                   p.rotated > 0, scratch.keys);
      load_keys<T>(p, tile.sequence, tile.kv_head, p.v, first, last - first, p.v_head_dim, scratch.value_width, false,
                   scratch.values);
      for (int64_t n = 0; n < panels; ++n) {
        const PanelRange& range = panel[n].range;
        const int64_t from = larger(first, sinks ? range.sinks_start : range.start);
        const int64_t to = smaller(last, sinks ? range.sinks_stop : range.stop);
        if (from >= to) continue;
        const T* keys = scratch.keys + (from - first) * scratch.key_width;
        const T* values = scratch.values + (from - first) * scratch.value_width;
        product<T, Order::kRowMajor>(to - from, kPanelRows, p.head_dim, keys, scratch.key_width,
                                     scratch.queries + n * query_stride, kPanelRows, scratch.scores, kPanelRows,
                                     {Start<T>::kZero, nullptr});
        softmax_step<T>(panel[n], from, to - from, exponent, scratch.scores, &scratch.states[n]);
        product<T, Order::kColumnMajor>(p.v_head_dim, kPanelRows, to - from, values, scratch.value_width,
                                        scratch.scores, kPanelRows, scratch.sums + n * sum_stride, kPanelRows,
                                        {Start<T>::kScale, scratch.states[n].decay});
      }
    }
  }
  for (int64_t n = 0; n < panels; ++n)
    finish_panel<T>(panel[n], exponent, scratch.states[n], scratch.sums + n * sum_stride, scratch.value_width,
                    scratch.rows);
}

}  // namespace
}  // namespace longattn
