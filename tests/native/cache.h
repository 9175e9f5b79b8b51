// Calls on a cache: the keys of a call of tensors in pages and rings, written by appends of several tokens each.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "calls.h"
#include "cpu/attention.h"
#include "tensor.h"

namespace longattn::test {

// How the keys of a case are stored.
struct CacheCase {
  Case call;
  int64_t slots;       // of a page
  int64_t spare = -1;  // of a ring past its window; -1: no ring
  bool int8 = false;
  std::vector<int> parents = {};  // of drafts, -1: the old tokens
};

inline std::vector<CacheCase> cache_cases() {
  const auto unequal = [](const char* name) { return Case(name).causal().with(kKeyLens); };
  return {
      {unequal("cache, one page").heads(4, 2).lengths(1, 300), 300},
      {unequal("cache, pages, rope").heads(6, 2).lengths(2, 90).widths(16, 32).rope(16, false).with(kPerSequence), 7},
      {unequal("cache, pages, a prompt").heads(4, 2).lengths(70, 150).rope(6, true).with(kPerSequence), 16},
      {unequal("cache, ring").lengths(1, 200).widths(16, 16).window(24, 0).sinks(3).with(kSinkLogits), 11, 0},
      {unequal("cache, ring, 5 new").lengths(5, 200).window(24, 0).sinks(3).softcap(2).with(kSlopes), 64, 4},
      {unequal("cache, int8").heads(4, 2).lengths(2, 140).widths(32, 16), 9, -1, true},
      {unequal("cache, int8, odd widths").lengths(3, 140), 9, -1, true},
      {unequal("cache, int8, a prompt").lengths(60, 140), 9, -1, true},
      {Case("cache, drafts").with(kKeyLens).heads(2, 1).lengths(6, 60), 8, -1, false, {-1, -1, 0, 0, 2, 4}},
  };
}

// A call of tensors, and the same call on a cache that holds what it reads.
class CachedCall {
 public:
  CachedCall(const CacheCase& c, DType dtype) : call(with_drafts(c), dtype), case_(c) {
    AttentionParams& p = call.p;
    if (c.int8) make_exact(&call.k), make_exact(&call.v);
    if (p.rotated) turn_by_position();
    if (!c.parents.empty()) make_tree();
    make_pages();
  }

  // Appends all but the last tokens a few at a time; out and lse of these.
  void run(int64_t threads, Tensor* out, Tensor* lse) {
    AttentionParams p = call.p;
    p.threads = threads;
    p.pages = pages_;
    p.k = k_.view();
    p.v = v_.view();
    p.k.scales = k_scales_.data();
    p.v.scales = v_scales_.data();
    p.bias = {};
    p.q_angles = p.k_angles = {};
    p.inv_freq = inv_freq_.data();
    const std::vector<int32_t> all = call.key_lens;
    const int64_t old = *std::max_element(all.begin(), all.end()) - p.nq, step = case_.spare < 0 ? 13 : case_.spare + 1;
    for (int64_t first = 0; first < old; first += step) {
      AttentionParams few = p;
      few.q_heads = 0;
      few.q = few.out = {};
      few.nq = step;
      few.alibi_slopes = few.sink_logits = nullptr;
      append(&few, first, all, p.nq);
    }
    p.out = out->view();
    p.lse = lse->data();
    p.tree = tree_.empty() ? nullptr : reinterpret_cast<const bool*>(tree_.data());
    p.depths = depths_.empty() ? nullptr : depths_.data();
    const std::vector<int32_t> counts(p.batch, static_cast<int32_t>(p.nq));
    const Tensor* sources[] = {&call.k, &call.v};
    Tensor new_k = last_tokens(*sources[0], all, counts), new_v = last_tokens(*sources[1], all, counts);
    p.new_k = new_k.view();
    p.new_v = new_v.view();
    p.key_lens = all.data();
    p.query_lens = counts.data();
    attention_decode(p);
  }

  Call call;

 private:
  // Drafts see what the tree lets them see: a mask, for a call of tensors.
  static Case with_drafts(const CacheCase& c) {
    Case call = c.call;
    if (!c.parents.empty()) call.bias({call.p.batch, 1, call.p.nq, call.p.nk}, DType::kBool);
    return call;
  }

  void make_tree() {
    const AttentionParams& p = call.p;
    tree_.assign(p.nq * p.nq, 0);
    for (int64_t i = 0; i < p.nq; ++i) {
      int32_t depth = -1;
      for (int64_t at = i; at >= 0; at = case_.parents[at], ++depth) tree_[i * p.nq + at] = 1;
      depths_.push_back(depth);
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t j = 0; j < p.nk; ++j) {
          const int64_t draft = j - (call.key_lens[b] - p.nq);
          call.bias.set(b, 0, i, j, draft < 0 || (draft < p.nq && tree_[i * p.nq + draft]));
        }
    }
  }

