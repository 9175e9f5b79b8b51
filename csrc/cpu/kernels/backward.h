// Backward: for each block of keys, over panels of queries,
//
//   S = K Q^T, dP = V dO^T                        [keys, 64]: queries in lanes
//   P = exp(min(a S - lse, 0))                    dS = P (dP - delta)
//   dV += P dO, dK += dS Q                        [keys, width]
//   dQ += dS^T K                                  [64, width], added in the order of key blocks: see Turn
//
// with delta_i = rowsum(dO_i O_i) - dLSE_i, and a S the scores in natural units (scores.h). The lse of huge scores, as
// those of a row that a mask of -1e30 hides all along, has no digits left for the number of keys: there each weight
// would be 1. So rows with a large lse are summed once more, and weights multiplied by 1 / sum.
#pragma once

#include "cpu/kernels/decode.h"

namespace longattn {
namespace {

template <class Operands>
struct BackwardScratch {
  using T = typename Operands::Sum;
  using Operand = typename Operands::Operand;
  Operand *keys, *values, *keys_across;  // left
  Operand *queries, *douts, *query_rows_right, *dout_rows_right;
  Operand *weights, *dscores_left, *dscores_right;
  T *dkeys, *dvalues;                                  // [keys][width]
  T *query_rows, *dout_rows, *dqueries, *dquery_rows;  // [64][width], dqueries [width][64]
  T *scores, *dscores, *keep, *capped, *bias_sums;     // [keys][64]; the latter three may be nullptr
  T* staging;
  int64_t bytes;

  BackwardScratch(const AttentionParams& p, char* base) {
    const int64_t key_width = row_width(p.head_dim), value_width = row_width(p.v_head_dim);
    Arena arena{base};
    keys = arena.take<Operand>(Operands::left_size(p.head_dim));
    values = arena.take<Operand>(Operands::left_size(p.v_head_dim));
    keys_across = arena.take<Operand>(Operands::across_size(p.head_dim));
    dkeys = arena.take<T>(kKeyRows * key_width);
    dvalues = arena.take<T>(kKeyRows * value_width);
    query_rows = arena.take<T>(kPanelRows * key_width);
    dout_rows = arena.take<T>(kPanelRows * value_width);
    queries = arena.take<Operand>(Operands::panel_size(p.head_dim));
    douts = arena.take<Operand>(Operands::panel_size(p.v_head_dim));
    query_rows_right = arena.take<Operand>(Operands::rows_size(p.head_dim));
    dout_rows_right = arena.take<Operand>(Operands::rows_size(p.v_head_dim));
    scores = arena.take<T>(kKeyRows * kPanelRows);
    dscores = arena.take<T>(kKeyRows * kPanelRows);
    weights = arena.take<Operand>(kKeyRows * kPanelRows);
    dscores_left = arena.take<Operand>(kKeyRows * kPanelRows);
    dscores_right = arena.take<Operand>(kKeyRows * kPanelRows);
    dqueries = arena.take<T>(kPanelRows * key_width);
    dquery_rows = arena.take<T>(kPanelRows * key_width);
    staging = arena.take<T>(kPanelRows * larger(key_width, value_width));
    keep = p.dropout_p > 0 ? arena.take<T>(kKeyRows * kPanelRows) : nullptr;
    capped = p.softcap > 0 ? arena.take<T>(kKeyRows * kPanelRows) : nullptr;
    bias_sums = p.dbias.data ? arena.take<T>(kKeyRows * kPanelRows) : nullptr;
    bytes = arena.used;
  }
};

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  constexpr int W = kWidth<T>;
  Vec<T> sums{};
  int64_t i = 0;
  for (; i + W <= n; i += W) sums += load<T>(a + i) * load<T>(b + i);
  T sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += sums[lane];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// A larger lse is off by more than 2^-14.
template <class T>
constexpr double kLargeLse = sizeof(T) == 8 ? 549755813888.0 : 1024.0;

template <class T>
inline bool is_large(T lse) {
  const T size = lse < T(0) ? -lse : lse;
  return size > T(kLargeLse<T>) && size != T(kInfinity);
}

template <class T>
bool delta_tile(const AttentionParams& p, const QueryTile& tile) {
  const int64_t group = p.q_heads / p.kv_heads;
  const Panel panel{&p, tile.sequence, tile.kv_head, group, tile.first_query * group, tile.queries * group, {}};
  T out[kMaxWidth], dout[kMaxWidth];
  bool large = false;
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Row row = locate(panel, r);
    load_row(row_address(p.out, p.dtype, tile.sequence.row, row.head, row.token), p.dtype, p.v_head_dim, out);
    load_row(row_address(p.dout, p.dtype, tile.sequence.row, row.head, row.token), p.dtype, p.v_head_dim, dout);
    const int64_t index = row_index(panel, row);
    T delta = dot(out, dout, p.v_head_dim);
    if (p.dlse) delta -= reinterpret_cast<const T*>(p.dlse)[index];
    *at<T>(p.delta, index) = delta;
    large |= is_large<T>(*at<T>(p.lse, index));
  }
  return large;
}

// Where each of 64 lanes stands in the softmax. Lanes that see nothing, or hold no row, have lse +inf, so that P is 0.
template <class T>
struct LaneSoftmax {
  alignas(64) T lse[kPanelRows];
  alignas(64) T delta[kPanelRows];
  alignas(64) T share[kPanelRows];
  bool shares = false;

