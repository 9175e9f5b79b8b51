// Everything that is instantiated, in one table: tiles by padded head width.
//
// A kernel's tile is 64 queries a warpgroup by so many keys: the largest whose scores, weights and outputs fit 240
// registers a thread (160 with three warpgroups), and whose operands fit shared memory twice. Boundaries cost whole
// tiles, so windows have smaller ones.
#pragma once

namespace longattn::cuda {

struct ForwardTileShape {
  int warpgroups, keys;
};
struct ForwardRow {
  int width;
  ForwardTileShape full, windowed, general;
};
constexpr ForwardRow kForwardTable[] = {
    {64, {3, 128}, {3, 128}, {2, 128}},   //
    {96, {2, 176}, {2, 128}, {2, 128}},   //
    {128, {2, 176}, {2, 128}, {2, 128}},  //
    {192, {2, 112}, {2, 96}, {2, 96}},    //
    {256, {2, 80}, {2, 80}, {2, 64}},
};

constexpr ForwardRow forward_row(int width) {
  for (const ForwardRow& row : kForwardTable)
    if (row.width == width) return row;
  return {};
}

// A tile of keys visits tiles of queries, which come, like their dO, through rings of so many stages. With 128 keys a
// warpgroup has 64 of its own, and both their gradients: as many registers as it may have. Wider heads leave it one
// gradient, of 64 keys that both share.
struct BackwardRow {
  int width, queries, keys, query_stages, output_stages;
};
constexpr BackwardRow kBackwardTable[] = {
    {64, 128, 128, 3, 2},  //
    {128, 64, 128, 3, 2},  //
    {192, 64, 64, 3, 2},   //
    {256, 64, 64, 2, 1},
};

constexpr BackwardRow backward_row(int width) {
  for (const BackwardRow& row : kBackwardTable)
    if (row.width == width) return row;
  return {};
}

// Of calls on a cache, whose tiles are 64 rows of queries by so many keys.
struct DecodeRow {
  int width;
};
constexpr DecodeRow kDecodeWidths[] = {{64}, {128}, {256}};

constexpr int decode_keys(int width) { return width <= 128 ? 128 : 64; }

// The smallest width that a head fits, 0 if none does: the rest is zeros that TMA fills in.
template <class Row, int Count>
constexpr int padded_width(const Row (&table)[Count], int width) {
  for (const Row& row : table)
    if (width <= row.width) return row.width;
  return 0;
}

}  // namespace longattn::cuda
