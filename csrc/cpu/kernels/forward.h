// Forward: for each panel of queries, over blocks of keys, a step of a few keys at a time,
//
//   S = K Q^T                       [keys, 64]: queries in lanes, so that sums run down columns
//   P = exp2(c (S - r))             l += sum P
//
// and after each block O += V^T P, [Dv, 64], with c = scale log2(e) (scores.h). The reference r of a row is the largest
// score that it had seen when r was last moved; it moves when weights outgrow it by kLimit, which they seldom do, and
// then l and O are rescaled. The difference comes first: c S - c r, in one rounding, would leave that of c r, which is
// larger than all exponents where a mask is a finite number such as -1e30. At the end out = O / l and
// lse = scale r + log l; a learned sink adds to l alone.
#pragma once

#include <cmath>

#include "cpu/kernels/operands.h"
#include "cpu/kernels/philox.h"
#include "cpu/kernels/scores.h"

namespace longattn {
namespace {

template <class T>
struct PanelState {                     // of the online softmax; lanes
  alignas(64) T reference[kPanelRows];  // r; -inf before the first visible key
  alignas(64) T total[kPanelRows];      // l
  alignas(64) T step[kPanelRows];       // sum P of the latest step
};

template <class Operands>
struct ForwardScratch {
  using T = typename Operands::Sum;
  using Operand = typename Operands::Operand;
  Operand *queries, *queries_of_sinks, *keys, *values, *values_across, *weights;
  T *rows, *staging, *scores, *sums, *keep;
  PanelState<T>* states;
  Panel* panels;
  int64_t bytes;

  ForwardScratch(const AttentionParams& p, int64_t count, char* base) {
    Arena arena{base};
    queries = arena.take<Operand>(count * Operands::panel_size(p.head_dim));  // Q^T, right, of each panel
    queries_of_sinks = p.frame > 0 ? arena.take<Operand>(count * Operands::panel_size(p.head_dim)) : queries;
    sums = arena.take<T>(count * kPanelRows * row_width(p.v_head_dim));  // O^T [Dv][64] of each panel
    states = arena.take<PanelState<T>>(count);
    panels = arena.take<Panel>(count);
    rows = arena.take<T>(kPanelRows * larger(row_width(p.head_dim), row_width(p.v_head_dim)));
    staging = arena.take<T>(kPanelRows * row_width(p.head_dim));
    keys = arena.take<Operand>(Operands::left_size(p.head_dim));
    values = arena.take<Operand>(Operands::left_size(p.v_head_dim));
    values_across = arena.take<Operand>(Operands::across_size(p.v_head_dim));
    scores = arena.take<T>(Operands::kScoreRows * kPanelRows);  // S [keys][64]
    weights = arena.take<Operand>(kKeyRows * kPanelRows);       // P, right
    keep = p.dropout_p > 0 ? arena.take<T>(kKeyRows * kPanelRows) : nullptr;
    bytes = arena.used;
  }
};

constexpr float kLimit = 65536;  // of the sum of a step's weights

// Whether every row has a reference.
template <class T>
inline bool has_references(int64_t lanes, const PanelState<T>& state) {
  IntVec<T> missing{};
  for (int64_t n = 0; n < lanes; n += kWidth<T>) missing |= load<T>(state.reference + n) == splat<T>(-kInfinity);
  return !any<T>(missing);
}

// Where a row has no reference or its weights outgrow it, moves it up to the largest of `keys` scores; what was summed
// decays. A row's result depends on no other row.
template <class T>
inline void move_references(int64_t keys, int64_t lanes, T exponent, const T* scores, PanelState<T>* state,
                            int64_t columns, T* sums) {
  constexpr int W = kWidth<T>;
  const Vec<T> unseen = splat<T>(-kInfinity);
  for (int64_t n = 0; n < lanes; n += W) {
    Vec<T> largest = unseen;
    for (int64_t j = 0; j < keys; ++j) largest = maximum<T>(load<T>(scores + j * kPanelRows + n), largest);
    const Vec<T> before = load<T>(state->reference + n);
    const IntVec<T> moves = (before == unseen) | ~(load<T>(state->step + n) <= splat<T>(T(kLimit)));
    const Vec<T> after = moves ? maximum<T>(largest, before) : before;
    const Vec<T> fall = after == unseen ? Vec<T>{} : before - after;  // -inf - -inf is NaN
    const Vec<T> decay = exp2<T, kFullTerms<T>>(fall * exponent);
    store<T>(state->reference + n, after);
    store<T>(state->total + n, load<T>(state->total + n) * decay);
    for (int64_t c = 0; c < columns; ++c) {
      T* sum = sums + c * kPanelRows + n;
      store<T>(sum, load<T>(sum) * decay);
    }
  }
}

// Rows of keys that will soon be read, asked for a line at a time, while arithmetic leaves memory idle.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const AttentionParams& p, const Sequence& s, const Tensor4& x, int64_t kv_head, int64_t columns, int64_t first,
        int64_t keys) {
    KeyRows rows(p, s, x, kv_head);
    line_ = row_ = rows.run(first, keys);
    bytes_ = columns * element_bytes(rows.dtype());
    stride_ = x.token * element_bytes(rows.dtype());
    left_ = row_ ? keys : 0;
  }