  explicit LaneSoftmax(const Panel& panel) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      lse[r] = T(kInfinity);
      delta[r] = T(0);
      share[r] = T(1);
      if (r >= panel.rows) continue;
      const int64_t index = row_index(panel, locate(panel, r));
      const T found = *at<T>(panel.params->lse, index);
      if (found != T(-kInfinity)) lse[r] = found;
      delta[r] = *at<T>(panel.params->delta, index);
      if (panel.params->shares) share[r] = *at<T>(panel.params->shares, index);
      shares |= share[r] != T(1);
    }
  }
};

// From products and dP to P and dS: what the two derivatives of a block of scores share. `dscores` takes the gradient
// of the scores themselves, before the softcap's slope.
template <class Operands, class T = typename Operands::Sum>
inline void differentiate(const Panel& panel, int64_t base, int64_t keys, const BackwardScratch<Operands>& scratch) {
  constexpr int W = kWidth<T>;
  const AttentionParams& p = *panel.params;
  if (adjusts(p)) adjust<T>(panel, base, keys, scratch.scores, scratch.capped);
  hide<T>(panel, base, keys, scratch.scores);
  if (scratch.keep) dropout_multipliers<T>(panel, base, keys, scratch.keep);
  const LaneSoftmax<T> lanes(panel);
  const T natural = static_cast<T>(score_scale(p).natural);
  for (int64_t j = 0; j < keys; ++j)
    for (int n = 0; n < kPanelRows; n += W) {
      const int64_t at = j * kPanelRows + n;
      const Vec<T> log = minimum<T>(Vec<T>{}, load<T>(scratch.scores + at) * natural - load<T>(lanes.lse + n));
      const Vec<T> weight = exp2<T, Operands::kExpTerms>(log * T(kLog2e));
      Vec<T> dweight = load<T>(scratch.dscores + at);
      if (scratch.keep) dweight *= load<T>(scratch.keep + at);
      const Vec<T> dscore = weight * (dweight - load<T>(lanes.delta + n));
      store<T>(scratch.scores + at, weight);
      store<T>(scratch.dscores + at, weight == Vec<T>{} ? Vec<T>{} : dscore);  // 0 times NaN or inf is no gradient
    }
  if (!lanes.shares) return;
  for (int64_t j = 0; j < keys; ++j)
    for (int n = 0; n < kPanelRows; n += W) {
      const int64_t at = j * kPanelRows + n;
      store<T>(scratch.scores + at, load<T>(scratch.scores + at) * load<T>(lanes.share + n));
      store<T>(scratch.dscores + at, load<T>(scratch.dscores + at) * load<T>(lanes.share + n));
    }
}

