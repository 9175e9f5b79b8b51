// What the roles of the backward share: parameters, shared memory, and which tiles a block visits.
#pragma once

#include "kernels/forward.h"
#include "kernels/rows.h"

namespace longattn::cuda {

struct alignas(128) BackwardParams {
  TensorMap q, k, v, dout;
  LongattnRows out_rows, dout_rows, dq, dk, dv;
  const float *lse, *dlse;
  // Of RowTiles' rows, tile by tile: log2(e) lse, and +inf where nobody looks; then, with bounds, both; and delta.
  float *log_sums, *delta;
  Bounds* tile_bounds;  // of RowTiles' tiles of one head
  float* dq_sum;        // of RowTiles' tiles: blocks [64 x 64], each in the order of an accumulator
  int32_t* turns;       // of each block: tiles of keys that were added; deterministic only
  Visibility mask;
  RowTiles rows;
  int q_heads, kv_heads, group, head_dim, v_head_dim, deterministic, ragged;
  float scale, softcap, unit;
  float softcap_rate, curvature;  // 2 log2(e) / softcap, 1 / softcap^2; 0 without one
};

// What a kernel is compiled for. Not both: neither leaves the registers that the other needs.
enum class BackwardKind : int {
  kPlain,
  kGeneral,  // scores that are more than products times a positive scale
  kBounded   // bounds
};

template <class Element_, int Width_, int Queries_, int Keys_, int QueryStages_, int OutputStages_, BackwardKind Kind_>
struct BackwardConfig {
  using Element = Element_;
  static constexpr int kWidth = Width_, kQueries = Queries_, kKeys = Keys_, kThreads = 384;
  static constexpr bool kGeneral = Kind_ == BackwardKind::kGeneral, kBounded = Kind_ == BackwardKind::kBounded;
  static constexpr bool kSharesKeys = kKeys == 64;  // one gradient of all keys a warpgroup; else both, of 64 keys each
  static constexpr int kQueryStages = QueryStages_, kOutputStages = OutputStages_;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8));

  // dQ of a tile in blocks of 64 rows and columns, of which the first warpgroup computes the first.
  static constexpr int kBlock = kSumBlock, kBlocks = kQueries * kWidth / kBlock, kBlocksOfFirst = (kBlocks + 1) / 2;
  static LONGATTN_HOST_DEVICE constexpr int blocks(int warpgroup) {
    return warpgroup ? kBlocks - kBlocksOfFirst : kBlocksOfFirst;
  }
  static LONGATTN_HOST_DEVICE constexpr int first_block(int warpgroup) { return warpgroup ? kBlocksOfFirst : 0; }
};

template <class Config>
struct BackwardLayout {
  static constexpr int kQueryStages = Config::kQueryStages, kOutputStages = Config::kOutputStages;
  static constexpr int kKeyBytes = tile_bytes(Config::kKeys, Config::kWidth);
  static constexpr int kQueryBytes = tile_bytes(Config::kQueries, Config::kWidth);
  static constexpr int kScoreBytes = tile_bytes(Config::kKeys, Config::kQueries);
  static constexpr int kTermBytes = Config::kQueries * 4, kSumBytes = Config::kBlock * 4;
  static constexpr int kQueryTerms = Config::kBounded ? 3 : 1;  // numbers that come with a query
  static constexpr int kKeys = 0, kValues = kKeys + kKeyBytes, kQueries = kValues + kKeyBytes;
  static constexpr int kOutputs = kQueries + kQueryStages * kQueryBytes;
  static constexpr int kScores = kOutputs + kOutputStages * kQueryBytes, kSums = kScores + 2 * kScoreBytes;
  static constexpr int kLogSums = kSums + 2 * kSumBytes;
  static constexpr int kDelta = kLogSums + kQueryStages * kQueryTerms * kTermBytes;
  static constexpr int kBarriers = kDelta + kOutputStages * kTermBytes;
  static constexpr int kBytes = kBarriers + 8 * (3 + 2 * kQueryStages + 2 * kOutputStages) + 1024;
  static_assert(kBytes <= 232448);

  uint32_t base;

  LONGATTN_DEVICE uint32_t keys() const { return base + kKeys; }
  LONGATTN_DEVICE uint32_t values() const { return base + kValues; }
  LONGATTN_DEVICE uint32_t queries(int stage) const { return base + kQueries + stage * kQueryBytes; }
  LONGATTN_DEVICE uint32_t outputs(int stage) const { return base + kOutputs + stage * kQueryBytes; }  // dO
  LONGATTN_DEVICE uint32_t scores(int buffer) const { return base + kScores + buffer * kScoreBytes; }  // dS^T
  LONGATTN_DEVICE uint32_t sums(int warpgroup) const { return base + kSums + warpgroup * kSumBytes; }  // dQ
  LONGATTN_DEVICE uint32_t log_sums(int stage) const { return base + kLogSums + stage * kQueryTerms * kTermBytes; }
  LONGATTN_DEVICE uint32_t delta(int stage) const { return base + kDelta + stage * kTermBytes; }