  // False if nothing is left.
  bool fetch() {
    if (left_ == 0) return false;
    __builtin_prefetch(line_, 0, 2);
    line_ += 64;
    if (line_ >= row_ + bytes_) {
      line_ = row_ += stride_;
      --left_;
    }
    return true;
  }

 private:
  const char *line_ = nullptr, *row_ = nullptr;
  int64_t bytes_ = 0, stride_ = 0, left_ = 0;
};

struct KeysAhead {
  Ahead keys, values;
  void fetch() { keys.fetch() || values.fetch(); }
};

// Scores of `keys` keys become weights, as right operand. False if those of some row outgrow its reference. `keep`, if
// not nullptr, multiplies the weights, not their sum.
template <class Operands, class T = typename Operands::Sum>
inline bool weigh(int64_t keys, int64_t lanes, T exponent, const T* scores, const T* keep,
                  typename Operands::Operand* weights, PanelState<T>* state, KeysAhead* ahead) {
  constexpr int W = kWidth<T>;
  IntVec<T> outgrown{};
  for (int64_t n = 0; n < lanes; n += W) {
    const T* column = scores + n;
    const Vec<T> found = load<T>(state->reference + n);
    const Vec<T> reference = found == splat<T>(-kInfinity) ? Vec<T>{} : found;  // -inf - -inf would be NaN
    Vec<T> sum{}, other_sum{};
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      ahead->fetch();
      Vec<T> a = exp2<T, Operands::kExpTerms>((load<T>(column + j * kPanelRows) - reference) * exponent);
      Vec<T> b = exp2<T, Operands::kExpTerms>((load<T>(column + (j + 1) * kPanelRows) - reference) * exponent);
      sum += a;
      other_sum += b;
      if (keep) {
        a *= load<T>(keep + j * kPanelRows + n);
        b *= load<T>(keep + (j + 1) * kPanelRows + n);
      }
      Operands::store_right(weights, j, n, a, b);
    }
    if (j < keys) {
      Vec<T> a = exp2<T, Operands::kExpTerms>((load<T>(column + j * kPanelRows) - reference) * exponent);
      sum += a;
      if (keep) a *= load<T>(keep + j * kPanelRows + n);
      Operands::store_right(weights, j, n, a, Vec<T>{});
    }
    sum += other_sum;
    outgrown |= ~(sum <= splat<T>(T(kLimit)));
    store<T>(state->step + n, sum);
  }
  Operands::pad_right(weights, keys);
  return !any<T>(outgrown);
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

