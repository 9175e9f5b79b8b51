// What the splits of a call on a cache found, merged:
//   lse = log(sum_s exp(lse_s) + exp(sink)), out = sum_s exp(lse_s - lse) out_s.
#pragma once

#include "kernels/forward.h"

namespace longattn::cuda {

struct CombineParams {
  const float *partial_out, *partial_lse;  // [splits, batch * kv_heads, nq * group, (width)]
  LongattnRows out;
  float* lse;
  const float* sink_logits;
  const int32_t* query_lens;
  int splits, batch, q_heads, kv_heads, nq, width, v_head_dim;
};

constexpr int kCombineThreads = 128;

// A block per query, head and sequence.
template <class Element>
LONGATTN_KERNEL(kCombineThreads)
combine_kernel(LONGATTN_PARAMS CombineParams p) {
  const int3 at = block_index();
  const int i = at.x, h = at.y, b = at.z, group = p.q_heads / p.kv_heads;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.kv_heads * p.nq * group;
  const int64_t row = ((static_cast<int64_t>(b) * p.kv_heads + h / group) * p.nq + i) * group + h % group;
  const bool counts = i < p.query_lens[b];
  const float sink = counts && p.sink_logits ? p.sink_logits[h] : -kInfinity;
  float top = sink;
  for (int s = 0; counts && s < p.splits; ++s) top = fmaxf(top, p.partial_lse[s * rows + row]);
  const float base = top == -kInfinity ? 0.0f : top;
  float total = exp2_approx((sink - base) * kLog2E);
  for (int s = 0; counts && s < p.splits; ++s) total += exp2_approx((p.partial_lse[s * rows + row] - base) * kLog2E);
  uint16_t* out = row_of(p.out, b, h, i);
  for (int c = thread_index(); c < p.v_head_dim; c += kCombineThreads) {
    float x = 0.0f;
    for (int s = 0; counts && s < p.splits; ++s)
      x += exp2_approx((p.partial_lse[s * rows + row] - base) * kLog2E) * p.partial_out[(s * rows + row) * p.width + c];
    out[c] = static_cast<uint16_t>(pack<Element>(total == 0.0f ? 0.0f : x / total, 0.0f));
  }
  if (thread_index() == 0)
    p.lse[(static_cast<int64_t>(b) * p.q_heads + h) * p.nq + i] =
        total == 0.0f ? -kInfinity : base + log2_approx(total) * kLn2;
}

}  // namespace longattn::cuda
