// Forward: for each panel of queries, over blocks of keys,
//
//   S = K Q^T                         [keys, 64]: queries in lanes, so that maxima and sums run down columns
//   m' = max(m, rowmax S)             P = exp2(c S - c m')
//   l' = l exp2(c m - c m') + sum P   O' = O exp2(c m - c m') + V^T P    [Dv, 64]
//
// with c = scale log2(e). At the end out = O / l and lse = (c m + log2 l) ln 2.
#pragma once

#include <cmath>

#include "cpu/kernels/operands.h"

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

template <class Operands>
struct ForwardScratch {
  using T = typename Operands::Sum;
  using Operand = typename Operands::Operand;
  Operand *queries, *keys, *values, *values_across, *weights;
  T *rows, *staging, *scores, *sums;
  PanelState<T>* states;
  Panel* panels;
  int64_t bytes;

  ForwardScratch(const AttentionParams& p, int64_t count, char* base) {
    Arena arena{base};
    queries = arena.take<Operand>(count * Operands::panel_size(p.head_dim));  // Q^T, right, of each panel
    sums = arena.take<T>(count * kPanelRows * row_width(p.v_head_dim));       // O^T [Dv][64] of each panel
    states = arena.take<PanelState<T>>(count);
    panels = arena.take<Panel>(count);
    rows = arena.take<T>(kPanelRows * larger(row_width(p.head_dim), row_width(p.v_head_dim)));
    staging = arena.take<T>(kPanelRows * row_width(p.head_dim));
    keys = arena.take<Operand>(Operands::left_size(p.head_dim));
    values = arena.take<Operand>(Operands::left_size(p.v_head_dim));
    values_across = arena.take<Operand>(Operands::across_size(p.v_head_dim));
    scores = arena.take<T>(kKeyRows * kPanelRows);         // S [keys][64]
    weights = arena.take<Operand>(kKeyRows * kPanelRows);  // P, right
    bytes = arena.used;
  }
};

// Scores of keys [base, base + keys) become -inf where a query must not see the key.
template <class T>
inline void hide(const Panel& panel, int64_t base, int64_t keys, T* scores) {
  constexpr int W = kWidth<T>;
  const AttentionParams& p = *panel.params;
  const bool* visible = p.key_mask ? p.key_mask + panel.sequence.index * p.nk + base : nullptr;
  const int64_t full_start = panel.range.full_start - base, full_stop = panel.range.full_stop - base;
  const bool partial = full_start > 0 || full_stop < keys;
  if (!visible && !partial) return;
  const Vec<T> hidden = splat<T>(-kInfinity);
  LaneLimits<T> limits;
  if (partial) lane_limits<T>(panel, base, keys, &limits);
  for (int64_t j = 0; j < keys; ++j) {
    T* row = scores + j * kPanelRows;
    if (visible && !visible[j]) {
      for (int n = 0; n < kPanelRows; n += W) store<T>(row + n, hidden);
    } else if (j < full_start || j >= full_stop) {
      const bool sink = base + j < p.sinks;
      for (int n = 0; n < kPanelRows; n += W)
        store<T>(row + n, sees<T>(limits, n, static_cast<Int<T>>(j), sink) ? load<T>(row + n) : hidden);
    }
  }
}

// One step of the online softmax over `keys` scores: they become weights, as right operand; the state moves on.
template <class Operands, class T = typename Operands::Sum>
inline void softmax_step(int64_t keys, T exponent, const T* scores, typename Operands::Operand* weights,
                         PanelState<T>* state) {
  constexpr int W = kWidth<T>;
  const Vec<T> unseen = splat<T>(-kInfinity);
  for (int n = 0; n < kPanelRows; n += W) {
    const T* column = scores + n;
    const Vec<T> before = load<T>(state->largest + n);
    Vec<T> largest = before, other = before;
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      largest = maximum<T>(load<T>(column + j * kPanelRows), largest);
      other = maximum<T>(load<T>(column + (j + 1) * kPanelRows), other);
    }
    if (j < keys) largest = maximum<T>(load<T>(column + j * kPanelRows), largest);
    largest = maximum<T>(largest, other);
    const Vec<T> reference = largest == unseen ? Vec<T>{} : largest * exponent;  // -inf - -inf would be NaN
    const Vec<T> decay = exp2<T, Operands::kExpTerms>(before * exponent - reference);
    Vec<T> sum{}, other_sum{};
    for (j = 0; j + 2 <= keys; j += 2) {
      const Vec<T> a = exp2<T, Operands::kExpTerms>(load<T>(column + j * kPanelRows) * exponent - reference);
      const Vec<T> b = exp2<T, Operands::kExpTerms>(load<T>(column + (j + 1) * kPanelRows) * exponent - reference);
      Operands::store_right(weights, j, n, a, b);
      sum += a;
      other_sum += b;
    }
    if (j < keys) {
      const Vec<T> a = exp2<T, Operands::kExpTerms>(load<T>(column + j * kPanelRows) * exponent - reference);
      Operands::store_right(weights, j, n, a, Vec<T>{});
      sum += a;
    }
    store<T>(state->largest + n, largest);
    store<T>(state->decay + n, decay);
    store<T>(state->total + n, load<T>(state->total + n) * decay + (sum + other_sum));
  }
  Operands::pad_right(weights, keys);
}

