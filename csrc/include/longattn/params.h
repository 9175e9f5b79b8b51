// What Python hands over: addresses, strides and numbers, checked again by check.h. No torch, no Python.
#pragma once

#include <cstdint>

namespace longattn {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kBool = 4, kInt8 = 5 };

// [batch, head, token, width], unit stride in width.
struct Tensor4 {
  char* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;  // strides in elements
  float* scales = nullptr;                 // of rows of kInt8 in a cache: [page][kv_head][slot]
};

// Rotation angles of tokens, in the accumulation type: [1 or batch, token, width / 2], times the rotation's factor.
struct Angles {
  const char* cos = nullptr;
  const char* sin = nullptr;
  int64_t batch = 0;  // stride in elements, 0 if all sequences share them
};

// The slots of a cache, that hold its keys and values: [page][kv_head][slot][width], in AttentionParams' k and v, their
// batch stride that of a page. Key j of a sequence lies in its slot j, or past the first `sinks` keys in slot
// sinks + (j - sinks) % ring; slot s lies in page table[s / slots] of the sequence.
struct Pages {
  const int32_t* table = nullptr;  // [batch, width]; nullptr: k and v are tensors
  int64_t width = 0, count = 0;    // pages of a sequence at most; of all
  int64_t slots = 0;               // of a page
  int64_t sinks = 0, ring = 0;     // ring 0: all keys stay
  DType dtype = DType::kFloat32;   // of slots; kInt8: times the scale of each
};

// Added to scores, [batch, head, query, key]; strides in elements, 0 where it is broadcast.
struct Bias {
  char* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
  DType dtype = DType::kFloat32;  // kBool: true = visible
};

// One attention call. "Accumulation type" is double for kFloat64, float otherwise.
struct AttentionParams {
  int64_t batch = 0, q_heads = 0, kv_heads = 0, nq = 0, nk = 0, head_dim = 0, v_head_dim = 0;
  DType dtype = DType::kFloat32;

  Tensor4 q, k, v, out;  // out is read by the backward
  char* lse = nullptr;   // [batch, q_heads, nq], accumulation type; written by the forward

  // Query i of a sequence stands at position i + offset (+ keys - queries if from_end); see mask.h.
  int64_t left = -1, right = -1, sinks = 0, offset = 0;  // -1: unbounded
  bool from_end = true;
  const int32_t* offsets = nullptr;       // [batch], in place of offset; may be nullptr
  const bool* key_mask = nullptr;         // [batch, nk], may be nullptr
  const int32_t* key_lens = nullptr;      // [batch], may be nullptr
  const int32_t* lo = nullptr;            // [1 or batch, nq], may be nullptr
  const int32_t* hi = nullptr;            // as lo
  int64_t bounds_batch = 0;               // stride of lo and hi
  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1]: packed sequences; q, k, v, out have one batch row
  const int32_t* cu_seqlens_k = nullptr;  // [batch + 1]

  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  Bias bias;
  const char* alibi_slopes = nullptr;  // [1 or batch, q_heads], accumulation type; may be nullptr
  int64_t slopes_batch = 0;            // stride of alibi_slopes
  const char* sink_logits = nullptr;   // [q_heads], accumulation type; may be nullptr
  double dropout_p = 0.0;
  uint64_t seed = 0;  // of dropout
  // Where the first sequence, head, query and key stand in the attention that this call is a block of: dropout counts
  // from there.
  int64_t first_sequence = 0, first_head = 0, first_query = 0, first_key = 0;

  int64_t rotated = 0;       // width that rope turns, 0: none
  bool interleaved = false;  // pairs (2i, 2i + 1) in place of (i, i + rotated / 2)
  Angles q_angles, k_angles;
  bool q_turned = false, k_turned = false;  // the rows of q, or of k, lie turned

  // With a cache: k and v are its pages, key_lens the lengths after the call. Of sequence b the first query_lens[b]
  // queries count; as many rows of new_k and new_v become its last keys.
  Pages pages;
  Tensor4 new_k, new_v;                 // [batch, kv_heads, nq, width]; nullptr: nothing is appended
  const int32_t* query_lens = nullptr;  // [batch]
  // q_angles are made by the call. Keys turn by them before they are stored or, where k_angles are given, whenever they
  // are read.
  const float* inv_freq = nullptr;   // [1 or batch, rotated / 2]
  const float* positions = nullptr;  // [1 or batch, nq], in place of those where queries stand; may be nullptr
  int64_t inv_freq_batch = 0, positions_batch = 0;  // strides
  double rope_factor = 1.0;                         // of q_angles; k_angles hold it
  // > 0: key j >= sinks turns by row j - (offset of the queries) + frame - 1 of k_angles, a query by row i + frame - 1
  // against it; against a sink, that turns by its own row, by that of its position or by frame + sinks - 1, the last.
  int64_t frame = 0;
  const bool* tree = nullptr;       // [1 or batch, nq, nq]: which of the new keys each query sees; may be nullptr
  const int32_t* depths = nullptr;  // [1 or batch, nq], with tree: query i stands at offset + depths[i]
  int64_t tree_batch = 0, depths_batch = 0;  // strides

  // Backward.
  Tensor4 dout, dq, dk, dv;     // dq, dk, dv may be nullptr
  const char* dlse = nullptr;   // as lse, may be nullptr
  char* delta = nullptr;        // workspace as lse
  char* shares = nullptr;       // as lse, of the call itself: what weights by lse are multiplied by; nullptr: 1
  Tensor4 dq_sum;               // accumulation type, zeroed; may be dq itself
  char* dslope_rows = nullptr;  // as lse, zeroed: each query's part of the gradient of its head's slope; may be nullptr
  Bias dbias;  // accumulation type, zeroed, of bias's shape: its stride is 0 where bias is broadcast; may be nullptr

  int64_t threads = 1;
};

// cos and sin [tokens, half] of positions [tokens] times inv_freq [half], times factor; of float32 numbers where dtype,
// the accumulation type of the tables, is float64, too.
struct AngleParams {
  int64_t tokens = 0, half = 0;
  DType dtype = DType::kFloat32;
  const float* positions = nullptr;
  const float* inv_freq = nullptr;
  double factor = 1.0;
  char* cos = nullptr;
  char* sin = nullptr;
  int64_t threads = 1;
};

// out = x with its first `rotated` entries turned; x, out [batch, heads, tokens, width].
struct RopeParams {
  int64_t batch = 0, heads = 0, tokens = 0, width = 0, rotated = 0;
  DType dtype = DType::kFloat32;
  Tensor4 x, out;
  const float* positions = nullptr;  // [1 or batch, tokens]
  const float* inv_freq = nullptr;   // [rotated / 2]
  int64_t positions_batch = 0;       // stride
  double factor = 1.0;               // of what is turned
  bool interleaved = false, inverse = false;
  int64_t threads = 1;
};

}  // namespace longattn
