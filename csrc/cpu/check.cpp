#include "cpu/check.h"

#include <initializer_list>
#include <string>

#include "cpu/kernels.h"
#include "errors.h"

namespace longattn {

namespace {

constexpr int64_t kMaxElements = int64_t{1} << 60;

void expect(bool condition, const char* argument, const std::string& expected, const std::string& got) {
  if (!condition) throw InvalidInput(argument, expected, got);
}

void expect_size(const char* name, int64_t value, int64_t low, int64_t high) {
  expect(value >= low && value <= high, name, std::to_string(low) + " to " + std::to_string(high),
         std::to_string(value));
}

// Addresses of all elements stay far from the ends of 64-bit numbers.
void expect_tensor(const char* name, const Tensor4& x, std::initializer_list<int64_t> sizes) {
  int64_t elements = 1;
  for (int64_t size : sizes) {
    if (size == 0) return;  // never read
    expect(elements <= kMaxElements / size, name, "fewer than 2^60 elements", "more");
    elements *= size;
  }
  expect(x.data != nullptr, name, "an address", "null");
  const int64_t* size = sizes.begin();
  int64_t reach = 0;
  for (int64_t stride : {x.batch, x.head, x.token}) {
    const int64_t steps = *size++ - 1;
    expect(stride >= 0 && (steps == 0 || stride <= kMaxElements / steps), name, "strides of 0 to 2^60 elements",
           std::to_string(stride));
    reach += stride * steps;
    expect(reach <= kMaxElements, name, "strides that reach below 2^60 elements", std::to_string(reach));
  }
}

void expect_angles(const char* name, const Angles& angles, bool needed) {
  expect(!needed || (angles.cos && angles.sin), name, "tables of cos and sin", "null");
  expect(angles.batch >= 0, name, "a stride >= 0", std::to_string(angles.batch));
}

void expect_cu_seqlens(const char* name, const int32_t* cu_seqlens, int64_t batch, int64_t tokens) {
  expect(cu_seqlens[0] >= 0, name, "a first entry >= 0", std::to_string(cu_seqlens[0]));
  for (int64_t b = 0; b < batch; ++b)
    expect(cu_seqlens[b] <= cu_seqlens[b + 1], name, "entries that never decrease",
           std::to_string(cu_seqlens[b]) + " before " + std::to_string(cu_seqlens[b + 1]));
  expect(cu_seqlens[batch] <= tokens, name, "entries of at most " + std::to_string(tokens) + ", the number of tokens",
         std::to_string(cu_seqlens[batch]));
}

void expect_dtype(DType dtype) {
  expect(dtype >= DType::kFloat32 && dtype <= DType::kFloat16, "dtype", "a floating type",
         std::to_string(static_cast<int>(dtype)));
}

void expect_bias(const char* name, const Bias& bias, const AttentionParams& p) {
  if (!bias.data) return;
  expect(bias.dtype >= DType::kFloat32 && bias.dtype <= DType::kBool, name, "a floating type or bool",
         std::to_string(static_cast<int>(bias.dtype)));
  int64_t reach = 0;
  const int64_t strides[] = {bias.batch, bias.head, bias.query, bias.key}, sizes[] = {p.batch, p.q_heads, p.nq, p.nk};
  for (int i = 0; i < 4; ++i) {
    expect(strides[i] >= 0 && (sizes[i] <= 1 || strides[i] <= kMaxElements / sizes[i]), name,
           "strides of 0 to 2^60 elements", std::to_string(strides[i]));
    reach += strides[i] * (sizes[i] ? sizes[i] - 1 : 0);
    expect(reach <= kMaxElements, name, "strides that reach below 2^60 elements", std::to_string(reach));
  }
}

constexpr int64_t kMostTokens = INT32_MAX;  // of a sequence in a cache

// A table entry that leads out of the pages would be a fault, and so would a key that the ring no longer holds.
void expect_pages(const AttentionParams& p) {
  const Pages& pages = p.pages;
  const int64_t most = int64_t{1} << 40;
  expect_size("pages", pages.count, 0, INT32_MAX);
  expect_size("page_size", pages.slots, 1, most);
  expect_size("block_table", pages.width, 0, most);
  expect_size("sinks", pages.sinks, 0, INT32_MAX);
  expect_size("ring", pages.ring, 0, INT32_MAX);
  expect(pages.ring || !pages.sinks, "sinks", "0 without a ring", std::to_string(pages.sinks));
  expect(pages.dtype == DType::kInt8 || (pages.dtype >= DType::kFloat32 && pages.dtype <= DType::kFloat16), "cache",
         "numbers of a floating type or int8", std::to_string(static_cast<int>(pages.dtype)));
  expect(pages.dtype != DType::kInt8 || (p.k.scales && p.v.scales), "cache", "scales of int8 numbers", "null");
  expect_tensor("cache", p.k, {pages.count, p.kv_heads, pages.slots, p.head_dim});
  expect_tensor("cache", p.v, {pages.count, p.kv_heads, pages.slots, p.v_head_dim});
  if (!p.batch) return;
  expect(p.key_lens && p.query_lens, "lengths", "those of keys and of queries", "null");
  expect(p.from_end && !p.offset && !p.offsets, "align", "queries that stand at the last keys", "others");
  expect(!p.cu_seqlens_q && !p.cu_seqlens_k, "cu_seqlens", "none with a cache", "some");
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t keys = p.key_lens[b], queries = p.query_lens[b];
    expect_size("lengths", keys, 0, std::min(p.nk, kMostTokens));
    expect_size("lengths", queries, 0, p.new_k.data ? std::min(p.nq, keys) : p.nq);
    if (!queries) continue;
    const bool wrapped = pages.ring && keys > pages.sinks + pages.ring;
    expect(!wrapped || (p.left >= 0 && p.left + queries <= pages.ring && p.sinks <= pages.sinks), "window",
           "keys that the ring still holds",
           std::to_string(p.left + queries) + " keys of " + std::to_string(pages.ring));
    const int64_t used = wrapped ? pages.sinks + pages.ring : keys;
    const int64_t needed = (used + pages.slots - 1) / pages.slots;
    expect(needed <= pages.width, "block_table", std::to_string(needed) + " pages", std::to_string(pages.width));
    for (int64_t n = 0; n < needed; ++n)
      expect_size("block_table", pages.table[b * pages.width + n], 0, pages.count - 1);
  }
  if (p.new_k.data) {
    expect_tensor("k", p.new_k, {p.batch, p.kv_heads, p.nq, p.head_dim});
    expect_tensor("v", p.new_v, {p.batch, p.kv_heads, p.nq, p.v_head_dim});
  }
  if (p.rotated) {
    expect_angles("rope", p.k_angles, p.frame > 0);
    expect(p.frame > 0 || p.inv_freq, "rope", "frequencies", "null");
    expect(p.inv_freq_batch >= 0 && p.positions_batch >= 0, "positions", "strides >= 0", "others");
  }
  expect_size("window", p.frame, 0, INT32_MAX);
  expect(p.frame == 0 || (p.left >= 0 && p.left < p.frame && p.rotated && !p.tree), "window",
         "at most that of the cache, with rope and no tree", std::to_string(p.left));
  expect(!p.tree || (p.right < 0 && p.depths && p.tree_batch >= 0 && p.depths_batch >= 0), "tree",
         "depths, and no other order", "others");
}

void expect_call(const AttentionParams& p) {
  const int64_t most = int64_t{1} << 40;
  expect_size("batch", p.batch, 0, most);
  expect_size("q_heads", p.q_heads, 0, most);
  expect_size("kv_heads", p.kv_heads, 1, most);
  expect_size("nq", p.nq, 0, most);
  expect_size("nk", p.nk, 0, most);
  expect_size("head_dim", p.head_dim, 1, kMaxWidth);
  expect_size("v_head_dim", p.v_head_dim, 1, kMaxWidth);
  expect_size("threads", p.threads, 1, 4096);
  expect_dtype(p.dtype);
  expect(p.q_heads % p.kv_heads == 0, "q_heads", "a multiple of " + std::to_string(p.kv_heads) + " kv_heads",
         std::to_string(p.q_heads));
  expect_size("left", p.left, -1, INT32_MAX);
  expect_size("right", p.right, -1, INT32_MAX);
  expect_size("sinks", p.sinks, 0, INT32_MAX);
  expect_size("align", p.offset, -most, most);
  const bool packed = p.cu_seqlens_q || p.cu_seqlens_k;
  const int64_t rows = packed ? 1 : p.batch;
  expect_tensor("q", p.q, {rows, p.q_heads, p.nq, p.head_dim});
  if (p.pages.table) {
    expect_pages(p);
  } else {
    expect_tensor("k", p.k, {rows, p.kv_heads, p.nk, p.head_dim});
    expect_tensor("v", p.v, {rows, p.kv_heads, p.nk, p.v_head_dim});
    expect_angles("rope", p.q_angles, p.rotated && rows && p.q_heads && p.nq);
    expect_angles("rope", p.k_angles, p.rotated && rows && p.q_heads && p.nq && p.nk);
  }
  expect_tensor("out", p.out, {rows, p.q_heads, p.nq, p.v_head_dim});
  const bool any = rows && p.q_heads && p.nq;
  expect(!any || p.lse, "lse", "an address", "null");
  expect((p.lo == nullptr) == (p.hi == nullptr), "bounds", "lo and hi", "one of them");
  expect(p.bounds_batch >= 0, "bounds", "a stride >= 0", std::to_string(p.bounds_batch));
  if (packed) {
    expect(p.cu_seqlens_q && p.cu_seqlens_k, "cu_seqlens", "those of q and k", "one of them");
    expect(!p.key_mask && !p.lo, "key_mask, bounds", "none with packed sequences", "one");
    expect_cu_seqlens("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.nq);
    expect_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.nk);
  }
  expect(p.scale == p.scale && p.scale - p.scale == 0, "scale", "a finite number", std::to_string(p.scale));
  expect(p.softcap >= 0 && p.softcap - p.softcap == 0, "softcap", "a finite number >= 0", std::to_string(p.softcap));
  expect(p.dropout_p >= 0 && p.dropout_p < 1, "dropout_p", "a number in [0, 1)", std::to_string(p.dropout_p));
  expect_bias("bias", p.bias, p);
  expect(!p.bias.data || !packed, "bias", "none with packed sequences", "one");
  expect(p.slopes_batch >= 0, "alibi_slopes", "a stride >= 0", std::to_string(p.slopes_batch));
  expect(p.rotated >= 0 && p.rotated <= p.head_dim && p.rotated % 2 == 0, "rope", "an even width of at most head_dim",
         std::to_string(p.rotated));
}

}  // namespace

