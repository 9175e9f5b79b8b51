// What Python hands over: addresses, strides and numbers of one call, in C types alone.
// longattn/backends/cuda/native.py mirrors it, field by field.
#pragma once

#include <cstdint>

extern "C" {

// [batch, head, token, width] of 16-bit numbers, unit stride in width; strides in elements. Rows stand at multiples of
// 16 bytes.
struct LongattnRows {
  void* data;  // nullptr: absent
  int64_t batch, head, token;
};

// One attention call, its backward, or one on a cache. Absent pointers are nullptr.
struct LongattnCall {
  int32_t batch, q_heads, kv_heads, nq, nk, head_dim, v_head_dim;
  int32_t is_bfloat16;
  struct LongattnRows q, k, v, out;
  float* lse;  // [batch, q_heads, nq]

  // Who sees whom: longattn/mask.py. Unbounded sides are -1.
  int32_t left, right, sinks, offset, from_end;
  const int32_t* offsets;       // [batch], in place of offset
  const int32_t* key_lens;      // [batch]
  const uint8_t* key_mask;      // [batch, nk]
  const int32_t* cu_seqlens_q;  // [batch + 1]: packed sequences; tensors have one batch row
  const int32_t* cu_seqlens_k;
  int32_t max_seqlen_q, max_seqlen_k;
  const int32_t *lo, *hi;  // [nq] or [batch, nq]: a query sees keys of [lo, hi) only
  int32_t bounds_batch;    // stride of lo and hi

  float scale, softcap;      // softcap 0: none
  const float* sink_logits;  // [q_heads]
  int32_t* counters;         // zeroed, longattn_cuda_workspace says how many

  // Backward.
  struct LongattnRows dout, dq, dk, dv;
  const float* dlse;  // as lse
  float *row_terms, *dq_sum;
  int32_t deterministic;

  // On a cache: k and v are its pages [page, kv_head, slot, width]; key j of sequence b is slot j % page_size of page
  // table[b, j / page_size]. q, new_k and new_v are the new tokens, of which the first query_lens[b] count.
  const int32_t* table;  // [batch, table_width]
  int32_t table_width, pages, page_size;
  const int32_t* query_lens;  // [batch]
  struct LongattnRows new_k, new_v;
  const float* inv_freq;   // [rotated / 2] or [batch, rotated / 2]
  const float* positions;  // [nq] or [batch, nq], in place of where the new tokens stand
  int32_t rotated, interleaved, inv_freq_batch, positions_batch;
  float rope_factor;
  void* packed_q;  // 16-bit [batch, kv_heads, nq * group, head_dim rounded up to 8]
  float *partial_out, *partial_lse;

  void* stream;
};

// out = x with its first `rotated` entries turned; [batch, heads, tokens, width].
struct LongattnRope {
  int32_t batch, heads, tokens, width, rotated, is_bfloat16, interleaved, inverse;
  struct LongattnRows x, out;
  const float* inv_freq;   // [rotated / 2]
  const float* positions;  // [tokens] or [batch, tokens]
  int32_t positions_batch;
  float factor;
  void* stream;
};

// Entries of the workspaces that a call needs.
struct LongattnWorkspace {
  int64_t counters, row_terms, dq_sum, partial_out, partial_lse;
};
}
