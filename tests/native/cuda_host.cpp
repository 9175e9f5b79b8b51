// What the CUDA backend computes of shapes, on the host or alike on both sides, for tests/backends/cuda/test_host.py.
// Compiled with the emulator's headers, as there may be no nvcc.
#include "host/plan.h"
#include "host/table.h"
#include "kernels/schedule.h"

longattn::emulator::Options longattn::emulator::options;

using namespace longattn::cuda;

namespace {

Visibility mask(int left, int right, int sinks) {
  LongattnCall call{};
  call.left = left;
  call.right = right;
  call.sinks = sinks;
  return visibility(call);
}

}  // namespace

extern "C" {

// to: sizes[4], strides[3], box[4].
void host_map_shape(int64_t batch_stride, int64_t head_stride, int64_t token_stride, int batch, int heads, int tokens,
                    int width, int rows, uint64_t* to) {
  const LongattnRows x{nullptr, batch_stride, head_stride, token_stride};
  const longattn::hopper::MapShape shape = map_shape(x, batch, heads, tokens, width, rows);
  for (int i = 0; i < 4; ++i) to[i] = shape.sizes[i];
  for (int i = 0; i < 3; ++i) to[4 + i] = shape.strides[i];
  for (int i = 0; i < 4; ++i) to[7 + i] = shape.box[i];
}

void host_tile_at(int query_tiles, int heads, int together, int longest_last, int t, int* to) {
  const ScheduledTile tile = tile_at({query_tiles, heads, together, longest_last}, t);
  to[0] = tile.query_tile;
  to[1] = tile.head;
}

int host_heads_together(int heads, int group, int64_t bytes) { return heads_together(heads, group, bytes); }

// The tiles that queries first..last visit, in order; then first and end of those that all see whole. Returns the
// count.
int host_key_tiles(int left, int right, int sinks, int shift, int nk, int first, int last, int size, int* to) {
  const Sequence s{0, 0, last + 1, 0, nk, shift};
  const KeyTiles tiles = key_tiles(mask(left, right, sinks), s, shift + first, shift + last, size);
  for (int i = 0; i < tiles.count(); ++i) to[i] = tiles.at(i);
  to[tiles.count()] = tiles.full_first;
  to[tiles.count() + 1] = tiles.full_end;
  return tiles.count();
}

// The same for queries whose bounds lie in [low, high).
int host_key_tiles_within(int left, int right, int sinks, int shift, int nk, int first, int last, int size, int low,
                          int high, int* to) {
  const Sequence s{0, 0, last + 1, 0, nk, shift};
  const KeyTiles all = key_tiles(mask(left, right, sinks), s, shift + first, shift + last, size);
  const KeyTiles tiles = within(all, {low, high}, size);
  for (int i = 0; i < tiles.count(); ++i) to[i] = tiles.at(i);
  return tiles.count();
}

// Of query i of sequence b.
void host_bounds(int nq, int nk, const int32_t* lo, const int32_t* hi, int batch_stride, int b, int i, int* to) {
  LongattnCall call{};
  call.nq = nq;
  call.nk = nk;
  call.lo = lo;
  call.hi = hi;
  call.bounds_batch = batch_stride;
  const Visibility v = visibility(call);
  const Bounds bounds = bounds_of(v, b, sequence(v, b), i);
  to[0] = bounds.low;
  to[1] = bounds.high;
}

int64_t host_row_term_count(int q_heads, int batch, int nq, int bounded, int queries) {
  LongattnCall call{};
  const int32_t bound = 0;
  call.q_heads = q_heads;
  call.batch = batch;
  call.nq = nq;
  call.lo = bounded ? &bound : nullptr;
  return row_term_count(call, queries);
}

void host_query_tiles(int left, int right, int sinks, int shift, int nq, int nk, int n, int keys, int size, int* to) {
  const QueryTiles tiles = query_tiles(mask(left, right, sinks), {0, 0, nq, 0, nk, shift}, n, keys, size);
  to[0] = tiles.first;
  to[1] = tiles.end;
}

int host_later_visitors(int left, int right, int sinks, int shift, int nq, int nk, int n, int m, int keys, int size) {
  return later_visitors(mask(left, right, sinks), {0, 0, nq, 0, nk, shift}, n, m, keys, size);
}

// to: row, q_start, nq, k_start, nk, shift.
void host_sequence(int nq, int nk, int offset, int from_end, const int32_t* key_lens, const int32_t* cu_q,
                   const int32_t* cu_k, int b, int* to) {
  LongattnCall call{};
  call.nq = nq;
  call.nk = nk;
  call.offset = offset;
  call.from_end = from_end;
  call.key_lens = key_lens;
  call.cu_seqlens_q = cu_q;
  call.cu_seqlens_k = cu_k;
  const Sequence s = sequence(visibility(call), b);
  const int fields[6] = {s.row, s.q_start, s.nq, s.k_start, s.nk, s.shift};
  for (int i = 0; i < 6; ++i) to[i] = fields[i];
}

// First tile of packed sequence b, whose queries begin at q_start, and tiles of all.
void host_row_tiles(int nq, int batch, int q_start, int b, int size, int* to) {
  LongattnCall call{};
  const int32_t none = 0;
  call.nq = nq;
  call.batch = batch;
  call.cu_seqlens_q = &none;
  const RowTiles rows = row_tiles(call, size);
  to[0] = rows.first({0, q_start, 0, 0, 0, 0}, b, size);
  to[1] = rows.of_head;
}

int host_padded_width(int kind, int width) {
  return kind == 0   ? padded_width(kForwardTable, width)
         : kind == 1 ? padded_width(kBackwardTable, width)
                     : padded_width(kDecodeWidths, width);
}

int host_cache_piece(int table_width, int page_size, int keys) {
  LongattnCall call{};
  call.table_width = table_width;
  call.page_size = page_size;
  return cache_piece(call, keys);
}

int host_split_count(int batch, int q_heads, int kv_heads, int nq, int nk, int left, int processors) {
  longattn::emulator::options.processors = processors;
  LongattnCall call{};
  call.batch = batch;
  call.q_heads = q_heads;
  call.kv_heads = kv_heads;
  call.nq = nq;
  call.nk = nk;
  call.left = left;
  return split_count(call);
}
}
