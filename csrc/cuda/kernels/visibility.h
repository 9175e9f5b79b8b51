// Which keys a query sees: the mirror of longattn/mask.py for kernels. Positions are below 2^29.
#pragma once

#include "hopper/platform.h"

namespace longattn::cuda {

constexpr int kUnbounded = 1 << 30;  // a side of the window that nobody reaches the end of

// Of all sequences of a call.
struct Visibility {
  int left, right, sinks, offset;
  int from_end;
  const int32_t* offsets;
  const int32_t* key_lens;
  const uint8_t* key_mask;  // [batch, nk]
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* query_lens;
  const int32_t *lo, *hi;  // [nq] or [batch, nq]
  int bounds_batch;
  int nq, nk;
};

// Where a sequence lies in memory, and where its queries stand: query i at position i + shift.
struct Sequence {
  int row, q_start, nq, k_start, nk, shift;
};

LONGATTN_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
LONGATTN_HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }
LONGATTN_HOST_DEVICE int clamped(int x, int low, int high) { return smaller(larger(x, low), high); }
LONGATTN_HOST_DEVICE int floor_divided(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
LONGATTN_HOST_DEVICE int ceil_divided(int a, int b) { return floor_divided(a + b - 1, b); }

// What cu_seqlens hold stays on the device: entries are cut to the tensors, whatever they are.
LONGATTN_HOST_DEVICE Sequence sequence(const Visibility& v, int b) {
  Sequence s{b, 0, v.nq, 0, v.nk, v.offsets ? v.offsets[b] : v.offset};
  if (v.cu_seqlens_q) {
    s.row = 0;
    s.q_start = clamped(v.cu_seqlens_q[b], 0, v.nq);
    s.nq = clamped(v.cu_seqlens_q[b + 1] - s.q_start, 0, v.nq - s.q_start);
    s.k_start = clamped(v.cu_seqlens_k[b], 0, v.nk);
    s.nk = clamped(v.cu_seqlens_k[b + 1] - s.k_start, 0, v.nk - s.k_start);
  }
  if (v.query_lens) s.nq = clamped(v.query_lens[b], 0, v.nq);
  const int keys = v.key_lens ? v.key_lens[b] : s.nk;
  if (v.from_end) s.shift += keys - s.nq;
  s.nk = clamped(keys, 0, s.nk);
  return s;
}

// Whether anyone may see key j of sequence b, as far as the key alone says.
LONGATTN_HOST_DEVICE bool is_shown(const Visibility& v, int b, const Sequence& s, int j) {
  return j < s.nk && (!v.key_mask || v.key_mask[static_cast<int64_t>(b) * v.nk + j]);
}

// A query sees keys of [low, high) only; so do some queries together, of the range from the lowest to the highest.
struct Bounds {
  int low, high;
};

LONGATTN_HOST_DEVICE Bounds united(Bounds a, Bounds b) { return {smaller(a.low, b.low), larger(a.high, b.high)}; }

// Of query i; one past the last has the last one's.
LONGATTN_HOST_DEVICE Bounds bounds_of(const Visibility& v, int b, const Sequence& s, int i) {
  if (!v.lo) return {0, s.nk};
  const int64_t at = static_cast<int64_t>(b) * v.bounds_batch + smaller(i, s.nq - 1);
  return {clamped(v.lo[at], 0, s.nk), clamped(v.hi[at], 0, s.nk)};
}

// The tiles of `size` keys that queries at positions lowest..highest see some key of: [first_sink, sinks), then
// [first, end); of the latter, all of them see all of [full_first, full_end).
struct KeyTiles {
  int first_sink, sinks, first, full_first, full_end, end;
  LONGATTN_HOST_DEVICE int count() const { return sinks - first_sink + end - first; }
  // The i-th tile that a kernel visits: from the last to the first, then the sinks.
  LONGATTN_HOST_DEVICE int at(int i) const { return i < end - first ? end - 1 - i : sinks - 1 - (i - (end - first)); }
};

LONGATTN_HOST_DEVICE KeyTiles key_tiles(const Visibility& v, const Sequence& s, int lowest, int highest, int size) {
  const int stop = clamped(highest + v.right + 1, 0, s.nk);
  const int start = clamped(lowest - v.left, 0, stop);
  KeyTiles tiles;
  tiles.first_sink = 0;
  tiles.first = start / size;
  tiles.end = larger(tiles.first, (stop + size - 1) / size);
  tiles.sinks = smaller((smaller(v.sinks, s.nk) + size - 1) / size, tiles.first);
  tiles.full_end = clamped(clamped(lowest + v.right + 1, 0, s.nk) / size, tiles.first, tiles.end);
  tiles.full_first = clamped((larger(highest - v.left, 0) + size - 1) / size, tiles.first, tiles.full_end);
  return tiles;
}

// Those of them that the queries' bounds leave.
LONGATTN_HOST_DEVICE KeyTiles within(KeyTiles tiles, Bounds bounds, int size) {
  const int low = bounds.low / size, high = (bounds.high + size - 1) / size;
  tiles.first_sink = smaller(low, tiles.sinks);
  tiles.sinks = clamped(high, tiles.first_sink, tiles.sinks);
  tiles.first = clamped(low, tiles.first, tiles.end);
  tiles.end = clamped(high, tiles.first, tiles.end);
  return tiles;
}

// The tiles of `size` queries that see some key of tile n: [first, end), by positions alone. The backward of a tile of
// keys visits them all, and in a deterministic one every block counts who does so before it.
struct QueryTiles {
  int first, end;
};

LONGATTN_HOST_DEVICE bool is_sink_tile(const Visibility& v, int n, int keys) {
  return v.left < kUnbounded && n * keys < v.sinks;
}

LONGATTN_HOST_DEVICE QueryTiles query_tiles(const Visibility& v, const Sequence& s, int n, int keys, int size) {
  const int all = (s.nq + size - 1) / size;
  QueryTiles tiles{clamped(floor_divided(n * keys - s.shift - v.right, size), 0, all), all};
  if (!is_sink_tile(v, n, keys))
    tiles.end = clamped(floor_divided(n * keys + keys - 1 - s.shift + v.left, size) + 1, tiles.first, all);
  if (n * keys >= s.nk) tiles.end = tiles.first;
  return tiles;
}

// How many tiles of keys above n visit the tile m of queries.
LONGATTN_HOST_DEVICE int later_visitors(const Visibility& v, const Sequence& s, int n, int m, int keys, int size) {
  const int all = (s.nk + keys - 1) / keys, lowest = s.shift + m * size;
  const int end = clamped(floor_divided(lowest + size - 1 + v.right, keys) + 1, 0, all);
  const int sinks = v.left < kUnbounded ? smaller((v.sinks + keys - 1) / keys, end) : 0;
  const int first = clamped(floor_divided(lowest - v.left, keys), sinks, larger(end, sinks));
  if (n >= first) return end - 1 - n;
  return larger(end - first, 0) + sinks - 1 - n;
}

}  // namespace longattn::cuda
