#include <algorithm>
#include <optional>

#include "cpu/attention.h"
#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "cpu/tiles.h"
#include "cpu/turned.h"

namespace longattn {

namespace {

// With fewer tiles than this (decoding: few queries, many keys) each is cut along its keys, and the pieces are merged.
constexpr int64_t kEnoughTiles = 64;
// A piece has at least so many keys for each row of its tile, within limits: its result is written and read once more.
constexpr int64_t kKeysPerRow = 16, kFewestKeys = 512, kMostKeys = 4096;

// Pieces per tile: from shapes alone, so that results do not depend on the number of threads.
int64_t pieces_per_tile(const AttentionParams& p, const std::vector<QueryTile>& tiles) {
  const int64_t count = static_cast<int64_t>(tiles.size());
  if (count == 0 || count > kEnoughTiles) return 1;
  int64_t keys = 0, queries = 0;  // the most of a tile
  for (const QueryTile& tile : tiles) {
    const KeyRange range = keys_of(p, tile);
    keys = std::max(keys, range.stop - range.start);
    queries = std::max(queries, tile.queries);
  }
  const int64_t rows = queries * (p.q_heads / p.kv_heads);
  const int64_t piece_keys = std::clamp(rows * kKeysPerRow, kFewestKeys, kMostKeys);
  return std::max<int64_t>(1, std::min(keys / piece_keys, kEnoughTiles / count));
}

// The piece of a tile's keys, cut at whole blocks; the first takes the sinks.
QueryTile piece_of(const AttentionParams& p, QueryTile tile, int64_t piece, int64_t pieces) {
  const KeyRange keys = keys_of(p, tile);
  const int64_t blocks = (keys.stop - keys.start + kKeyBlock - 1) / kKeyBlock;
  if (piece > 0) tile.first_key = keys.start + blocks * piece / pieces * kKeyBlock;
  if (piece + 1 < pieces) tile.last_key = keys.start + blocks * (piece + 1) / pieces * kKeyBlock;
  return tile;
}

}  // namespace

void attention_forward(const AttentionParams& params) {
  check_forward(params);
  run_forward(params);
}

void run_forward(const AttentionParams& given) {
  const Kernels& isa = kernels();
  AttentionParams params = given;
  const std::vector<QueryTile> tiles = query_tiles(params);
  std::optional<Turned> keys;
  const int64_t heads = params.batch * params.kv_heads;  // whose keys each of its tiles reads
  if (params.rotated && !params.pages.table && isa.multiplies(params.dtype) &&
      static_cast<int64_t>(tiles.size()) > heads) {
    keys.emplace(params, params.k, params.k_angles, params.kv_heads, params.nk);
    params.k = keys->view();
    params.k_turned = true;
  }
  const int64_t count = static_cast<int64_t>(tiles.size()), pieces = pieces_per_tile(params, tiles);
  const Scratch scratch(params.threads, isa.forward_scratch(params, panels_per_tile(params)));
  if (pieces == 1) {
    parallel_for(params.threads, count,
                 [&](int64_t thread, int64_t index) { isa.forward(params, tiles[index], scratch.of(thread)); });
    return;
  }
  const int64_t number = params.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t piece_bytes = panels_per_tile(params) * kPanelRows * (params.v_head_dim + 1) * number;
  const Scratch partials(count, pieces * piece_bytes);
  const auto rows_bytes = [&](const QueryTile& tile) {
    return tile.queries * (params.q_heads / params.kv_heads) * (params.v_head_dim + 1) * number;
  };
  parallel_for(params.threads, count * pieces, [&](int64_t thread, int64_t index) {
    const int64_t n = index / pieces, piece = index % pieces;
    QueryTile tile = piece_of(params, tiles[n], piece, pieces);
    tile.partial = partials.of(n) + piece * rows_bytes(tile);
    isa.forward(params, tile, scratch.of(thread));
  });
  parallel_for(params.threads, count,
               [&](int64_t, int64_t n) { isa.forward_merge(params, tiles[n], partials.of(n), pieces); });
}

}  // namespace longattn
