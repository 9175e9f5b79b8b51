// From a call to the parameters of kernels: host code that knows no hardware.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "call.h"
#include "hopper/launch.h"
#include "kernels/rows.h"
#include "kernels/visibility.h"

namespace longattn::cuda {

// The map of x [batch, heads, tokens, width] for tiles of so many rows. Where there is one of a kind its stride has no
// meaning, but has to be legal. No tokens at all are described as one, that nobody reads.
inline hopper::MapShape map_shape(const LongattnRows& x, int batch, int heads, int tokens, int width, int rows) {
  const auto bytes = [&](int64_t stride, int count) {
    return static_cast<uint64_t>(count <= 1 ? width : stride) * sizeof(uint16_t);
  };
  return {{static_cast<uint64_t>(width), static_cast<uint64_t>(larger(tokens, 1)), static_cast<uint64_t>(heads),
           static_cast<uint64_t>(batch)},
          {bytes(x.token, tokens), bytes(x.head, heads), bytes(x.batch, batch)},
          {64, static_cast<uint32_t>(rows), 1, 1}};
}

inline Visibility visibility(const LongattnCall& call) {
  const auto side = [](int32_t x) { return x < 0 || x > kUnbounded ? kUnbounded : x; };
  const int left = side(call.left);
  return {left,
          side(call.right),
          left < kUnbounded ? call.sinks : 0,
          call.offset,
          call.from_end,
          call.offsets,
          call.key_lens,
          call.key_mask,
          call.cu_seqlens_q,
          call.cu_seqlens_k,
          call.query_lens,
          call.lo,
          call.hi,
          call.bounds_batch,
          call.nq,
          call.nk};
}

// Batch rows of the tensors.
inline int memory_rows(const LongattnCall& call) { return call.cu_seqlens_q ? 1 : call.batch; }

// Whether scores are more than products times a positive scale.
inline bool has_other_scores(const LongattnCall& call) { return call.softcap > 0.0f || !(call.scale > 0.0f); }

// By which scores are multiplied in tanh x = 1 - 2 / (1 + 2^(2 log2(e) x)).
inline float softcap_rate(const LongattnCall& call) {
  constexpr float kLog2E = 1.4426950408889634f;
  return call.softcap > 0.0f ? 2.0f * kLog2E / call.softcap : 0.0f;
}

inline bool is_windowed(const Visibility& mask) { return mask.left < kUnbounded || mask.right < kUnbounded; }

inline bool is_ragged(const LongattnCall& call) { return call.cu_seqlens_q || call.key_lens; }

// Tiles of so many queries that a sequence has at most, and that all sequences have together.
inline int longest_queries(const LongattnCall& call) { return call.cu_seqlens_q ? call.max_seqlen_q : call.nq; }
inline int longest_keys(const LongattnCall& call) { return call.cu_seqlens_k ? call.max_seqlen_k : call.nk; }
inline RowTiles row_tiles(const LongattnCall& call, int size) {
  if (call.cu_seqlens_q) return {call.nq / size + call.batch, 0};
  const int tiles = ceil_divided(call.nq, size);
  return {call.batch * tiles, tiles};
}

// Rows of the boxes that fetch a tile of so many keys of a cache: a page of its own for each sequence is read as a
// tensor is; smaller pages in pieces that pages and tiles are both made of, if swizzle patterns (8 rows) fit. 0: they
// do not.
inline int cache_piece(const LongattnCall& call, int keys) {
  if (call.table_width == 1) return keys;
  const int piece = std::gcd(call.page_size, keys);
  return piece % 8 ? 0 : piece;
}

// Numbers that come with each query of the backward: its log-sum, and its bounds.
inline int query_terms(const LongattnCall& call) { return call.lo ? 3 : 1; }

// Entries that those take of all queries, and deltas; and the bounds of each tile of queries.
inline int64_t row_term_count(const LongattnCall& call, int queries) {
  const int64_t tiles = row_tiles(call, queries).of_head;
  return call.q_heads * tiles * queries * (query_terms(call) + 1) + (call.lo ? 2 * tiles : 0);
}

// Blocks that share the keys of a tile of queries on a cache: enough for all processors, none with less than 4 tiles.
inline int split_count(const LongattnCall& call) {
  constexpr int kTiles = 4, kKeys = 64, kMost = 128;
  const int rows = call.nq * (call.q_heads / call.kv_heads);
  const int64_t blocks = static_cast<int64_t>(call.batch) * call.kv_heads * ceil_divided(rows, 64);
  int64_t keys = call.nk;
  if (call.left >= 0) keys = std::min<int64_t>(keys, static_cast<int64_t>(call.left) + call.nq + call.sinks);
  const int64_t wanted = hopper::multiprocessors() / std::max<int64_t>(1, blocks);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({wanted, keys / (kTiles * kKeys), kMost})));
}

}  // namespace longattn::cuda