// P and dS as operands, with what dropout and the softcap multiply them by.
template <class Operands, class T = typename Operands::Sum>
inline void store_operands(int64_t keys, const BackwardScratch<Operands>& scratch, typename Operands::Operand* weights,
                           typename Operands::Operand* dscores_left, typename Operands::Operand* dscores_right) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < keys; j += 2)
    for (int n = 0; n < kPanelRows; n += W) {
      Vec<T> dscore[2] = {};
      for (int64_t i = 0; i < 2 && j + i < keys; ++i) {
        const int64_t at = (j + i) * kPanelRows + n;
        Vec<T> weight = load<T>(scratch.scores + at);
        dscore[i] = load<T>(scratch.dscores + at);
        if (scratch.keep) weight *= load<T>(scratch.keep + at);
        if (scratch.capped) dscore[i] *= T(1) - load<T>(scratch.capped + at) * load<T>(scratch.capped + at);
        Operands::store_left(weights, j + i, n, weight);
        Operands::store_left(dscores_left, j + i, n, dscore[i]);
      }
      Operands::store_right(dscores_right, j, n, dscore[0], dscore[1]);
    }
  Operands::pad_left(weights, keys);
  Operands::pad_left(dscores_left, keys);
  Operands::pad_right(dscores_right, keys);
}

// The sum over keys of dS |p_i - j|, for each lane.
template <class T>
inline void slope_gradient(const Panel& panel, int64_t base, int64_t keys, const T* dscores, T* sums) {
  constexpr int W = kWidth<T>;
  const LaneSlopes<T> slopes(panel, base);
  for (int n = 0; n < kPanelRows; n += W) {
    Vec<T> sum{};
    for (int64_t j = 0; j < keys; ++j) sum += load<T>(dscores + j * kPanelRows + n) * slopes.distance(n, j);
    store<T>(sums + n, sum);
  }
}

// Queries that can see one of the keys [first, last): [from, to).
inline void queries_of_keys(const AttentionParams& p, const Sequence& s, int64_t first, int64_t last, int64_t* from,
                            int64_t* to) {
  *from = p.right < 0 ? 0 : larger(0, first - p.right - s.shift);
  *to = p.left < 0 || first < p.sinks ? s.lq : smaller(s.lq, last + p.left - s.shift);
}

// sum += factor * part, for each row of a panel of dq.
template <class T>
inline void add_dq(const Panel& panel, T factor, const T* part) {
  const AttentionParams& p = *panel.params;
  const int64_t width = row_width(p.head_dim);
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Row row = locate(panel, r);
    T* sum = reinterpret_cast<T*>(p.dq_sum.data) + panel.sequence.row * p.dq_sum.batch + row.head * p.dq_sum.head +
             row.token * p.dq_sum.token;
    for (int64_t c = 0; c < p.head_dim; ++c) sum[c] += factor * part[r * width + c];
  }
}

// The keys of [first, last) that a panel sees: [from, to), from its sinks on. False if none.
inline bool keys_in_block(const PanelRange& range, int64_t first, int64_t last, int64_t* from, int64_t* to) {
  *from = larger(first, range.start);
  *to = smaller(last, range.stop);
  const int64_t sinks_from = larger(first, range.sinks_start), sinks_to = smaller(last, range.sinks_stop);
  if (sinks_from < sinks_to) {
    *to = *from < *to ? larger(*to, sinks_to) : sinks_to;
    *from = smaller(*from, sinks_from);
  }
  return *from < *to;
}

// Q and dO of a panel: as rows, and transposed as right operands.
template <class Operands, class T = typename Operands::Sum>
inline void load_queries_and_gradients(const Panel& panel, const BackwardScratch<Operands>& scratch) {
  const AttentionParams& p = *panel.params;
  load_panel<T>(panel, p.q, p.head_dim, row_width(p.head_dim), static_cast<T>(score_scale(p).query), turns_queries(p),
                scratch.query_rows);
  load_panel<T>(panel, p.dout, p.v_head_dim, row_width(p.v_head_dim), T(1), false, scratch.dout_rows);
  Operands::right_of_transposed_rows(scratch.query_rows, p.head_dim, scratch.queries, scratch.staging);
  Operands::right_of_transposed_rows(scratch.dout_rows, p.v_head_dim, scratch.douts, scratch.staging);
}

