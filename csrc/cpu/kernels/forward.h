// Forward: for each panel of queries, over blocks of keys,
//
//   S = K Q^T                         [keys, 64]: queries in lanes, so that maxima and sums run down columns
//   m' = max(m, rowmax S)             P = exp2(c S - c m')
//   l' = l exp2(c m - c m') + sum P   O' = O exp2(c m - c m') + V^T P    [Dv, 64]
//
// with c = scale log2(e) (scores.h). At the end out = O / l and lse = (c m + log2 l) ln 2; a learned sink adds to l
// alone.
#pragma once

#include <cmath>

#include "cpu/kernels/operands.h"
#include "cpu/kernels/philox.h"
#include "cpu/kernels/scores.h"

namespace longattn {
namespace {

constexpr double kLn2 = 0.6931471805599453094;

template <class T>
struct PanelState {                   // of the online softmax; lanes
  alignas(64) T largest[kPanelRows];  // m
  alignas(64) T total[kPanelRows];    // l
  alignas(64) T decay[kPanelRows];    // exp2(c m - c m')
};

template <class Operands>
struct ForwardScratch {
  using T = typename Operands::Sum;
  using Operand = typename Operands::Operand;
  Operand *queries, *keys, *values, *values_across, *weights;
  T *rows, *staging, *scores, *sums, *keep;
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
    keep = p.dropout_p > 0 ? arena.take<T>(kKeyRows * kPanelRows) : nullptr;
    bytes = arena.used;
  }
};

// One step of the online softmax over `keys` scores: they become weights, as right operand; the state moves on. `keep`,
// if not nullptr, multiplies the weights, not their sum.
template <class Operands, class T = typename Operands::Sum>
inline void softmax_step(int64_t keys, int64_t lanes, T exponent, const T* scores, const T* keep,
                         typename Operands::Operand* weights, PanelState<T>* state) {
  constexpr int W = kWidth<T>;
  const Vec<T> unseen = splat<T>(-kInfinity);
  for (int64_t n = 0; n < lanes; n += W) {
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
      Vec<T> a = exp2<T, Operands::kExpTerms>(load<T>(column + j * kPanelRows) * exponent - reference);
      Vec<T> b = exp2<T, Operands::kExpTerms>(load<T>(column + (j + 1) * kPanelRows) * exponent - reference);
      sum += a;
      other_sum += b;
      if (keep) {
        a *= load<T>(keep + j * kPanelRows + n);
        b *= load<T>(keep + (j + 1) * kPanelRows + n);
      }
      Operands::store_right(weights, j, n, a, b);
    }
    if (j < keys) {
      Vec<T> a = exp2<T, Operands::kExpTerms>(load<T>(column + j * kPanelRows) * exponent - reference);
      sum += a;
      if (keep) a *= load<T>(keep + j * kPanelRows + n);
      Operands::store_right(weights, j, n, a, Vec<T>{});
    }
    store<T>(state->largest + n, largest);
    store<T>(state->decay + n, decay);
    store<T>(state->total + n, load<T>(state->total + n) * decay + (sum + other_sum));
  }
  Operands::pad_right(weights, keys);
}

// Writes a row of out and lse, given those of its keys alone: a learned sink takes its share here.
template <class T>
inline void finish_row(const Panel& panel, int64_t r, double lse, T* values) {
  const AttentionParams& p = *panel.params;
  const Row row = locate(panel, r);
  if (p.sink_logits) {
    const double sink = reinterpret_cast<const T*>(p.sink_logits)[row.head], top = sink > lse ? sink : lse;
    const double both = top == -kInfinity ? top : top + ::log(::exp(lse - top) + ::exp(sink - top));
    const T share = both == -kInfinity ? T(0) : static_cast<T>(::exp(lse - both));
    for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] *= share;
    lse = both;
  }
  store_row(values, p.dtype, p.v_head_dim, row_address(p.out, p.dtype, panel.sequence.row, row.head, row.token));
  *at<T>(p.lse, row_index(panel, row)) = static_cast<T>(lse);
}