  LONGATTN_DEVICE uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
  LONGATTN_DEVICE uint32_t keys_full() const { return barrier(0); }
  LONGATTN_DEVICE uint32_t values_full() const { return barrier(1); }
  LONGATTN_DEVICE uint32_t landed() const { return barrier(2); }  // but not yet fit for use
  LONGATTN_DEVICE uint32_t queries_full(int stage) const { return barrier(3 + stage); }
  LONGATTN_DEVICE uint32_t queries_empty(int stage) const { return barrier(3 + kQueryStages + stage); }
  LONGATTN_DEVICE uint32_t outputs_full(int stage) const { return barrier(3 + 2 * kQueryStages + stage); }
  LONGATTN_DEVICE uint32_t outputs_empty(int stage) const {
    return barrier(3 + 2 * kQueryStages + kOutputStages + stage);
  }

  LONGATTN_DEVICE void init() const {
    mbarrier_init(keys_full(), 1);
    mbarrier_init(values_full(), 1);
    mbarrier_init(landed(), 1);
    mbarrier_name(keys_full(), "keys_full");
    mbarrier_name(values_full(), "values_full");
    mbarrier_name(landed(), "landed");
    for (int i = 0; i < kQueryStages; ++i) {
      mbarrier_init(queries_full(i), 1);
      mbarrier_init(queries_empty(i), 8);
      mbarrier_name(queries_full(i), "queries_full", i);
      mbarrier_name(queries_empty(i), "queries_empty", i);
    }
    for (int i = 0; i < kOutputStages; ++i) {
      mbarrier_init(outputs_full(i), 1);
      mbarrier_init(outputs_empty(i), 8);
      mbarrier_name(outputs_full(i), "outputs_full", i);
      mbarrier_name(outputs_empty(i), "outputs_empty", i);
    }
    fence_mbarrier_init();
  }
};

// Named barriers. A dQ buffer goes back and forth between a warpgroup and its writer: 128 + 32 threads.
enum BackwardBarrier : int { kScoresReady = 1, kSumFree = 2, kSumFull = 4, kWeightsReady = 6 };
constexpr int kBothWarpgroups = 256, kWithWriter = 160;

// A tile of keys of one key/value head, and the steps of its visit: query heads of the group, tiles of queries each.
struct BackwardTile {
  int n, kv_head, b;
  Sequence s;
  QueryTiles queries;
  int steps, first_row_tile;
};

// Of its tiles of queries, from the first to the last whose bounds let them see some of so many keys.
LONGATTN_DEVICE QueryTiles within(const BackwardParams& p, const BackwardTile& tile, int keys) {
  Bounds found{tile.queries.end, tile.queries.first};
#pragma unroll 1
  for (int m = tile.queries.first + thread_index() % 32; m < tile.queries.end; m += 32) {
    const Bounds bounds = p.tile_bounds[tile.first_row_tile + m];
    if (bounds.low < (tile.n + 1) * keys && bounds.high > tile.n * keys) found = united(found, {m, m + 1});
  }
  found = united_in_warp(found);
  return {smaller(found.low, found.high), found.high};
}

template <class Config>
LONGATTN_DEVICE BackwardTile backward_tile(const BackwardParams& p) {
  BackwardTile tile;
  const int3 at = block_index();
  // The last first: those that other blocks wait for, in a deterministic call.
  tile.n = p.deterministic ? block_count().x - 1 - at.x : at.x;
  tile.kv_head = at.y;
  tile.b = at.z;
  tile.s = sequence(p.mask, tile.b);
  tile.queries = query_tiles(p.mask, tile.s, tile.n, Config::kKeys, Config::kQueries);
  tile.first_row_tile = p.rows.first(tile.s, tile.b, Config::kQueries);
  // A deterministic call visits them all, as it has to tell who comes before whom.
  if (Config::kBounded && !p.deterministic) tile.queries = within(p, tile, Config::kKeys);
  tile.steps = (tile.queries.end - tile.queries.first) * p.group;
  return tile;
}

// Where a step stands: tile m of queries of head g of the group.
struct Step {
  int g, m;
  LONGATTN_DEVICE void advance(const QueryTiles& queries) {
    if (++m == queries.end) {
      m = queries.first;
      ++g;
    }
  }
};

LONGATTN_DEVICE int64_t row_tile(const BackwardParams& p, const BackwardTile& tile, const Step& step) {
  return static_cast<int64_t>(tile.kv_head * p.group + step.g) * p.rows.of_head + tile.first_row_tile + step.m;
}

}  // namespace longattn::cuda