// S of keys that lie in a left operand from row `skip` on, with the rounding that the forward's had.
template <class Operands, class T = typename Operands::Sum>
inline void score_panel(const Panel& panel, int64_t keys, Left<typename Operands::Operand> left, int64_t skip,
                        const BackwardScratch<Operands>& scratch) {
  const int64_t columns = panel.params->head_dim, few = Operands::kPlain ? first_of_few(panel) : panel.rows;
  if (few > 0)
    Operands::left_times_panel(keys, kPanelRows, columns, left, skip, scratch.queries, scratch.scores);
  else
    std::memset(scratch.scores, 0, keys * kPanelRows * sizeof(T));
  if constexpr (Operands::kPlain)
    if (few < panel.rows)
      few_dot_products<T>(panel, few, keys, left.rows + skip * left.stride, left.stride, scratch.query_rows,
                          row_width(columns), scratch.scores);
}

// 1 / sum P of the rows whose lse is large. A sum below 1 is left: of a block of an attention it is less.
template <class Operands>
void shares_tile(const AttentionParams& p, const QueryTile& tile, char* memory) {
  using T = typename Operands::Sum;
  constexpr int W = kWidth<T>;
  const Sequence& s = tile.sequence;
  const BackwardScratch<Operands> scratch(p, memory);
  [[maybe_unused]] const typename Operands::Registers registers;
  const int64_t group = p.q_heads / p.kv_heads, rows = tile.queries * group;
  const T natural = static_cast<T>(score_scale(p).natural);
  for (int64_t start = 0; start < rows; start += kPanelRows) {
    const Panel panel =
        make_panel(p, s, tile.kv_head, group, tile.first_query * group + start, smaller(kPanelRows, rows - start));
    alignas(64) T lse[kPanelRows], total[kPanelRows] = {};
    bool large = false;
    for (int64_t r = 0; r < kPanelRows; ++r) {
      lse[r] = T(kInfinity);
      if (r >= panel.rows) continue;
      const int64_t index = row_index(panel, locate(panel, r));
      *at<T>(p.shares, index) = T(1);
      if (!is_large<T>(*at<T>(p.lse, index))) continue;
      lse[r] = *at<T>(p.lse, index);
      large = true;
    }
    if (!large) continue;
    load_panel<T>(panel, p.q, p.head_dim, row_width(p.head_dim), static_cast<T>(score_scale(p).query), turns_queries(p),
                  scratch.query_rows);
    Operands::right_of_transposed_rows(scratch.query_rows, p.head_dim, scratch.queries, scratch.staging);
    const PanelRange& range = panel.range;
    for (int segment = 0; segment < 2; ++segment) {
      const int64_t first_key = segment == 0 ? range.sinks_start : range.start;
      const int64_t last_key = segment == 0 ? range.sinks_stop : range.stop;
      for (int64_t first = first_key; first < last_key; first += kKeyBlock) {
        const int64_t keys = smaller(kKeyBlock, last_key - first);
        const auto left = Operands::load_left(p, s, tile.kv_head, p.k, first, keys, p.head_dim, turns_keys(p),
                                              scratch.keys, scratch.staging);
        score_panel<Operands>(panel, keys, left, 0, scratch);
        if (adjusts(p)) adjust<T>(panel, first, keys, scratch.scores, nullptr);
        hide<T>(panel, first, keys, scratch.scores);
        for (int64_t j = 0; j < keys; ++j)
          for (int n = 0; n < kPanelRows; n += W) {
            const Vec<T> score = load<T>(scratch.scores + j * kPanelRows + n) * natural;
            const Vec<T> log = minimum<T>(Vec<T>{}, score - load<T>(lse + n));
            store<T>(total + n, load<T>(total + n) + exp2<T, Operands::kExpTerms>(log * T(kLog2e)));
          }
      }
    }
    for (int64_t r = 0; r < panel.rows; ++r) {
      if (lse[r] == T(kInfinity)) continue;
      const Row row = locate(panel, r);
      if (p.sink_logits) {
        const T log = reinterpret_cast<const T*>(p.sink_logits)[row.head] - lse[r];
        total[r] += static_cast<T>(::exp(static_cast<double>(log < T(0) ? log : T(0))));
      }
      if (total[r] > T(1)) *at<T>(p.shares, row_index(panel, row)) = T(1) / total[r];
    }
  }
}

