#include "cpu/tiles.h"

#include <algorithm>

namespace longattn {

namespace {

// Queries of a tile.
int64_t tile_queries(const AttentionParams& p) {
  const int64_t group = std::max<int64_t>(1, p.q_heads / p.kv_heads);
  return std::max<int64_t>(1, kTilePanels * kPanelRows / group);
}

}  // namespace

KeyRange keys_of(const AttentionParams& p, const QueryTile& tile) {
  const int64_t first = tile.first_query + tile.sequence.shift;
  return kv_range({p.left, p.right, p.sinks}, first, first + tile.queries - 1, tile.sequence.lk);
}

int64_t panels_per_tile(const AttentionParams& p) {
  const int64_t rows = tile_queries(p) * (p.q_heads / p.kv_heads);
  return (rows + kPanelRows - 1) / kPanelRows;
}

std::vector<QueryTile> query_tiles(const AttentionParams& p) {
  const int64_t group = p.q_heads / p.kv_heads, queries = tile_queries(p);
  std::vector<std::pair<int64_t, QueryTile>> costed;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, b);
    for (int64_t first = 0; first < s.lq; first += queries)
      for (int64_t head = 0; head < p.kv_heads && group; ++head) {
        const QueryTile tile{s, head, first, std::min(queries, s.lq - first)};
        const KeyRange keys = keys_of(p, tile);
        costed.emplace_back((std::max<int64_t>(0, keys.sinks) + keys.stop - keys.start) * tile.queries, tile);
      }
  }
  std::stable_sort(costed.begin(), costed.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<QueryTile> tiles;
  tiles.reserve(costed.size());
  for (const auto& entry : costed) tiles.push_back(entry.second);
  return tiles;
}

}  // namespace longattn
