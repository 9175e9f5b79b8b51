// Which keys a query may see: the mirror of longattn/mask.py, cross-tested against it. Functions are static: this
// header is compiled once per instruction set, and a shared inline definition would leak the widest one.
#pragma once

#include <cstdint>

#include "longattn/params.h"

namespace longattn {

struct Mask {
  int64_t left, right, sinks;  // -1: unbounded
};

// The keys that queries at positions first..last can see: [0, sinks) + [start, stop), and the part
// [full_start, full_stop) of the latter that every one of them sees.
struct KeyRange {
  int64_t sinks, start, full_start, full_stop, stop;
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static inline bool allows(const Mask& mask, int64_t position, int64_t key) {
  return (mask.right < 0 || key <= position + mask.right) &&
         (mask.left < 0 || key >= position - mask.left || key < mask.sinks);
}

static inline KeyRange kv_range(const Mask& mask, int64_t first, int64_t last, int64_t lk) {
  KeyRange range;
  range.stop = mask.right < 0 ? lk : larger(0, smaller(lk, last + mask.right + 1));
  range.start = mask.left < 0 ? 0 : larger(0, smaller(range.stop, first - mask.left));
  range.full_stop = mask.right < 0 ? lk : larger(0, smaller(lk, first + mask.right + 1));
  const int64_t full_start = mask.left < 0 ? 0 : larger(0, last - mask.left);
  range.full_start = smaller(larger(full_start, range.start), range.stop);
  range.sinks = smaller(mask.sinks, range.start);
  return range;
}

// One sequence of a call: where its tokens lie, how many there are, and where its queries stand.
struct Sequence {
  int64_t index;        // its number, b
  int64_t row;          // its batch row in memory: 0 if packed
  int64_t q_start, lq;  // first query and number of queries in that row
  int64_t k_start, lk;  // the same for keys; lk is cut to key_lens
  int64_t shift;        // query i stands at position i + shift
};

static inline Sequence sequence(const AttentionParams& p, int64_t b) {
  Sequence s{b, b, 0, p.nq, 0, p.nk, p.offsets ? p.offsets[b] : p.offset};
  if (p.cu_seqlens_q) {
    s.row = 0;
    s.q_start = p.cu_seqlens_q[b];
    s.lq = p.cu_seqlens_q[b + 1] - s.q_start;
    s.k_start = p.cu_seqlens_k[b];
    s.lk = p.cu_seqlens_k[b + 1] - s.k_start;
  }
  if (p.query_lens) s.lq = p.query_lens[b];
  const int64_t keys = p.key_lens ? p.key_lens[b] : s.lk;
  if (p.from_end) s.shift += keys - s.lq;
  s.lk = larger(0, smaller(s.lk, keys));
  return s;
}

static inline int64_t position_of(const AttentionParams& p, const Sequence& s, int64_t query) {
  return s.shift + (p.depths ? p.depths[s.index * p.depths_batch + query] : query);
}

// The keys that queries first..last of a sequence can see.
static inline KeyRange kv_range(const AttentionParams& p, const Sequence& s, int64_t first, int64_t last) {
  int64_t lowest = position_of(p, s, first), highest = position_of(p, s, last);
  for (int64_t query = first; p.depths && query <= last; ++query) {
    lowest = smaller(lowest, position_of(p, s, query));
    highest = larger(highest, position_of(p, s, query));
  }
  KeyRange range = kv_range({p.left, p.right, p.sinks}, lowest, highest, s.lk);
  if (p.frame > 0) {  // sinks turn apart from the rest
    range.sinks = smaller(p.sinks, range.stop);
    range.start = larger(range.start, range.sinks);
    range.full_start = larger(range.full_start, range.start);
  }
  return range;
}

}  // namespace longattn
