// Attention, its gradients and their error bounds by the formulas of docs/semantics.md, in double precision.
//
// A result may stand from the exact one by the rounding of its terms before they cancel, as tests/oracle.py derives it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "calls.h"
#include "tensor.h"

namespace longattn::test {

// A sum, and that of the absolute values of its terms, be they the terms themselves or what rounding may do to them.
struct Sum {
  double value = 0, terms = 0;
  void add(double x, double term) {
    value += x;
    terms += std::fabs(term);
  }
};

// What a result should be, and how far from it each entry may stand: its terms and `least`. NaN is what nobody writes.
struct Exact {
  Exact() = default;
  Exact(const Shape& extent, double start, double least_)
      : shape(extent), sums(extent.size(), {start, 0}), least(least_) {}
  Sum* row(int64_t b, int64_t h, int64_t i) { return sums.data() + shape.at(b, h, i, 0); }

  Shape shape;
  std::vector<Sum> sums;
  double least = 0;
};

// Rounding units, relative: twice what one rounding may change.
struct Units {
  double storage, accumulation, exponential;
  double smallest_weight;  // below it weights are 0
  double least;            // half the smallest number of storage

  explicit Units(DType dtype) {
    const double double_unit = 0x1p-40;  // above the rounding of the formulas themselves
    accumulation = dtype == DType::kFloat64 ? double_unit : 0x1p-23;
    storage = dtype == DType::kBFloat16 ? 0x1p-7 : dtype == DType::kFloat16 ? 0x1p-10 : accumulation;
    exponential = std::max(accumulation, std::min(storage, 0x1p-16));
    smallest_weight = dtype == DType::kFloat64 ? 0x1p-1022 : 0x1p-126;
    least = dtype == DType::kFloat16 ? 0x1p-25 : 0;
  }
};

// Turns the pairs of a row by the angles of its token; the transpose if `back`.
inline void turn(Sum* row, int64_t rotated, bool interleaved, const Tensor& cos, const Tensor& sin, int64_t batch,
                 int64_t token, bool back) {
  for (int64_t n = 0; n < rotated / 2; ++n) {
    const int64_t b = cos.shape.batch > 1 ? batch : 0;
    const double c = cos.get(b, 0, token, n), s = back ? -sin.get(b, 0, token, n) : sin.get(b, 0, token, n);
    Sum& first = row[interleaved ? 2 * n : n];
    Sum& second = row[interleaved ? 2 * n + 1 : n + rotated / 2];
    const Sum x = first, y = second;
    first = {x.value * c - y.value * s, x.terms * std::fabs(c) + y.terms * std::fabs(s)};
    second = {x.value * s + y.value * c, x.terms * std::fabs(s) + y.terms * std::fabs(c)};
  }
}

inline std::vector<Sum> row_of(const Tensor& x, int64_t b, int64_t h, int64_t i) {
  std::vector<Sum> row(x.shape.width);
  for (int64_t c = 0; c < x.shape.width; ++c) row[c].add(x.get(b, h, i, c), x.get(b, h, i, c));
  return row;
}

inline Sum dot(const std::vector<Sum>& a, const std::vector<Sum>& b) {
  Sum sum;
  for (size_t n = 0; n < a.size(); ++n) {
    sum.value += a[n].value * b[n].value;
    sum.terms += a[n].terms * b[n].terms;
  }
  return sum;
}

// Philox4x32-10: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
inline uint32_t philox(uint64_t seed, std::array<uint32_t, 4> counter, int64_t word) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t{0xD2511F53} * counter[0], y = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(y >> 32) ^ counter[1] ^ low, static_cast<uint32_t>(y),
               static_cast<uint32_t>(x >> 32) ^ counter[3] ^ high, static_cast<uint32_t>(x)};
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
  return counter[word];
}

struct Results {
  Exact out, lse, delta, dq, dk, dv, dbias, dslope_rows;
};

class Formulas {
 public:
  explicit Formulas(const Call& call) : call_(call), p_(call.p), units_(p_.dtype) {
    // Products of bfloat16 numbers are exact, but rotated rows are rounded to bfloat16 again.
    score_unit_ = p_.rotated && p_.dtype == DType::kBFloat16 ? units_.storage : units_.accumulation;
    const Shape of_queries{call.memory_rows(), p_.q_heads, p_.nq, 1};
    const bool dq_is_a_sum = p_.dtype == accumulation_type(p_.dtype);  // which its caller sets to 0
    results_.out = Exact(call.dout.shape, kNan, units_.least);
    results_.lse = results_.delta = Exact(of_queries, kNan, 0);
    results_.dq = Exact(call.q.shape, dq_is_a_sum ? 0 : kNan, units_.least);
    results_.dk = Exact(call.k.shape, kNan, units_.least);
    results_.dv = Exact(call.v.shape, kNan, units_.least);
    results_.dbias = Exact(call.bias.shape, 0, 0);
    results_.dslope_rows = Exact(of_queries, 0, 0);
    for (int64_t b = 0; b < p_.batch; ++b) add_sequence(b);
  }
  const Results& results() const { return results_; }