  // Rows that int8 holds as they are: whole numbers up to 127, times a power of two.
  void make_exact(Tensor* x) {
    for (int64_t b = 0; b < x->shape.batch; ++b)
      for (int64_t h = 0; h < x->shape.head; ++h)
        for (int64_t i = 0; i < x->shape.token; ++i)
          for (int64_t c = 0; c < x->shape.width; ++c) {
            const double number = c == 0 ? 127 : std::nearbyint(64 * x->get(b, h, i, c));
            if (i < call.key_lens[b]) x->set(b, h, i, c, std::ldexp(number, i % 2 ? -6 : -7));
          }
  }

  void turn_by_position() {
    const AttentionParams& p = call.p;
    for (int64_t n = 0; n < p.rotated / 2; ++n) inv_freq_.push_back(std::pow(10.0f, -static_cast<float>(n)));
    const auto fill = [&](Tensor* cos, Tensor* sin, bool queries) {
      cos->each([&](int64_t b, int64_t h, int64_t i, int64_t c) {
        const int64_t position = i + (queries ? call.key_lens[b] - p.nq : 0);
        const float angle = static_cast<float>(position) * inv_freq_[c];
        cos->set(b, h, i, c, std::cos(static_cast<double>(angle)));
        sin->set(b, h, i, c, std::sin(static_cast<double>(angle)));
      });
    };
    fill(&call.q_cos, &call.q_sin, true);
    fill(&call.k_cos, &call.k_sin, false);
  }

  void make_pages() {
    const AttentionParams& p = call.p;
    // Rotated keys are rounded to what they are stored in: of float16, that is not in the budget.
    const bool wide = p.dtype == DType::kFloat16 && p.rotated;
    pages_.dtype = case_.int8 ? DType::kInt8 : wide ? DType::kFloat32 : p.dtype;
    pages_.slots = case_.slots;
    int64_t slots = p.nk;
    if (case_.spare >= 0) {
      pages_.ring = p.left + 1 + case_.spare;
      pages_.sinks = p.sinks;
      slots = pages_.ring + pages_.sinks;
    }
    pages_.width = (slots + case_.slots - 1) / case_.slots;
    pages_.count = p.batch * pages_.width;
    for (int64_t n = 0; n < pages_.count; ++n) table_.push_back(static_cast<int32_t>(pages_.count - 1 - n));
    pages_.table = table_.data();
    k_ = Tensor(pages_.dtype, {pages_.count, p.kv_heads, case_.slots, p.head_dim});
    v_ = Tensor(pages_.dtype, {pages_.count, p.kv_heads, case_.slots, p.v_head_dim});
    k_scales_.assign(pages_.count * p.kv_heads * case_.slots, static_cast<float>(kNan));
    v_scales_ = k_scales_;
  }

  // Tokens [first, first + nq) of each sequence, as far as they come before its last ones.
  void append(AttentionParams* p, int64_t first, const std::vector<int32_t>& all, int64_t last) {
    std::vector<int32_t> lens, counts;
    for (int32_t keys : all) {
      const int64_t stop = std::min<int64_t>(first + p->nq, keys - last);
      counts.push_back(static_cast<int32_t>(std::max<int64_t>(0, stop - first)));
      lens.push_back(static_cast<int32_t>(std::min<int64_t>(stop, keys - last)));
    }
    const AttentionParams& known = call.p;
    Tensor new_k(known.dtype, {known.batch, known.kv_heads, p->nq, known.head_dim});
    Tensor new_v(known.dtype, {known.batch, known.kv_heads, p->nq, known.v_head_dim});
    copy_tokens(call.k, lens, counts, &new_k);
    copy_tokens(call.v, lens, counts, &new_v);
    p->new_k = new_k.view();
    p->new_v = new_v.view();
    p->key_lens = lens.data();
    p->query_lens = counts.data();
    attention_append(*p);
  }

  Tensor last_tokens(const Tensor& x, const std::vector<int32_t>& lens, const std::vector<int32_t>& counts) const {
    Tensor last(x.dtype, {x.shape.batch, x.shape.head, call.p.nq, x.shape.width}, Tensor::kTokensFirst);
    copy_tokens(x, lens, counts, &last);
    return last;
  }

  static void copy_tokens(const Tensor& x, const std::vector<int32_t>& lens, const std::vector<int32_t>& counts,
                          Tensor* to) {
    to->each([&](int64_t b, int64_t h, int64_t i, int64_t c) {
      if (i < counts[b]) to->set(b, h, i, c, x.get(b, h, lens[b] - counts[b] + i, c));
    });
  }

  CacheCase case_;
  Pages pages_;
  Tensor k_, v_;
  std::vector<float> k_scales_, v_scales_, inv_freq_;
  std::vector<int32_t> table_, depths_;
  std::vector<char> tree_;
};

}  // namespace longattn::test