void check_forward(const AttentionParams& p) {
  expect(!p.pages.table, "cache", "none in a call of tensors", "one");
  expect_call(p);
}

void check_decode(const AttentionParams& p) {
  expect(p.pages.table, "block_table", "an address", "null");
  expect_call(p);
}

void check_backward(const AttentionParams& p) {
  check_forward(p);
  const int64_t rows = p.cu_seqlens_q ? 1 : p.batch;
  const bool any = rows && p.q_heads && p.nq;
  expect_tensor("dout", p.dout, {rows, p.q_heads, p.nq, p.v_head_dim});
  expect(!any || p.delta, "delta", "an address", "null");
  if (p.dq.data) {
    expect_tensor("dq", p.dq, {rows, p.q_heads, p.nq, p.head_dim});
    expect_tensor("dq_sum", p.dq_sum, {rows, p.q_heads, p.nq, p.head_dim});
  }
  expect_bias("dbias", p.dbias, p);
  expect(!p.dbias.data || p.bias.data, "dbias", "none without bias", "one");
  expect(!p.dslope_rows || p.alibi_slopes, "dslope_rows", "none without alibi_slopes", "one");
  if (p.dk.data) expect_tensor("dk", p.dk, {rows, p.kv_heads, p.nk, p.head_dim});
  if (p.dv.data) expect_tensor("dv", p.dv, {rows, p.kv_heads, p.nk, p.v_head_dim});
}

