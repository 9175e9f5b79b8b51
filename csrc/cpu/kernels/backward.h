// Backward: for each block of keys, over panels of queries,
//
//   S = K Q^T, dP = V dO^T                        [keys, 64]: queries in lanes
//   P = exp2(c S - lse log2 e)                    dS = P (dP - delta)
//   dV += P dO, dK += dS Q                        [keys, width]
//   dQ += dS^T K                                  [64, width], added in the order of key blocks: see Turn
//
// with delta_i = rowsum(dO_i O_i) - dLSE_i.
#pragma once

#include "cpu/kernels/forward.h"

namespace longattn {
namespace {

template <class T>
struct BackwardScratch {
  T *keys, *values, *dkeys, *dvalues;         // [128][width]
  T *query_rows, *dout_rows, *dquery_rows;    // [64][width]
  T *queries, *douts;                         // [width][64]
  T *weights, *dscores;                       // [128][64]
  int64_t key_width, value_width, bytes;

  BackwardScratch(const AttentionParams& p, char* base) {
    Arena arena{base};
    key_width = round_up(p.head_dim, 16);
    value_width = round_up(p.v_head_dim, 16);
    keys = arena.take<T>(kKeyBlock * key_width);
    values = arena.take<T>(kKeyBlock * value_width);
    dkeys = arena.take<T>(kKeyBlock * key_width);
    dvalues = arena.take<T>(kKeyBlock * value_width);
    query_rows = arena.take<T>(kPanelRows * key_width);
    dout_rows = arena.take<T>(kPanelRows * value_width);
    dquery_rows = arena.take<T>(kPanelRows * key_width);
    queries = arena.take<T>(kPanelRows * key_width);
    douts = arena.take<T>(kPanelRows * value_width);
    weights = arena.take<T>(kKeyBlock * kPanelRows);
    dscores = arena.take<T>(kKeyBlock * kPanelRows);
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

template <class T>
void delta_tile(const AttentionParams& p, const QueryTile& tile) {
  const int64_t group = p.q_heads / p.kv_heads;
  const Panel panel{&p, tile.sequence, tile.kv_head, group, tile.first_query * group, tile.queries * group, {}};
  T out[kMaxWidth], dout[kMaxWidth];
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Row row = locate(panel, r);
    load_row(row_address(p.out, p.dtype, tile.sequence.row, row.head, row.token), p.dtype, p.v_head_dim, out);
    load_row(row_address(p.dout, p.dtype, tile.sequence.row, row.head, row.token), p.dtype, p.v_head_dim, dout);
    const int64_t index = row_index(panel, row);
    T delta = dot(out, dout, p.v_head_dim);
    if (p.dlse) delta -= reinterpret_cast<const T*>(p.dlse)[index];
    *at<T>(p.delta, index) = delta;
  }
}

// P in place of the scores, dS in place of dP. Lanes that see nothing, or hold no row, have lse +inf here, so P is 0.
template <class T>
inline void weigh(const Panel& panel, int64_t base, int64_t keys, T exponent, T* scores, T* dscores) {
  constexpr int W = kWidth<T>;
  constexpr int kVectors = kPanelRows / W;
  const AttentionParams& p = *panel.params;
  alignas(64) T reference[kPanelRows], delta[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r) {
    reference[r] = T(kInfinity);
    delta[r] = T(0);
    if (r >= panel.rows) continue;
    const int64_t index = row_index(panel, locate(panel, r));
    const T lse = *at<T>(p.lse, index);
    if (lse != T(-kInfinity)) reference[r] = static_cast<T>(lse * kLog2e);
    delta[r] = *at<T>(p.delta, index);
  }
  const bool* visible = p.key_mask ? p.key_mask + panel.sequence.index * p.nk + base : nullptr;
  const int64_t full_start = panel.range.full_start - base, full_stop = panel.range.full_stop - base;
  LaneLimits<T> limits;
  if (full_start > 0 || full_stop < keys) lane_limits<T>(panel, base, keys, &limits);
  for (int64_t j = 0; j < keys; ++j) {
    T* row = scores + j * kPanelRows;
    T* drow = dscores + j * kPanelRows;
    if (visible && !visible[j]) {
      std::memset(row, 0, kPanelRows * sizeof(T));
      std::memset(drow, 0, kPanelRows * sizeof(T));
      continue;
    }
    const bool partial = j < full_start || j >= full_stop;
    const bool sink = base + j < p.sinks;
    for (int n = 0; n < kVectors; ++n) {
      Vec<T> weight = exp2<T>(load<T>(row + n * W) * exponent - load<T>(reference + n * W));
      if (partial) weight = sees<T>(limits, n * W, static_cast<Int<T>>(j), sink) ? weight : Vec<T>{};
      const Vec<T> dscore = weight * (load<T>(drow + n * W) - load<T>(delta + n * W));
      store<T>(row + n * W, weight);
      store<T>(drow + n * W, weight == Vec<T>{} ? Vec<T>{} : dscore);  // 0 times NaN or inf is no gradient
    }
  }
}

// Queries that can see one of the keys [first, last): [from, to).
inline void queries_of_keys(const AttentionParams& p, const Sequence& s, int64_t first, int64_t last, int64_t* from,
                            int64_t* to) {
  *from = p.right < 0 ? 0 : larger(0, first - p.right - s.shift);
  *to = p.left < 0 || first < p.sinks ? s.lq : smaller(s.lq, last + p.left - s.shift);
}

template <class T>
void backward_tile(const AttentionParams& p, const KeyTile& tile, const Turn& turn, char* memory) {
  const Sequence& s = tile.sequence;
  const BackwardScratch<T> scratch(p, memory);
  const int64_t kw = scratch.key_width, vw = scratch.value_width;
  const ScoreScale scale = score_scale(p);
  const T exponent = static_cast<T>(scale.exponent);
  const int64_t group = p.q_heads / p.kv_heads, rows = s.lq * group;
  const int64_t first = tile.first_key, last = tile.first_key + tile.keys;
  const bool rotated = p.rotated > 0;

  load_keys<T>(p, s, tile.kv_head, p.k, first, tile.keys, p.head_dim, kw, rotated, scratch.keys);
  load_keys<T>(p, s, tile.kv_head, p.v, first, tile.keys, p.v_head_dim, vw, false, scratch.values);
  std::memset(scratch.dkeys, 0, tile.keys * kw * sizeof(T));
  std::memset(scratch.dvalues, 0, tile.keys * vw * sizeof(T));

  int64_t from_query, to_query;
  queries_of_keys(p, s, first, last, &from_query, &to_query);
  for (int64_t n = from_query * group / kPanelRows; n * kPanelRows < to_query * group; ++n) {
    const Panel panel = make_panel(p, s, tile.kv_head, n * kPanelRows, smaller(kPanelRows, rows - n * kPanelRows));
    const PanelRange& range = panel.range;
    int64_t from = larger(first, range.start), to = smaller(last, range.stop);
    const int64_t sinks_from = larger(first, range.sinks_start), sinks_to = smaller(last, range.sinks_stop);
    if (sinks_from < sinks_to) {
      to = from < to ? larger(to, sinks_to) : sinks_to;
      from = smaller(from, sinks_from);
    }
    if (from >= to) continue;
    const int64_t keys = to - from, skip = from - first;

    load_panel<T>(panel, p.q, p.head_dim, kw, static_cast<T>(scale.query), rotated, scratch.query_rows);
    load_panel<T>(panel, p.dout, p.v_head_dim, vw, T(1), false, scratch.dout_rows);
    transpose<T>(scratch.query_rows, kw, kPanelRows, kw, scratch.queries, kPanelRows);
    transpose<T>(scratch.dout_rows, vw, kPanelRows, vw, scratch.douts, kPanelRows);
    product<T, Order::kRowMajor>(keys, kPanelRows, p.head_dim, scratch.keys + skip * kw, kw, scratch.queries,
                                 kPanelRows, scratch.weights, kPanelRows, {Start<T>::kZero, nullptr});
    product<T, Order::kRowMajor>(keys, kPanelRows, p.v_head_dim, scratch.values + skip * vw, vw, scratch.douts,
                                 kPanelRows, scratch.dscores, kPanelRows, {Start<T>::kZero, nullptr});
    weigh<T>(panel, from, keys, exponent, scratch.weights, scratch.dscores);
    if (p.dv.data)
      product<T, Order::kRowMajor>(keys, vw, kPanelRows, scratch.weights, kPanelRows, scratch.dout_rows, vw,
                                   scratch.dvalues + skip * vw, vw, {Start<T>::kAdd, nullptr});
    if (p.dk.data)
      product<T, Order::kRowMajor>(keys, kw, kPanelRows, scratch.dscores, kPanelRows, scratch.query_rows, kw,
                                   scratch.dkeys + skip * kw, kw, {Start<T>::kAdd, nullptr});
    if (p.dq.data) {
      product<T, Order::kColumnMajor>(kPanelRows, kw, keys, scratch.dscores, kPanelRows, scratch.keys + skip * kw, kw,
                                      scratch.dquery_rows, kw, {Start<T>::kZero, nullptr});
      turn.wait(turn.state, n);
      const T factor = static_cast<T>(p.scale);
      for (int64_t r = 0; r < panel.rows; ++r) {
        const Row row = locate(panel, r);
        T* sum = reinterpret_cast<T*>(p.dq_sum.data) + s.row * p.dq_sum.batch + row.head * p.dq_sum.head +
                 row.token * p.dq_sum.token;
        const T* part = scratch.dquery_rows + r * kw;
        for (int64_t c = 0; c < p.head_dim; ++c) sum[c] += factor * part[c];
      }
      turn.pass(turn.state, n);
    }
  }

  const T factor = static_cast<T>(p.scale < 0 ? -p.scale : p.scale);  // the sign is in the rows of q
  for (int64_t j = 0; j < tile.keys; ++j) {
    const int64_t token = s.k_start + first + j;
    if (p.dk.data) {
      T* row = scratch.dkeys + j * kw;
      for (int64_t c = 0; c < p.head_dim; ++c) row[c] *= factor;
      if (rotated) rotate_row(row, p.rotated, p.k_angles, s.index, token, p.interleaved, true);
      store_row(row, p.dtype, p.head_dim, row_address(p.dk, p.dtype, s.row, tile.kv_head, token));
    }
    if (p.dv.data)
      store_row(scratch.dvalues + j * vw, p.dtype, p.v_head_dim,
                row_address(p.dv, p.dtype, s.row, tile.kv_head, token));
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
