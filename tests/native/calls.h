// The calls that are checked: what is asked for, and random inputs for it.
#pragma once

#include <cmath>
#include <vector>

#include "longattn/params.h"
#include "tensor.h"

namespace longattn::test {

enum Feature : unsigned {  // beside what AttentionParams says in numbers
  kKeyMask = 1,
  kKeyLens = 2,
  kBounds = 4,
  kOffsets = 8,
  kSlopes = 16,
  kSinkLogits = 32,
  kPerSequence = 64,  // bounds, slopes and angles are [batch, ...], not one for all
};

struct Case {
  const char* name;
  AttentionParams p;
  unsigned features = 0;
  std::vector<int64_t> q_lengths, k_lengths;  // of packed sequences
  Shape bias_shape;
  DType bias_dtype = DType::kFloat32;

  explicit Case(const char* text) : name(text) {
    p.batch = 2;
    p.scale = 0.4;
    heads(2, 1).lengths(70, 150).widths(10, 14);
  }
  bool has(Feature feature) const { return features & feature; }

  Case& with(unsigned more) { return features |= more, *this; }
  Case& batch(int64_t n) { return p.batch = n, *this; }
  Case& heads(int64_t q, int64_t kv) { return p.q_heads = q, p.kv_heads = kv, *this; }
  Case& lengths(int64_t q, int64_t k) { return p.nq = q, p.nk = k, *this; }
  Case& widths(int64_t head, int64_t v_head) { return p.head_dim = head, p.v_head_dim = v_head, *this; }
  Case& packed(std::vector<int64_t> q, std::vector<int64_t> k) { return q_lengths = q, k_lengths = k, *this; }
  Case& window(int64_t left, int64_t right) { return p.left = left, p.right = right, *this; }
  Case& causal() { return window(-1, 0); }
  Case& sinks(int64_t n) { return p.sinks = n, *this; }
  Case& offset(int64_t n) { return p.offset = n, *this; }
  Case& from_start() { return p.from_end = false, *this; }
  Case& rope(int64_t width, bool interleaved) { return p.rotated = width, p.interleaved = interleaved, *this; }
  Case& scale(double x) { return p.scale = x, *this; }
  Case& softcap(double x) { return p.softcap = x, *this; }
  Case& bias(Shape shape, DType dtype) { return bias_shape = shape, bias_dtype = dtype, *this; }
  Case& dropout(double share) { return p.dropout_p = share, p.seed = 0x123456789abcdef, *this; }
};

inline std::vector<Case> cases() {
  return {
      Case("plain"),
      Case("causal").causal(),
      Case("causal, from the start").causal().from_start(),
      Case("causal, more queries").causal().heads(2, 2).lengths(90, 40),
      Case("window, sinks").window(20, 7).sinks(3),
      Case("causal window, offset").window(16, 0).offset(-5),
      Case("window, offsets").window(30, 2).from_start().with(kOffsets),
      Case("key_mask").with(kKeyMask),
      Case("causal, key_lens").causal().with(kKeyLens),
      Case("bounds").with(kBounds),
      Case("bounds, window, sinks").window(40, -1).sinks(9).with(kBounds | kPerSequence),
      Case("heads 6/2").heads(6, 2).lengths(25, 33).widths(16, 16),
      Case("heads 7/1, 1 wide").heads(7, 1).lengths(20, 30).widths(1, 1),
      Case("heads 3/3, 63, 65 wide").heads(3, 3).lengths(17, 31).widths(63, 65),
      Case("64 wide, rope").heads(4, 2).lengths(130, 200).widths(64, 64).causal().rope(64, false).scale(0.1),
      Case("80, 128 wide").heads(2, 2).lengths(37, 70).widths(80, 128).scale(0.1),
      Case("200, 256 wide").heads(2, 1).lengths(20, 70).widths(200, 256).causal().scale(0.07),
      Case("512 wide").heads(1, 1).lengths(9, 20).widths(512, 512).scale(0.05),
      Case("many queries").heads(2, 2).lengths(300, 19),
      Case("few queries, many keys").heads(4, 2).lengths(2, 2100).widths(12, 9),
      Case("the same, window, sinks").lengths(3, 2100).widths(6, 5).window(1500, 0).sinks(4).with(kSinkLogits),
      Case("packed, causal").packed({3, 70, 0, 5, 9}, {3, 140, 6, 0, 2}).causal(),
      Case("packed, window, key_lens").packed({33, 20}, {64, 40}).window(11, 4).with(kKeyLens),
      Case("rope").rope(10, false),
      Case("rope, partial, interleaved").rope(6, true).with(kPerSequence),
      Case("packed rope").packed({30, 21}, {30, 40}).rope(8, false),
      Case("negative scale").scale(-0.3),
      Case("scale 0").scale(0),
      Case("peaked weights").scale(15),
      Case("softcap").softcap(1.5),
      Case("slopes").causal().with(kSlopes),
      Case("packed slopes").packed({30, 21}, {30, 40}).with(kSlopes | kPerSequence),
      Case("bias").bias({2, 2, 70, 150}, DType::kFloat32),
      Case("broadcast bias").bias({1, 2, 1, 150}, DType::kFloat16),
      Case("boolean bias").bias({2, 1, 70, 150}, DType::kBool),
      Case("learned sinks").causal().with(kSinkLogits),
      Case("dropout").dropout(0.3),
      Case("all at once")
          .window(60, 11)
          .sinks(5)
          .rope(8, false)
          .softcap(3)
          .bias({1, 1, 70, 150}, DType::kBFloat16)
          .dropout(0.1)
          .with(kKeyMask | kBounds | kSlopes | kSinkLogits | kPerSequence),
      Case("no keys").lengths(70, 0),
      Case("no queries").lengths(0, 150),
      Case("no sequences").batch(0),
  };
}

// A case with its inputs; params point to them.
struct Call {
  AttentionParams p;
  Tensor q, k, v, dout, dlse, q_cos, q_sin, k_cos, k_sin, bias, slopes, sink_logits;
  std::vector<int32_t> cu_seqlens_q, cu_seqlens_k, key_lens, offsets, lo, hi;
  std::vector<char> key_mask;

