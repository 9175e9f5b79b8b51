// From products q . k to scores: scale, softcap, slopes and bias in this order, then -inf for what a query must not
// see.
#pragma once

#include <cfloat>

#include "cpu/kernels/panel.h"

namespace longattn {
namespace {

constexpr double kLog2e = 1.4426950408889634074;

// How a call's products become exponents: products are those of `query` times q; weights are exp(natural * score).
// Plain calls leave the products as scores; others have `adjust` make scores in natural units.
struct ScoreScale {
  double query;    // keeps the factor that follows positive, whatever the sign of scale
  double score;    // from products to scores before the softcap
  double natural;  // from scores to natural units
};

inline bool adjusts(const AttentionParams& p) { return p.softcap > 0 || p.alibi_slopes || p.bias.data; }

inline ScoreScale score_scale(const AttentionParams& p) {
  const double size = p.scale < 0 ? -p.scale : p.scale;
  const bool none = size < (p.dtype == DType::kFloat64 ? DBL_MIN : FLT_MIN);  // 0, or would be in the accumulation type
  const double magnitude = none ? 1.0 : size, query = none ? 0.0 : p.scale < 0 ? -1.0 : 1.0;
  return adjusts(p) ? ScoreScale{query, magnitude, 1.0} : ScoreScale{query, 1.0, magnitude};
}

// tanh(x) = x + x^3 (...) near 0, where the quotient of exponentials would lose digits; else 1 - 2 / (exp(2 x) + 1).
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> magnitude = x < Vec<T>{} ? -x : x;
  const Vec<T> far = T(1) - T(2) / (exp2<T, kFullTerms<T>>(magnitude * T(2 * kLog2e)) + T(1));
  // Taylor, accurate to the last digit below the limit.
  constexpr double kTaylor[] = {-1.0 / 3,         2.0 / 15,          -17.0 / 315,           62.0 / 2835,
                                -1382.0 / 155925, 21844.0 / 6081075, -929569.0 / 638512875, 6404582.0 / 10854718875.0};
  const Vec<T> square = x * x;
  Vec<T> series = splat<T>(T(kTaylor[7]));
#pragma GCC unroll 8
  for (int i = 6; i >= 0; --i) series = series * square + T(kTaylor[i]);
  const Vec<T> near = x + x * square * series;
  const Vec<T> bent = x < Vec<T>{} ? -far : far;
  return magnitude < splat<T>(T(sizeof(T) == 8 ? 0.1 : 0.3)) ? near : bent;
}

template <class T>
inline T load_number(const char* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<T>(reinterpret_cast<const double*>(data)[index]);
    case DType::kFloat32:
      return static_cast<T>(reinterpret_cast<const float*>(data)[index]);
    case DType::kBool:
      return data[index] ? T(0) : T(-kInfinity);
    default: {
      float x;
      load_row(data + 2 * index, dtype, 1, &x);
      return static_cast<T>(x);
    }
  }
}

template <class T>
inline void store_number(char* data, DType dtype, int64_t index, T x) {
  if (dtype == DType::kFloat64) {
    reinterpret_cast<double*>(data)[index] = x;
  } else {
    const float rounded = static_cast<float>(x);
    store_row(&rounded, dtype, 1, data + index * element_bytes(dtype));
  }
}

inline int64_t bias_index(const Panel& panel, const Bias& bias, int64_t row, int64_t key) {
  return panel.sequence.index * bias.batch + locate(panel, row).head * bias.head + query_of(panel, row) * bias.query +
         key * bias.key;
}

// |p_i - j| needs places of queries relative to the first key, in lanes.
template <class T>
struct LaneSlopes {
  alignas(64) T slope[kPanelRows], place[kPanelRows];

  LaneSlopes(const Panel& panel, int64_t base) {
    const AttentionParams& p = *panel.params;
    for (int64_t r = 0; r < kPanelRows; ++r) {
      slope[r] = place[r] = T(0);
      if (r >= panel.rows) continue;
      slope[r] =
          reinterpret_cast<const T*>(p.alibi_slopes)[panel.sequence.index * p.slopes_batch + locate(panel, r).head];
      place[r] = static_cast<T>(position_of(p, panel.sequence, query_of(panel, r)) - base);
    }
  }
  Vec<T> distance(int lane, int64_t j) const {
    const Vec<T> d = load<T>(place + lane) - static_cast<T>(j);
    return d < Vec<T>{} ? -d : d;
  }
};

// Products of keys [base, base + keys) become scores; `capped`, if not nullptr, gets tanh(scores / softcap).
template <class T>
inline void adjust(const Panel& panel, int64_t base, int64_t keys, T* scores, T* capped) {
  constexpr int W = kWidth<T>;
  const AttentionParams& p = *panel.params;
  const T scale = static_cast<T>(score_scale(p).score), cap = static_cast<T>(p.softcap);
  for (int64_t i = 0; i < keys * kPanelRows; i += W) {
    Vec<T> score = load<T>(scores + i) * scale;
    if (p.softcap > 0) {
      const Vec<T> bent = tanh<T>(score / cap);
      if (capped) store<T>(capped + i, bent);
      score = bent * cap;
    }
    store<T>(scores + i, score);
  }
  if (p.alibi_slopes) {
    const LaneSlopes<T> slopes(panel, base);
    for (int64_t j = 0; j < keys; ++j)
      for (int n = 0; n < kPanelRows; n += W) {
        T* at = scores + j * kPanelRows + n;
        store<T>(at, load<T>(at) - load<T>(slopes.slope + n) * slopes.distance(n, j));
      }
  }
  if (p.bias.data)
    for (int64_t r = 0; r < panel.rows; ++r) {
      const int64_t first = bias_index(panel, p.bias, r, base);
      for (int64_t j = 0; j < keys; ++j)
        scores[j * kPanelRows + r] += load_number<T>(p.bias.data, p.bias.dtype, first + j * p.bias.key);
    }
}

// Scores of new keys become -inf where the tree hides them.
template <class T>
inline void hide_branches(const Panel& panel, int64_t base, int64_t keys, T* scores) {
  const AttentionParams& p = *panel.params;
  const Sequence& s = panel.sequence;
  for (int64_t j = larger(base, s.shift); j < base + keys; ++j)
    for (int64_t r = 0; r < panel.rows; ++r)
      if (!p.tree[s.index * p.tree_batch + query_of(panel, r) * p.nq + j - s.shift])
        scores[(j - base) * kPanelRows + r] = T(-kInfinity);
}

// Scores of keys [base, base + keys) become -inf where a query must not see the key.
template <class T>
inline void hide(const Panel& panel, int64_t base, int64_t keys, T* scores) {
  constexpr int W = kWidth<T>;
  const AttentionParams& p = *panel.params;
  if (p.tree) hide_branches<T>(panel, base, keys, scores);
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

}  // namespace
}  // namespace longattn
