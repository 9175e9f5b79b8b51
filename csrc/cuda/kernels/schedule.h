// The order in which persistent blocks take tiles.
#pragma once

#include "hopper/platform.h"

namespace longattn::cuda {

// Tiles of queries of all heads (b * q_heads + h). Heads go by in groups whose keys and values stay in the second-level
// cache together.
struct Schedule {
  int query_tiles, heads, together;
  int longest_last;  // later tiles see more keys: they start first
};

struct ScheduledTile {
  int query_tile, head;
};

LONGATTN_HOST_DEVICE ScheduledTile tile_at(const Schedule& s, int t) {
  const int group = t / (s.together * s.query_tiles), in_group = t - group * s.together * s.query_tiles;
  const int rest = s.heads - group * s.together, size = rest < s.together ? rest : s.together;
  if (!s.longest_last) return {in_group % s.query_tiles, group * s.together + in_group / s.query_tiles};
  return {s.query_tiles - 1 - in_group / size, group * s.together + in_group % size};
}

// Query heads that start side by side: as many as have keys and values of so many bytes a key/value head in the cache.
LONGATTN_HOST_DEVICE int heads_together(int heads, int group, int64_t bytes_per_head) {
  constexpr int64_t kCached = 32 << 20;
  const int64_t kv_heads = kCached / (bytes_per_head < 1 ? 1 : bytes_per_head);
  const int64_t fit = (kv_heads < 1 ? 1 : kv_heads) * group;
  return static_cast<int>(fit < heads ? fit : heads);
}

}  // namespace longattn::cuda