template <class Operands>
void backward_tile(const AttentionParams& p, const KeyTile& tile, const Turn& turn, char* memory) {
  using T = typename Operands::Sum;
  const Sequence& s = tile.sequence;
  const BackwardScratch<Operands> scratch(p, memory);
  [[maybe_unused]] const typename Operands::Registers registers;
  const int64_t key_width = row_width(p.head_dim), value_width = row_width(p.v_head_dim);
  const int64_t group = p.q_heads / p.kv_heads, rows = s.lq * group;
  const int64_t first = tile.first_key, last = tile.first_key + tile.keys;

  const auto block_keys = Operands::load_left(p, s, tile.kv_head, p.k, first, tile.keys, p.head_dim, turns_keys(p),
                                              scratch.keys, scratch.staging);
  const auto block_values = Operands::load_left(p, s, tile.kv_head, p.v, first, tile.keys, p.v_head_dim, false,
                                                scratch.values, scratch.staging);
  const auto keys_across = Operands::across(block_keys, tile.keys, p.head_dim, scratch.keys_across);
  std::memset(scratch.dkeys, 0, tile.keys * key_width * sizeof(T));
  std::memset(scratch.dvalues, 0, tile.keys * value_width * sizeof(T));
  // In place where an operand is a matrix of the accumulation type.
  auto* weights = Operands::weights(scratch.scores, scratch.weights);
  auto* dscores_left = Operands::weights(scratch.dscores, scratch.dscores_left);
  auto* dscores_right = Operands::weights(scratch.dscores, scratch.dscores_right);

  int64_t from_query, to_query;
  queries_of_keys(p, s, first, last, &from_query, &to_query);
  for (int64_t n = from_query * group / kPanelRows; n * kPanelRows < to_query * group; ++n) {
    const Panel panel =
        make_panel(p, s, tile.kv_head, group, n * kPanelRows, smaller(kPanelRows, rows - n * kPanelRows));
    int64_t from, to;
    if (!keys_in_block(panel.range, first, last, &from, &to)) continue;
    const int64_t keys = to - from, skip = from - first;
    load_queries_and_gradients<Operands>(panel, scratch);
    score_panel<Operands>(panel, keys, block_keys, skip, scratch);
    Operands::left_times_panel(keys, kPanelRows, p.v_head_dim, block_values, skip, scratch.douts, scratch.dscores);
    differentiate<Operands>(panel, from, keys, scratch);
    alignas(64) T dslopes[kPanelRows] = {};
    if (p.dslope_rows) slope_gradient<T>(panel, from, keys, scratch.dscores, dslopes);
    store_operands<Operands>(keys, scratch, weights, dscores_left, dscores_right);
    if (p.dv.data) {
      const auto* douts = Operands::right_of_rows(scratch.dout_rows, p.v_head_dim, scratch.dout_rows_right);
      Operands::add_weights_times_rows(keys, p.v_head_dim, weights, douts, scratch.dvalues + skip * value_width);
    }
    if (p.dk.data) {
      const auto* queries = Operands::right_of_rows(scratch.query_rows, p.head_dim, scratch.query_rows_right);
      Operands::add_weights_times_rows(keys, p.head_dim, dscores_left, queries, scratch.dkeys + skip * key_width);
    }
    if (p.dq.data) {
      Operands::across_times_weights(p.head_dim, kPanelRows, keys, keys_across, skip, dscores_right, scratch.dqueries,
                                     false);
      transpose<T>(scratch.dqueries, kPanelRows, key_width, kPanelRows, scratch.dquery_rows, key_width);
    }
    if (p.dq.data || p.dslope_rows) {
      turn.wait(turn.state, n);
      if (p.dq.data) add_dq<T>(panel, static_cast<T>(p.scale), scratch.dquery_rows);
      if (p.dslope_rows)
        for (int64_t r = 0; r < panel.rows; ++r)
          *at<T>(p.dslope_rows, row_index(panel, locate(panel, r))) -= dslopes[r];
      turn.pass(turn.state, n);
    }
  }

  const T factor = static_cast<T>(p.scale < 0 ? -p.scale : p.scale);  // the sign is in the rows of q
  for (int64_t j = 0; j < tile.keys; ++j) {
    const int64_t token = s.k_start + first + j;
    if (p.dk.data) {
      T* row = scratch.dkeys + j * key_width;
      for (int64_t c = 0; c < p.head_dim; ++c) row[c] *= factor;
      if (p.rotated) rotate_row(row, p.rotated, p.k_angles, s.index, token, p.interleaved, true);
      store_row(row, p.dtype, p.head_dim, row_address(p.dk, p.dtype, s.row, tile.kv_head, token));
    }
    if (p.dv.data)
      store_row(scratch.dvalues + j * value_width, p.dtype, p.v_head_dim,
                row_address(p.dv, p.dtype, s.row, tile.kv_head, token));
  }
}