// out = O / l, lse = (c m + log2 l) ln 2; rows that saw nothing give 0 and -inf.
template <class T>
inline void finish_panel(const Panel& panel, T exponent, const PanelState<T>& state, const T* sums, T* rows) {
  const AttentionParams& p = *panel.params;
  const int64_t width = row_width(p.v_head_dim);
  transpose<T>(sums, kPanelRows, width, kPanelRows, rows, width);
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

// The union of the ranges of some panels.
inline PanelRange union_range(const Panel* panels, int64_t count) {
  PanelRange all{INT64_MAX, 0, INT64_MAX, 0, 0, 0};
  for (int64_t n = 0; n < count; ++n) {
    const PanelRange& range = panels[n].range;
    if (range.sinks_start < range.sinks_stop) {
      all.sinks_start = smaller(all.sinks_start, range.sinks_start);
      all.sinks_stop = larger(all.sinks_stop, range.sinks_stop);
    }
    if (range.start < range.stop) {
      all.start = smaller(all.start, range.start);
      all.stop = larger(all.stop, range.stop);
    }
  }
  return all;
}

template <class Operands>
void forward_tile(const AttentionParams& p, const QueryTile& tile, char* memory) {
  using T = typename Operands::Sum;
  const int64_t group = p.q_heads / p.kv_heads;
  const int64_t first_row = tile.first_query * group, rows = tile.queries * group;
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  const ForwardScratch<Operands> scratch(p, panels, memory);
  [[maybe_unused]] const typename Operands::Registers registers;
  const ScoreScale scale = score_scale(p);
  const T exponent = static_cast<T>(scale.exponent);
  const int64_t query_stride = Operands::panel_size(p.head_dim), sum_stride = kPanelRows * row_width(p.v_head_dim);

  for (int64_t n = 0; n < panels; ++n) {
    scratch.panels[n] = make_panel(p, tile.sequence, tile.kv_head, first_row + n * kPanelRows,
                                   smaller(kPanelRows, rows - n * kPanelRows));
    load_panel<T>(scratch.panels[n], p.q, p.head_dim, row_width(p.head_dim), static_cast<T>(scale.query),
                  p.rotated > 0, scratch.rows);
    Operands::right_of_transposed_rows(scratch.rows, p.head_dim, scratch.queries + n * query_stride, scratch.staging);
    std::memset(scratch.sums + n * sum_stride, 0, sum_stride * sizeof(T));
    for (int64_t r = 0; r < kPanelRows; ++r) {
      scratch.states[n].largest[r] = T(-kInfinity);
      scratch.states[n].total[r] = T(0);
    }
  }

  const PanelRange all = union_range(scratch.panels, panels);
  for (int segment = 0; segment < 2; ++segment) {
    const bool sinks = segment == 0;
    const int64_t start = sinks ? all.sinks_start : all.start, stop = sinks ? all.sinks_stop : all.stop;
    for (int64_t first = start; first < stop; first += kKeyBlock) {
      const int64_t last = smaller(first + kKeyBlock, stop);
      Operands::load_left(p, tile.sequence, tile.kv_head, p.k, first, last - first, p.head_dim, p.rotated > 0,
                          scratch.keys, scratch.staging);
      Operands::load_left(p, tile.sequence, tile.kv_head, p.v, first, last - first, p.v_head_dim, false, scratch.values,
                          scratch.staging);
      const auto* values = Operands::across(scratch.values, last - first, p.v_head_dim, scratch.values_across);
      for (int64_t n = 0; n < panels; ++n) {
        const PanelRange& range = scratch.panels[n].range;
        const int64_t from = larger(first, sinks ? range.sinks_start : range.start);
        const int64_t to = smaller(last, sinks ? range.sinks_stop : range.stop);
        if (from >= to) continue;
        const int64_t keys = to - from, skip = from - first;
        auto* weights = Operands::weights(scratch.scores, scratch.weights);
        Operands::left_times_panel(keys, p.head_dim, scratch.keys, skip, scratch.queries + n * query_stride,
                                   scratch.scores);
        hide<T>(scratch.panels[n], from, keys, scratch.scores);
        softmax_step<Operands>(keys, exponent, scratch.scores, weights, &scratch.states[n]);
        Operands::across_times_weights(p.v_head_dim, keys, values, skip, weights, scratch.sums + n * sum_stride,
                                       {true, scratch.states[n].decay});
      }
    }
  }
  for (int64_t n = 0; n < panels; ++n)
    finish_panel<T>(scratch.panels[n], exponent, scratch.states[n], scratch.sums + n * sum_stride, scratch.rows);
}

}  // namespace
}  // namespace longattn