  Call(const Case& c, DType dtype) : p(c.p), random_(static_cast<uint64_t>(dtype)) {
    p.dtype = dtype;
    if (!c.q_lengths.empty()) pack(c);
    const int64_t rows = memory_rows();
    q = inputs(dtype, {rows, p.q_heads, p.nq, p.head_dim}, Tensor::kTokensFirst);
    k = inputs(dtype, {rows, p.kv_heads, p.nk, p.head_dim}, Tensor::kGaps);
    v = inputs(dtype, {rows, p.kv_heads, p.nk, p.v_head_dim}, Tensor::kTokensFirst);
    dout = inputs(dtype, {rows, p.q_heads, p.nq, p.v_head_dim}, Tensor::kGaps);
    dlse = inputs(accumulation_type(dtype), {rows, p.q_heads, p.nq, 1});
    p.q = q.view();
    p.k = k.view();
    p.v = v.view();
    p.dout = dout.view();
    p.dlse = dlse.data();
    make_visibility(c);
    make_scores(c);
    if (p.rotated) {
      make_angles(c, p.nq, &q_cos, &q_sin, &p.q_angles);
      make_angles(c, p.nk, &k_cos, &k_sin, &p.k_angles);
    }
  }
  Call(const Call&) = delete;  // p holds addresses

  int64_t memory_rows() const { return p.cu_seqlens_q ? 1 : p.batch; }

 private:
  Tensor inputs(DType dtype, const Shape& shape, Tensor::Layout layout = Tensor::kDense) {
    Tensor x(dtype, shape, layout);
    x.fill([&] { return random_.between(-1.7, 1.7); });
    return x;
  }

  // Sequences one after another, with tokens before the first and after the last that belong to none.
  void pack(const Case& c) {
    p.batch = static_cast<int64_t>(c.q_lengths.size());
    const auto starts = [](const std::vector<int64_t>& lengths, int64_t* tokens) {
      std::vector<int32_t> cu_seqlens{1};
      for (int64_t length : lengths) cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(length));
      *tokens = cu_seqlens.back() + 2;
      return cu_seqlens;
    };
    cu_seqlens_q = starts(c.q_lengths, &p.nq);
    cu_seqlens_k = starts(c.k_lengths, &p.nk);
    p.cu_seqlens_q = cu_seqlens_q.data();
    p.cu_seqlens_k = cu_seqlens_k.data();
  }