// out = O / l and lse = scale r + log l of the keys seen; rows that saw none give 0 and -inf.
template <class T>
inline void finish_panel(const Panel& panel, const PanelState<T>& state, const T* sums, T* rows, T* partial) {
  const AttentionParams& p = *panel.params;
  const int64_t width = row_width(p.v_head_dim);
  const T natural = static_cast<T>(score_scale(p).natural);
  transpose<T>(sums, kPanelRows, width, panel_lanes(panel), rows, width);
  for (int64_t r = 0; r < panel.rows; ++r) {
    const double total = state.total[r];
    const T inverse = total == 0 ? T(0) : static_cast<T>(1 / total);
    const double lse = total == 0 ? -kInfinity : static_cast<double>(state.reference[r]) * natural + ::log(total);
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

// Keys [from, to) of the block that starts at key `first`, for panel n.
template <class Operands>
inline void forward_block(const ForwardScratch<Operands>& scratch, int64_t n, const typename Operands::Operand* queries,
                          Left<typename Operands::Operand> keys, Left<typename Operands::Operand> values_across,
                          int64_t first, int64_t from, int64_t to, KeysAhead* ahead) {
  using T = typename Operands::Sum;
  const Panel& panel = scratch.panels[n];
  const AttentionParams& p = *panel.params;
  const T exponent = static_cast<T>(score_scale(p).natural * kLog2e);
  const int64_t lanes = panel_lanes(panel);
  auto* block_weights = Operands::weights(scratch.scores, scratch.weights);
  T* sums = scratch.sums + n * kPanelRows * row_width(p.v_head_dim);
  PanelState<T>* state = scratch.states + n;

  int64_t summed = from;  // keys that the sums have taken
  const auto sum_up = [&](int64_t until) {
    if (summed < until)
      Operands::across_times_weights(p.v_head_dim, lanes, until - summed, values_across, summed - first,
                                     block_weights + (summed - from) * kPanelRows, sums, true);
    summed = until;
  };
  for (int64_t key = from; key < to; key += Operands::kStep) {
    const int64_t count = smaller(Operands::kStep, to - key);
    T* scores = Operands::step_scores(scratch.scores, key - from);
    auto* weights = block_weights + (key - from) * kPanelRows;
    const auto score = [&] {
      Operands::left_times_panel(count, lanes, p.head_dim, keys, key - first, queries, scores);
      if (adjusts(p)) adjust<T>(panel, key, count, scores, nullptr);
      hide<T>(panel, key, count, scores);
    };
    score();
    if (scratch.keep) dropout_multipliers<T>(panel, key, count, scratch.keep);
    const auto move = [&] {
      sum_up(key);
      move_references<T>(count, lanes, exponent, scores, state, p.v_head_dim, sums);
    };
    const auto weigh_step = [&] {
      return weigh<Operands>(count, lanes, exponent, scores, scratch.keep, weights, state, ahead);
    };
    if (!has_references(lanes, *state)) move();
    if (!weigh_step()) {
      score();  // weights may have taken the place of scores
      move();
      weigh_step();
    }
    for (int64_t n = 0; n < lanes; n += kWidth<T>)
      store<T>(state->total + n, load<T>(state->total + n) + load<T>(state->step + n));
  }
  sum_up(to);
}

template <class Operands>
void forward_tile(const AttentionParams& p, const QueryTile& tile, char* memory) {
  using T = typename Operands::Sum;
  const int64_t group = p.q_heads / p.kv_heads;
  const int64_t first_row = tile.first_query * group, rows = tile.queries * group;
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  const ForwardScratch<Operands> scratch(p, panels, memory);
  [[maybe_unused]] const typename Operands::Registers registers;
  const T factor = static_cast<T>(score_scale(p).query);
  const int64_t query_stride = Operands::panel_size(p.head_dim), sum_stride = kPanelRows * row_width(p.v_head_dim);

  for (int64_t n = 0; n < panels; ++n) {
    scratch.panels[n] = make_panel(p, tile.sequence, tile.kv_head, group, first_row + n * kPanelRows,
                                   smaller(kPanelRows, rows - n * kPanelRows));
    restrict(tile.first_key, tile.last_key, &scratch.panels[n].range);
    const auto load_queries = [&](bool against_sinks, auto* right) {
      Operands::load_right(scratch.panels[n], p.q, p.head_dim, factor, p.rotated > 0, against_sinks, scratch.rows,
                           right + n * query_stride, scratch.staging);
    };
    load_queries(false, scratch.queries);
    if (p.frame > 0) load_queries(true, scratch.queries_of_sinks);
    std::memset(scratch.sums + n * sum_stride, 0, sum_stride * sizeof(T));
    for (int64_t r = 0; r < kPanelRows; ++r) {
      scratch.states[n].reference[r] = T(-kInfinity);
      scratch.states[n].total[r] = scratch.states[n].step[r] = T(0);
    }
  }

  const PanelRange all = union_range(scratch.panels, panels);
  for (int segment = 0; segment < 2; ++segment) {
    const bool sinks = segment == 0;
    const int64_t start = sinks ? all.sinks_start : all.start, stop = sinks ? all.sinks_stop : all.stop;
    const auto* queries = sinks ? scratch.queries_of_sinks : scratch.queries;
    for (int64_t first = start; first < stop; first += kKeyBlock) {
      const int64_t last = smaller(first + kKeyBlock, stop);
      const auto keys = Operands::load_left(p, tile.sequence, tile.kv_head, p.k, first, last - first, p.head_dim,
                                            turns_keys(p), scratch.keys, scratch.staging);
      const auto values = Operands::load_left(p, tile.sequence, tile.kv_head, p.v, first, last - first, p.v_head_dim,
                                              false, scratch.values, scratch.staging);
      const auto across = Operands::across(values, last - first, p.v_head_dim, scratch.values_across);
      KeysAhead ahead;
      const int64_t next = smaller(kKeyBlock, stop - last);
      if (next > 0)
        ahead = {{p, tile.sequence, p.k, tile.kv_head, p.head_dim, last, next},
                 {p, tile.sequence, p.v, tile.kv_head, p.v_head_dim, last, next}};
      for (int64_t n = 0; n < panels; ++n) {
        const PanelRange& range = scratch.panels[n].range;
        const int64_t from = larger(first, sinks ? range.sinks_start : range.start);
        const int64_t to = smaller(last, sinks ? range.sinks_stop : range.stop);
        if (from < to)
          forward_block<Operands>(scratch, n, queries + n * query_stride, keys, across, first, from, to, &ahead);
      }
    }
  }
  T* partial = reinterpret_cast<T*>(tile.partial);
  for (int64_t n = 0; n < panels; ++n)
    finish_panel<T>(scratch.panels[n], scratch.states[n], scratch.sums + n * sum_stride, scratch.rows,
                    partial ? partial + n * kPanelRows * (p.v_head_dim + 1) : nullptr);
}

}  // namespace
}  // namespace longattn