// The gradient of one tile of bias: dS summed over all sequences, heads, queries and keys that read it.
template <class Operands>
void bias_tile(const AttentionParams& p, const BiasTile& tile, char* memory) {
  using T = typename Operands::Sum;
  const BackwardScratch<Operands> scratch(p, memory);
  [[maybe_unused]] const typename Operands::Registers registers;
  const Bias& bias = p.dbias;
  const int64_t group = p.q_heads / p.kv_heads;
  T* sums = scratch.bias_sums;
  for (int64_t first_key = tile.first_key; first_key < tile.last_key; first_key += kKeyBlock)
    for (int64_t first_query = tile.first_query; first_query < tile.last_query; first_query += kPanelRows) {
      const int64_t all_keys = smaller(kKeyBlock, tile.last_key - first_key);
      const int64_t queries = smaller(kPanelRows, tile.last_query - first_query);
      std::memset(sums, 0, kKeyBlock * kPanelRows * sizeof(T));
      for (int64_t b = tile.first_batch; b < tile.last_batch; ++b)
        for (int64_t head = tile.first_head; head < tile.last_head; ++head) {
          const Sequence s = sequence(p, b);
          const Panel panel = make_panel(p, s, head, 1, first_query, queries);
          int64_t from, to;
          if (!keys_in_block(panel.range, first_key, first_key + all_keys, &from, &to)) continue;
          const int64_t keys = to - from;
          load_queries_and_gradients<Operands>(panel, scratch);
          const auto left_keys = Operands::load_left(p, s, head / group, p.k, from, keys, p.head_dim, turns_keys(p),
                                                     scratch.keys, scratch.staging);
          const auto left_values = Operands::load_left(p, s, head / group, p.v, from, keys, p.v_head_dim, false,
                                                       scratch.values, scratch.staging);
          score_panel<Operands>(panel, keys, left_keys, 0, scratch);
          Operands::left_times_panel(keys, kPanelRows, p.v_head_dim, left_values, 0, scratch.douts, scratch.dscores);
          differentiate<Operands>(panel, from, keys, scratch);
          T* to_sums = sums + (from - first_key) * kPanelRows;
          for (int64_t i = 0; i < keys * kPanelRows; i += kWidth<T>)
            store<T>(to_sums + i, load<T>(to_sums + i) + load<T>(scratch.dscores + i));
        }
      const int64_t at =
          tile.first_batch * bias.batch + tile.first_head * bias.head + first_query * bias.query + first_key * bias.key;
      for (int64_t j = 0; j < all_keys; ++j)
        for (int64_t r = 0; r < queries; ++r)
          reinterpret_cast<T*>(bias.data)[at + r * bias.query + j * bias.key] += sums[j * kPanelRows + r];
    }
}

template <class T>
void finish_tile(const AttentionParams& p, const QueryTile& tile, char* memory) {
  const int64_t group = p.q_heads / p.kv_heads;
  const Panel panel{&p, tile.sequence, tile.kv_head, group, tile.first_query * group, tile.queries * group, {}};
  T* values = reinterpret_cast<T*>(memory);
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Row row = locate(panel, r);
    const T* sum = reinterpret_cast<const T*>(p.dq_sum.data) + tile.sequence.row * p.dq_sum.batch +
                   row.head * p.dq_sum.head + row.token * p.dq_sum.token;
    std::memcpy(values, sum, p.head_dim * sizeof(T));
    if (p.rotated) rotate_row(values, p.rotated, p.q_angles, tile.sequence.index, row.token, p.interleaved, true);
    store_row(values, p.dtype, p.head_dim, row_address(p.dq, p.dtype, tile.sequence.row, row.head, row.token));
  }
}

}  // namespace
}  // namespace longattn