// out = O / l and lse = (c m + log2 l) ln 2 of the keys seen; rows that saw none give 0 and -inf.
template <class T>
inline void finish_panel(const Panel& panel, T exponent, const PanelState<T>& state, const T* sums, T* rows,
                         T* partial) {
  const AttentionParams& p = *panel.params;
  const int64_t width = row_width(p.v_head_dim);
  transpose<T>(sums, kPanelRows, width, panel_lanes(panel), rows, width);
  for (int64_t r = 0; r < panel.rows; ++r) {
    const double total = state.total[r];
    const T inverse = total == 0 ? T(0) : static_cast<T>(1 / total);
    const double lse = total == 0 ? -kInfinity : static_cast<double>(state.largest[r]) * exponent * kLn2 + ::log(total);
    T* values = rows + r * width;
    for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] *= inverse;
    if (partial) {
      T* to = partial + r * (p.v_head_dim + 1);
      std::memcpy(to, values, p.v_head_dim * sizeof(T));
      to[p.v_head_dim] = static_cast<T>(lse);
    } else {
      finish_row<T>(panel, r, lse, values);
    }
  }
}

template <class T>
void merge_tile(const AttentionParams& p, const QueryTile& tile, const char* partials, int64_t pieces) {
  const int64_t group = p.q_heads / p.kv_heads, rows = tile.queries * group, width = p.v_head_dim + 1;
  const Panel panel{&p, tile.sequence, tile.kv_head, group, tile.first_query * group, rows, {}};
  T values[kMaxWidth];
  for (int64_t r = 0; r < rows; ++r) {
    const T* part = reinterpret_cast<const T*>(partials) + r * width;
    double top = -kInfinity, total = 0;
    for (int64_t n = 0; n < pieces; ++n)
      if (!(part[n * rows * width + p.v_head_dim] <= top)) top = part[n * rows * width + p.v_head_dim];
    for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] = T(0);
    for (int64_t n = 0; n < pieces && top != -kInfinity; ++n) {
      const T* from = part + n * rows * width;
      const double weight = ::exp(from[p.v_head_dim] - top);
      total += weight;
      for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] += static_cast<T>(weight) * from[c];
    }
    if (total != 0)
      for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] *= static_cast<T>(1 / total);
    finish_row<T>(panel, r, total == 0 ? -kInfinity : top + ::log(total), values);
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
    scratch.panels[n] = make_panel(p, tile.sequence, tile.kv_head, group, first_row + n * kPanelRows,
                                   smaller(kPanelRows, rows - n * kPanelRows));
    restrict(tile.first_key, tile.last_key, &scratch.panels[n].range);
    load_panel<T>(scratch.panels[n], p.q, p.head_dim, row_width(p.head_dim), static_cast<T>(scale.query), p.rotated > 0,
                  scratch.rows);
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
        const int64_t keys = to - from, skip = from - first, lanes = panel_lanes(scratch.panels[n]);
        auto* weights = Operands::weights(scratch.scores, scratch.weights);
        Operands::left_times_panel(keys, lanes, p.head_dim, scratch.keys, skip, scratch.queries + n * query_stride,
                                   scratch.scores);
        if (adjusts(p)) adjust<T>(scratch.panels[n], from, keys, scratch.scores, nullptr);
        hide<T>(scratch.panels[n], from, keys, scratch.scores);
        if (scratch.keep) dropout_multipliers<T>(scratch.panels[n], from, keys, scratch.keep);
        softmax_step<Operands>(keys, lanes, exponent, scratch.scores, scratch.keep, weights, &scratch.states[n]);
        Operands::across_times_weights(p.v_head_dim, lanes, keys, values, skip, weights, scratch.sums + n * sum_stride,
                                       {true, scratch.states[n].decay});
      }
    }
  }
  T* partial = reinterpret_cast<T*>(tile.partial);
  for (int64_t n = 0; n < panels; ++n)
    finish_panel<T>(scratch.panels[n], exponent, scratch.states[n], scratch.sums + n * sum_stride, scratch.rows,
                    partial ? partial + n * kPanelRows * (p.v_head_dim + 1) : nullptr);
}

}  // namespace
}  // namespace longattn
