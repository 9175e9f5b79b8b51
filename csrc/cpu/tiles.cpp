#include "cpu/tiles.h"

#include <algorithm>

namespace longattn {

namespace {

int64_t cost(const AttentionParams& p, const QueryTile& tile) {
  const KeyRange keys = keys_of(p, tile);
  return (std::max<int64_t>(0, keys.sinks) + keys.stop - keys.start) * tile.queries;
}

}  // namespace

KeyRange keys_of(const AttentionParams& p, const QueryTile& tile) {
  return kv_range(p, tile.sequence, tile.first_query, tile.first_query + tile.queries - 1);
}

int64_t panels_per_tile(const AttentionParams& p) {
  const int64_t rows = queries_of_tile(p) * (p.q_heads / p.kv_heads);
  return (rows + kPanelRows - 1) / kPanelRows;
}

std::vector<QueryTile> query_tiles(const AttentionParams& p) {
  const int64_t group = p.q_heads / p.kv_heads, queries = queries_of_tile(p);
  if (p.nq == 0 || group == 0) return {};  // however many sequences and heads there are
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.batch; ++b) sequences.push_back(sequence(p, b));
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const Sequence& a, const Sequence& b) { return a.lq * a.lk > b.lq * b.lk; });
  std::vector<QueryTile> tiles;
  for (const Sequence& s : sequences)
    for (int64_t head = 0; head < p.kv_heads; ++head) {  // at work on one head, threads share its keys in caches
      const size_t begin = tiles.size();
      for (int64_t first = 0; first < s.lq; first += queries)
        tiles.push_back({s, head, first, std::min(queries, s.lq - first)});
      std::stable_sort(tiles.begin() + begin, tiles.end(),
                       [&](const QueryTile& a, const QueryTile& b) { return cost(p, a) > cost(p, b); });
    }
  return tiles;
}

}  // namespace longattn