 private:
  struct Sequence {
    int64_t index, row, q_start, lq, k_start, lk, shift;
  };

  // A head of the keys and values of a sequence, and the gradients of both.
  struct Keys {
    std::vector<std::vector<Sum>> k, v, dk, dv;
  };

  struct Entry {
    int64_t key;
    Sum score;
    double slope = 1;  // of the softcap
    double weight = 0;
    double keep = 1;  // of dropout
  };

  Sequence sequence(int64_t b) const {
    Sequence s{b, b, 0, p_.nq, 0, p_.nk, p_.offsets ? p_.offsets[b] : p_.offset};
    if (p_.cu_seqlens_q) {
      const int32_t *q = p_.cu_seqlens_q + b, *k = p_.cu_seqlens_k + b;
      s = {b, 0, q[0], q[1] - q[0], k[0], k[1] - k[0], s.shift};
    }
    const int64_t keys = p_.key_lens ? p_.key_lens[b] : s.lk;
    if (p_.from_end) s.shift += keys - s.lq;
    s.lk = std::min(s.lk, keys);
    return s;
  }

  bool visible(const Sequence& s, int64_t i, int64_t j) const {
    const int64_t position = i + s.shift;
    if (p_.right >= 0 && j > position + p_.right) return false;
    if (p_.left >= 0 && j < position - p_.left && j >= p_.sinks) return false;
    if (p_.key_mask && !p_.key_mask[s.index * p_.nk + j]) return false;
    const int64_t bound = s.index * p_.bounds_batch + i;
    return !p_.lo || (p_.lo[bound] <= j && j < p_.hi[bound]);
  }

  void add_sequence(int64_t b) {
    const Sequence s = sequence(b);
    for (int64_t kv_head = 0; kv_head < p_.kv_heads; ++kv_head) {
      Keys keys;
      for (int64_t j = 0; j < s.lk; ++j) {
        keys.k.push_back(row_of(call_.k, s.row, kv_head, s.k_start + j));
        keys.v.push_back(row_of(call_.v, s.row, kv_head, s.k_start + j));
        turn(keys.k[j].data(), p_.rotated, p_.interleaved, call_.k_cos, call_.k_sin, b, s.k_start + j, false);
      }
      keys.dk.assign(s.lk, std::vector<Sum>(p_.head_dim));
      keys.dv.assign(s.lk, std::vector<Sum>(p_.v_head_dim));
      const int64_t group = p_.q_heads / p_.kv_heads;
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
        for (int64_t i = 0; i < s.lq; ++i) add_query(s, h, i, &keys);
      for (int64_t j = 0; j < s.lk; ++j) {
        turn(keys.dk[j].data(), p_.rotated, p_.interleaved, call_.k_cos, call_.k_sin, b, s.k_start + j, true);
        std::copy(keys.dk[j].begin(), keys.dk[j].end(), results_.dk.row(s.row, kv_head, s.k_start + j));
        std::copy(keys.dv[j].begin(), keys.dv[j].end(), results_.dv.row(s.row, kv_head, s.k_start + j));
      }
    }
  }

  // The scores of the keys that a query sees.
  std::vector<Entry> scores(const Sequence& s, int64_t h, int64_t i, const std::vector<Sum>& q,
                            const Keys& keys) const {
    std::vector<Entry> entries;
    for (int64_t j = 0; j < s.lk; ++j) {
      if (!visible(s, i, j)) continue;
      Entry entry{j, dot(q, keys.k[j])};
      Sum& score = entry.score;
      score = {score.value * p_.scale, score.terms * std::fabs(p_.scale)};
      if (p_.softcap > 0) {
        const double bent = std::tanh(score.value / p_.softcap);
        score.value = p_.softcap * bent;
        entry.slope = 1 - bent * bent;
      }
      if (p_.alibi_slopes) {
        const double fall = slope(s, h) * distance(s, i, j);
        score.add(-fall, fall);
      }
      if (p_.bias.data) {
        const double bias = bias_at(s, h, i, j);
        if (bias == -kInfinity) continue;
        score.add(bias, bias);
      }
      if (p_.dropout_p > 0) entry.keep = keep(s, h, i, j);
      entries.push_back(entry);
    }
    return entries;
  }