void check_angles(const AngleParams& p) {
  const int64_t most = int64_t{1} << 40;
  expect_size("tokens", p.tokens, 0, most);
  expect_size("half", p.half, 0, most);
  expect_size("threads", p.threads, 1, 4096);
  expect(p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64, "dtype", "float32 or float64",
         std::to_string(static_cast<int32_t>(p.dtype)));
  expect(!p.tokens || !p.half || (p.positions && p.inv_freq && p.cos && p.sin), "rope",
         "positions, frequencies and tables", "null");
}

void check_rope(const RopeParams& p) {
  const int64_t most = int64_t{1} << 40;
  expect_size("batch", p.batch, 0, most);
  expect_size("heads", p.heads, 0, most);
  expect_size("tokens", p.tokens, 0, most);
  expect_size("width", p.width, 1, most);
  expect_size("threads", p.threads, 1, 4096);
  expect_dtype(p.dtype);
  expect(p.rotated >= 0 && p.rotated <= p.width && p.rotated % 2 == 0, "rope", "an even width of at most that of x",
         std::to_string(p.rotated));
  expect_tensor("x", p.x, {p.batch, p.heads, p.tokens, p.width});
  expect_tensor("out", p.out, {p.batch, p.heads, p.tokens, p.width});
  const bool turns = p.rotated && p.batch && p.heads && p.tokens;
  expect(!turns || (p.positions && p.inv_freq), "rope", "positions and frequencies", "null");
  expect(p.positions_batch >= 0, "positions", "a stride >= 0", std::to_string(p.positions_batch));
}

}  // namespace longattn