  void make_visibility(const Case& c) {
    if (c.has(kKeyMask)) {
      for (int64_t n = 0; n < p.batch * p.nk; ++n) key_mask.push_back(random_.integer(0, 3) > 0);
      p.key_mask = reinterpret_cast<const bool*>(key_mask.data());
    }
    if (c.has(kKeyLens)) {
      const int64_t most = p.cu_seqlens_k ? p.nk / p.batch : p.nk;
      for (int64_t b = 0; b < p.batch; ++b) key_lens.push_back(static_cast<int32_t>(random_.integer(most / 2, most)));
      p.key_lens = key_lens.data();
    }
    if (c.has(kOffsets)) {
      for (int64_t b = 0; b < p.batch; ++b) offsets.push_back(static_cast<int32_t>(random_.integer(-9, 90)));
      p.offsets = offsets.data();
    }
    if (c.has(kBounds)) {
      for (int64_t n = 0; n < (c.has(kPerSequence) ? p.batch : 1) * p.nq; ++n) {
        lo.push_back(static_cast<int32_t>(random_.integer(-3, p.nk)));
        hi.push_back(static_cast<int32_t>(random_.integer(p.nk / 2, p.nk + 3)));
      }
      p.lo = lo.data();
      p.hi = hi.data();
      p.bounds_batch = c.has(kPerSequence) ? p.nq : 0;
    }
    // What hidden keys hold never matters.
    for (int64_t b = 0; b < p.batch && !p.cu_seqlens_k; ++b)
      for (int64_t j = 0; j < p.nk; ++j) {
        if (!(p.key_mask && !p.key_mask[b * p.nk + j]) && !(p.key_lens && j >= p.key_lens[b])) continue;
        for (int64_t h = 0; h < p.kv_heads; ++h) {
          for (int64_t d = 0; d < p.head_dim; ++d) k.set(b, h, j, d, kNan);
          for (int64_t d = 0; d < p.v_head_dim; ++d) v.set(b, h, j, d, kNan);
        }
      }
  }

  void make_scores(const Case& c) {
    const DType wide = accumulation_type(p.dtype);
    if (c.bias_shape.size()) {
      bias = Tensor(c.bias_dtype, c.bias_shape, Tensor::kGaps);
      const bool mask = c.bias_dtype == DType::kBool;
      bias.fill([&] {
        const bool visible = random_.integer(0, 9) > 0;
        return mask ? visible : visible ? random_.between(-2, 2) : -kInfinity;
      });
      p.bias = bias.bias();
    }
    if (c.has(kSlopes)) {
      slopes = inputs(wide, {c.has(kPerSequence) ? p.batch : 1, 1, 1, p.q_heads});
      p.alibi_slopes = slopes.data();
      p.slopes_batch = c.has(kPerSequence) ? p.q_heads : 0;
    }
    if (c.has(kSinkLogits)) {
      sink_logits = inputs(wide, {1, 1, 1, p.q_heads});
      p.sink_logits = sink_logits.data();
    }
  }

  void make_angles(const Case& c, int64_t tokens, Tensor* cos, Tensor* sin, Angles* angles) {
    const Shape shape{c.has(kPerSequence) ? p.batch : 1, 1, tokens, p.rotated / 2};
    *cos = *sin = Tensor(accumulation_type(p.dtype), shape);
    cos->each([&](int64_t b, int64_t h, int64_t i, int64_t c) {
      const double angle = random_.between(-100, 100), factor = 1.1;
      cos->set(b, h, i, c, factor * std::cos(angle));
      sin->set(b, h, i, c, factor * std::sin(angle));
    });
    *angles = {cos->data(), sin->data(), c.has(kPerSequence) ? tokens * p.rotated / 2 : 0};
  }

  Random random_;
};

}  // namespace longattn::test