  void add_query(const Sequence& s, int64_t h, int64_t i, Keys* keys) {
    const int64_t token = s.q_start + i;
    std::vector<Sum> q = row_of(call_.q, s.row, h, token);
    turn(q.data(), p_.rotated, p_.interleaved, call_.q_cos, call_.q_sin, s.index, token, false);

    std::vector<Entry> entries = scores(s, h, i, q, *keys);
    const double sink = p_.sink_logits ? call_.sink_logits.get(0, 0, 0, h) : -kInfinity;
    double top = sink;
    for (const Entry& entry : entries) top = std::max(top, entry.score.value);
    double total = top == -kInfinity ? 0 : std::exp(sink - top), row = 0;
    for (const Entry& entry : entries) total += std::exp(entry.score.value - top);
    const double lse = total == 0 ? -kInfinity : top + std::log(total);
    for (Entry& entry : entries) {
      entry.weight = std::exp(entry.score.value - lse);
      row += entry.weight * entry.score.terms;
    }

    const double a = units_.accumulation;
    // What a weight may be off by: its own rounding, its score's, and that of its row's sum.
    const auto off = [&](const Entry& entry) {
      const double score = score_unit_ * (entry.score.terms + row) + a * (1 + std::fabs(lse));
      return entry.weight * (units_.storage + score) + units_.smallest_weight;
    };
    *results_.lse.row(s.row, h, token) = {lse, 0};
    if (total != 0)
      results_.lse.row(s.row, h, token)->terms = units_.exponential + a * std::fabs(lse) + score_unit_ * row;

    const std::vector<Sum> dout = row_of(call_.dout, s.row, h, token);
    const double dlse = call_.dlse.get(s.row, h, token, 0);
    std::vector<Sum> out(p_.v_head_dim);
    Sum delta{-dlse, a * std::fabs(dlse)};
    double delta_size = std::fabs(dlse);
    for (const Entry& entry : entries)
      for (int64_t c = 0; c < p_.v_head_dim; ++c) {
        const double v = entry.keep * keys->v[entry.key][c].value, x = entry.keep * dout[c].value;
        out[c].add(entry.weight * v, off(entry) * v);
        keys->dv[entry.key][c].add(entry.weight * x, off(entry) * x);
        delta.add(entry.weight * v * dout[c].value, (off(entry) + a * entry.weight) * v * dout[c].value);
        delta_size += std::fabs(entry.weight * v * dout[c].value);
      }
    std::copy(out.begin(), out.end(), results_.out.row(s.row, h, token));
    *results_.delta.row(s.row, h, token) = delta;

    std::vector<Sum> dq(p_.head_dim);
    for (const Entry& entry : entries) {
      const Sum dweight = dot(dout, keys->v[entry.key]);
      const double dscore = entry.weight * (entry.keep * dweight.value - delta.value);
      const double terms = off(entry) * (entry.keep * dweight.terms + delta_size);
      const double dproduct = dscore * entry.slope * p_.scale;
      for (int64_t c = 0; c < p_.head_dim; ++c) {
        const Sum& k = keys->k[entry.key][c];
        dq[c].add(dproduct * k.value, terms * p_.scale * k.terms);
        keys->dk[entry.key][c].add(dproduct * q[c].value, terms * p_.scale * q[c].terms);
      }
      if (p_.bias.data) results_.dbias.sums[bias_index(s, h, i, entry.key)].add(dscore, terms);
      if (p_.alibi_slopes) {
        const double away = distance(s, i, entry.key);
        results_.dslope_rows.row(s.row, h, token)->add(-dscore * away, terms * away);
      }
    }
    turn(dq.data(), p_.rotated, p_.interleaved, call_.q_cos, call_.q_sin, s.index, token, true);
    std::copy(dq.begin(), dq.end(), results_.dq.row(s.row, h, token));
  }

  double slope(const Sequence& s, int64_t h) const {
    return call_.slopes.get(call_.slopes.shape.batch > 1 ? s.index : 0, 0, 0, h);
  }
  static double distance(const Sequence& s, int64_t i, int64_t j) { return std::fabs(i + s.shift - j); }
  double keep(const Sequence& s, int64_t h, int64_t i, int64_t j) const {
    const std::array<uint32_t, 4> counter = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i),
                                             static_cast<uint32_t>(h), static_cast<uint32_t>(s.index)};
    const uint32_t word = philox(p_.seed, counter, j % 4);
    return word < p_.dropout_p * 0x1p32 ? 0 : 1 / (1 - p_.dropout_p);
  }
  int64_t bias_index(const Sequence& s, int64_t h, int64_t i, int64_t j) const {
    const Shape& shape = call_.bias.shape;
    return shape.at(s.index % shape.batch, h % shape.head, i % shape.token, j % shape.width);
  }
  double bias_at(const Sequence& s, int64_t h, int64_t i, int64_t j) const {
    const Shape& shape = call_.bias.shape;
    const double x = call_.bias.get(s.index % shape.batch, h % shape.head, i % shape.token, j % shape.width);
    return p_.bias.dtype != DType::kBool ? x : x != 0 ? 0 : -kInfinity;
  }

  const Call& call_;
  const AttentionParams& p_;
  const Units units_;
  double score_unit_;
  Results results_;
};

}  // namespace longattn::test
