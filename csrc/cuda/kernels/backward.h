// The backward: dq, dk and dv from q, k, v, dout and the log-sums.
//
//   S = Q K^T, P = exp(scores - lse), dP = dO V^T, dS = P (dP - delta), delta_i = sum dO_i O_i - dlse_i,
//   dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K; with a softcap c, dS also times 1 - (score / c)^2.
//
// A block has one tile of keys and visits the tiles of queries that see it, of all query heads of the group. S and dP
// are computed transposed, so that P^T stays in registers for dV; dS^T goes through shared memory. dQ is added up in
// float32 by bulk reductions of a warp per warpgroup, in the order of accumulators; query_gradient_kernel turns it into
// rows.
#pragma once

#include "kernels/forward.h"
#include "kernels/rows.h"

namespace longattn::cuda {

struct alignas(128) BackwardParams {
  TensorMap q, k, v, dout;
  LongattnRows out_rows, dout_rows, dq, dk, dv;
  const float *lse, *dlse;
  float *log_sums, *delta;  // of RowTiles' rows: log2(e) lse, and +inf where nobody looks; delta
  float* dq_sum;            // of RowTiles' tiles: 2 accumulators [64 x 64] each
  int32_t* turns;           // of each accumulator: tiles of keys that were added; deterministic only
  Visibility mask;
  RowTiles rows;
  int q_heads, kv_heads, group, head_dim, v_head_dim, deterministic, ragged;
  float scale, softcap, unit;
  float softcap_rate, curvature;  // 2 log2(e) / softcap, 1 / softcap^2; 0 without one
};

template <class Element_, int Width_, int Queries_, bool General_>
struct BackwardConfig {
  using Element = Element_;
  static constexpr int kWidth = Width_, kQueries = Queries_, kKeys = 128, kThreads = 384;
  static constexpr bool kGeneral = General_;  // scores are more than products times a positive scale
  static constexpr int kQueryStages = 3, kOutputStages = 2;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kBlock = 64 * 64;  // of dQ, a warpgroup's: half the columns, or half the rows
  static_assert(kQueries * kWidth == 2 * kBlock);
};

template <class Config>
struct BackwardLayout {
  static constexpr int kQueryStages = Config::kQueryStages, kOutputStages = Config::kOutputStages;
  static constexpr int kKeyBytes = tile_bytes(Config::kKeys, Config::kWidth);
  static constexpr int kQueryBytes = tile_bytes(Config::kQueries, Config::kWidth);
  static constexpr int kScoreBytes = tile_bytes(Config::kKeys, Config::kQueries);
  static constexpr int kTermBytes = Config::kQueries * 4, kSumBytes = Config::kBlock * 4;
  static constexpr int kKeys = 0, kValues = kKeys + kKeyBytes, kQueries = kValues + kKeyBytes;
  static constexpr int kOutputs = kQueries + kQueryStages * kQueryBytes;
  static constexpr int kScores = kOutputs + kOutputStages * kQueryBytes, kSums = kScores + 2 * kScoreBytes;
  static constexpr int kLogSums = kSums + 2 * kSumBytes, kDelta = kLogSums + kQueryStages * kTermBytes;
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
  LONGATTN_DEVICE uint32_t log_sums(int stage) const { return base + kLogSums + stage * kTermBytes; }
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
enum BackwardBarrier : int { kScoresReady = 1, kSumFree = 2, kSumFull = 4 };
constexpr int kBothWarpgroups = 256, kWithWriter = 160;

// A tile of keys of one key/value head, and the steps of its visit: query heads of the group, tiles of queries each.
struct BackwardTile {
  int n, kv_head, b;
  Sequence s;
  QueryTiles queries;
  int steps, first_row_tile;
};

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
  tile.steps = (tile.queries.end - tile.queries.first) * p.group;
  tile.first_row_tile = p.rows.first(tile.s, tile.b, Config::kQueries);
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

// One warp: fetches keys and values once, then queries and gradients of outputs step by step.
template <class Config>
struct BackwardProducer {
  using Layout = BackwardLayout<Config>;
  static constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys, kWidth = Config::kWidth;
  const BackwardParams& p;
  const Layout layout;
  const BackwardTile& tile;
  const int lane = thread_index() % 32;
  Ring<Config::kQueryStages> query_ring{0, 1};
  Ring<Config::kOutputStages> output_ring{0, 1};
  uint32_t landed_parity = 0;

  LONGATTN_DEVICE void run() {
    if (!tile.steps) return;
    Step queries{0, tile.queries.first}, outputs = queries;
    fetch_keys(layout.keys(), &p.k, layout.keys_full());
    fetch_queries(queries);
    fetch_keys(layout.values(), &p.v, layout.values_full());
    // In the order of use: dO of a step, then the queries of the next.
#pragma unroll 1
    for (int i = 0; i < tile.steps; ++i) {
      fetch_outputs(outputs);
      outputs.advance(tile.queries);
      queries.advance(tile.queries);
      if (i + 1 < tile.steps) fetch_queries(queries);
    }
  }

  LONGATTN_DEVICE void fetch_keys(uint32_t to, const TensorMap* map, uint32_t full) {
    const bool clear = (p.ragged && (tile.n + 1) * kKeys > tile.s.nk) || p.mask.key_mask;
    const uint32_t barrier = clear ? layout.landed() : full;
    if (lane == 0) {
      mbarrier_arrive_expect(barrier, Layout::kKeyBytes);
      fetch<kKeys, kWidth>(to, map, barrier, tile.s.k_start + tile.n * kKeys, tile.kv_head, tile.s.row, kEvictFirst);
    }
    if (!clear) return;
    wait_landed();
#pragma unroll 1
    for (int row = lane; row < kKeys; row += 32)
      if (!is_shown(p.mask, tile.b, tile.s, tile.n * kKeys + row)) clear_row<kKeys, kWidth>(to, row);
    hand_over(full);
  }

  LONGATTN_DEVICE void fetch_queries(const Step& step) {
    const int stage = query_ring.stage;
    wait_as_warp(layout.queries_empty(stage), query_ring.parity);
    fetch_rows(step, &p.q, layout.queries(stage), p.log_sums, layout.log_sums(stage), layout.queries_full(stage));
    query_ring.advance();
  }

  LONGATTN_DEVICE void fetch_outputs(const Step& step) {
    const int stage = output_ring.stage;
    wait_as_warp(layout.outputs_empty(stage), output_ring.parity);
    fetch_rows(step, &p.dout, layout.outputs(stage), p.delta, layout.delta(stage), layout.outputs_full(stage));
    output_ring.advance();
  }

  // A tile of rows and the numbers that go with them.
  LONGATTN_DEVICE void fetch_rows(const Step& step, const TensorMap* map, uint32_t to, const float* terms,
                                  uint32_t terms_to, uint32_t full) {
    const bool clear = p.mask.cu_seqlens_q && (step.m + 1) * kQueries > tile.s.nq;
    const uint32_t barrier = clear ? layout.landed() : full;
    if (lane == 0) {
      mbarrier_arrive_expect(barrier, Layout::kQueryBytes + Layout::kTermBytes);
      fetch<kQueries, kWidth>(to, map, barrier, tile.s.q_start + step.m * kQueries, tile.kv_head * p.group + step.g,
                              tile.s.row, kEvictLast);
      bulk_load(terms_to, terms + row_tile(p, tile, step) * kQueries, Layout::kTermBytes, barrier);
    }
    if (!clear) return;
    wait_landed();
#pragma unroll 1
    for (int row = lane; row < kQueries; row += 32)
      if (step.m * kQueries + row >= tile.s.nq) clear_row<kQueries, kWidth>(to, row);
    hand_over(full);
  }

  LONGATTN_DEVICE void wait_landed() {
    mbarrier_wait(layout.landed(), landed_parity);
    landed_parity ^= 1;
  }

  LONGATTN_DEVICE void hand_over(uint32_t full) {
    fence_proxy_async_shared();
    sync_warp();
    if (lane == 0) mbarrier_arrive(full);
  }
};

// A warp for each consumer: adds its part of dQ to global memory; in a deterministic call, when it is its turn.
template <class Config>
struct BackwardWriter {
  const BackwardParams& p;
  const BackwardLayout<Config> layout;
  const BackwardTile& tile;
  const int warpgroup;

  LONGATTN_DEVICE void run() {
    Step step{0, tile.queries.first};
#pragma unroll 1
    for (int i = 0; i < tile.steps; ++i) {
      named_barrier_sync(kSumFull + warpgroup, kWithWriter);
      if (thread_index() % 32 == 0) {
        const int64_t block = row_tile(p, tile, step) * 2 + warpgroup;
        if (p.deterministic) {
          wait_until_equal(p.turns + block,
                           later_visitors(p.mask, tile.s, tile.n, step.m, Config::kKeys, Config::kQueries));
          fence_proxy_async_global();
        }
        bulk_reduce_add(p.dq_sum + block * Config::kBlock, layout.sums(warpgroup), BackwardLayout<Config>::kSumBytes);
        bulk_commit();
        if (p.deterministic) {
          bulk_wait<0>();
          fence_proxy_async_global();
          add_release(p.turns + block, 1);
        } else {
          bulk_wait_read<0>();
        }
      }
      sync_warp();
      if (i + 1 < tile.steps) named_barrier_arrive(kSumFree + warpgroup, kWithWriter);
      step.advance(tile.queries);
    }
  }
};

// A warpgroup: 64 keys.
template <class Config>
struct BackwardConsumer {
  using Element = typename Config::Element;
  using Layout = BackwardLayout<Config>;
  static constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys, kWidth = Config::kWidth;
  using Scores = Wgmma<Element, kQueries>;
  using KeyGradient = Wgmma<Element, kWidth>;
  using QueryGradient = Wgmma<Element, 64>;
  static constexpr bool kSplitsColumns = kQueries == 64;  // of dQ, between the warpgroups; else its rows

  const BackwardParams& p;
  const Layout layout;
  const BackwardTile& tile;
  const int warpgroup;
  const int lane = thread_index() % 32, warp = thread_index() / 32 % 4, column = 2 * (thread_index() % 4);
  Ring<Config::kQueryStages> query_ring{0, 0};
  Ring<Config::kOutputStages> output_ring{0, 0};
  float dK[kWidth / 2], dV[kWidth / 2], S[kQueries / 2], dP[kQueries / 2], dQ[32];
  uint32_t P[kQueries / 4], dS[kQueries / 4];
  uint32_t weights[Config::kGeneral ? kQueries / 4 : 1];  // P times the derivative of the softcap
  int first_key;                                          // of this warpgroup
  bool shown[2];                                          // this thread's keys

  LONGATTN_DEVICE void run() {
    first_key = tile.n * kKeys + 64 * warpgroup;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) dK[i] = dV[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) shown[r] = is_shown(p.mask, tile.b, tile.s, key(r));
    if (tile.steps) visit();
    finish();
  }

  LONGATTN_DEVICE int key(int r) const { return first_key + 16 * warp + lane / 4 + 8 * r; }

  LONGATTN_DEVICE void release(uint32_t barrier) {
    sync_warp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  LONGATTN_DEVICE void visit() {
    Step step{0, tile.queries.first};
    mbarrier_wait(layout.keys_full(), 0);
    mbarrier_wait(layout.queries_full(0), 0);
    start_scores(0);
    wgmma_wait<0>();
    pin(S);
    softmax(0, step.m);
    mbarrier_wait(layout.values_full(), 0);
    mbarrier_wait(layout.outputs_full(0), 0);
#pragma unroll 1
    for (int i = 0; i < tile.steps; ++i) {
      // P of this step is in registers, its dO in shared memory; dK of the last step is on its way.
      const uint32_t before = query_ring.stage == 0 ? Config::kQueryStages - 1 : query_ring.stage - 1;
      start_weight_gradient();
      start_value_gradient();
      wgmma_wait<1>();
      pin(dP);
      if (i > 0) release(layout.queries_empty(before));
      make_score_gradient(i & 1);
      const uint32_t stage = query_ring.stage;
      query_ring.advance();
      if (i + 1 < tile.steps) mbarrier_wait(layout.queries_full(query_ring.stage), query_ring.parity);
      start_scores(query_ring.stage);  // of the next step; after the last, of an old tile, and not used
      fence_proxy_async_shared();
      wgmma_wait<1>();
      release(layout.outputs_empty(output_ring.stage));
      named_barrier_sync(kScoresReady, kBothWarpgroups);
      start_query_gradient(i & 1);
      start_key_gradient(i & 1, stage);
      step.advance(tile.queries);
      wgmma_wait<2>();
      pin(S);
      softmax(query_ring.stage, step.m);
      output_ring.advance();
      // A wait here also keeps ptxas from moving the exponentials below that for dQ.
      if (i + 1 < tile.steps) mbarrier_wait(layout.outputs_full(output_ring.stage), output_ring.parity);
      wgmma_wait<1>();
      pin(dQ);
      give_query_gradient(i > 0);
    }
    wgmma_wait<0>();
    pin(dK);
    pin(dV);
  }

  // S^T = K Q^T
  LONGATTN_DEVICE void start_scores(uint32_t stage) {
    const uint32_t k = descriptor(layout.keys() + warpgroup * 64 * kRowBytes, 16);
    const uint32_t q = descriptor(layout.queries(0), 16) + stage * (Layout::kQueryBytes >> 4);
    wgmma_fence();
    Scores::template multiply<kAlongK, kAlongK>(S, k, q);
#pragma unroll
    for (int i = 1; i < kWidth / 16; ++i)
      Scores::template multiply_add<kAlongK, kAlongK>(S, k + along_columns(i, kKeys), q + along_columns(i, kQueries));
    wgmma_commit();
  }

  // dP^T = V dO^T
  LONGATTN_DEVICE void start_weight_gradient() {
    const uint32_t v = descriptor(layout.values() + warpgroup * 64 * kRowBytes, 16);
    const uint32_t o = descriptor(layout.outputs(0), 16) + output_ring.stage * (Layout::kQueryBytes >> 4);
    wgmma_fence();
    Scores::template multiply<kAlongK, kAlongK>(dP, v, o);
#pragma unroll
    for (int i = 1; i < kWidth / 16; ++i)
      Scores::template multiply_add<kAlongK, kAlongK>(dP, v + along_columns(i, kKeys), o + along_columns(i, kQueries));
    wgmma_commit();
  }

  // dV += P^T dO
  LONGATTN_DEVICE void start_value_gradient() {
    const uint32_t o =
        descriptor(layout.outputs(0), kQueries * kRowBytes) + output_ring.stage * (Layout::kQueryBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
      KeyGradient::template multiply_add<kAlongMN>(dV, P + 4 * i, o + along_rows(i));
    wgmma_commit();
  }

  // dK += dS^T Q
  LONGATTN_DEVICE void start_key_gradient(int buffer, uint32_t stage) {
    const uint32_t s =
        descriptor(layout.scores(0) + warpgroup * 64 * kRowBytes, 16) + buffer * (Layout::kScoreBytes >> 4);
    const uint32_t q = descriptor(layout.queries(0), kQueries * kRowBytes) + stage * (Layout::kQueryBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
      KeyGradient::template multiply_add<kAlongK, kAlongMN>(dK, s + along_columns(i, kKeys), q + along_rows(i));
    wgmma_commit();
  }

  // dQ = dS K: 64 rows by 64 columns
  LONGATTN_DEVICE void start_query_gradient(int buffer) {
    const int half = warpgroup * kKeys * kRowBytes;  // the second slab of keys, or of queries
    const uint32_t s =
        descriptor(layout.scores(0) + (kSplitsColumns ? 0 : half), 16) + buffer * (Layout::kScoreBytes >> 4);
    const uint32_t k = descriptor(layout.keys() + (kSplitsColumns ? half : 0), 16);
    wgmma_fence();
    QueryGradient::template multiply<kAlongMN, kAlongMN>(dQ, s, k);
#pragma unroll
    for (int i = 1; i < kKeys / 16; ++i)
      QueryGradient::template multiply_add<kAlongMN, kAlongMN>(dQ, s + along_rows(i), k + along_rows(i));
    wgmma_commit();
  }

  // S^T becomes P^T. Rows are keys, columns queries.
  LONGATTN_DEVICE void softmax(uint32_t stage, int m) {
    if constexpr (Config::kGeneral) {
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) S[i] *= p.scale;
      if (p.softcap > 0.0f) {
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i)
          S[i] = p.softcap - 2.0f * p.softcap * reciprocal_approx(1.0f + exp2_approx(S[i] * p.softcap_rate));
      }
    }
    const int first = m * kQueries + tile.s.shift;  // position of the tile's first query
    const bool edge = first_key + 64 > tile.s.nk || p.mask.key_mask || first_key + 63 > first + p.mask.right ||
                      first_key < first + kQueries - 1 - p.mask.left;
    int lowest[2] = {0, 0}, highest[2] = {kQueries, kQueries};
    if (edge) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        lowest[r] = shown[r] ? key(r) - first - p.mask.right : kQueries;
        highest[r] = key(r) < p.mask.sinks ? kQueries : key(r) - first + p.mask.left;
        lowest[r] -= column;
        highest[r] -= column;
      }
      if constexpr (!Config::kGeneral) {
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i) {
          const int c = 8 * (i / 4) + i % 2, r = i / 2 % 2;
          S[i] = c < lowest[r] || c > highest[r] ? -kInfinity : S[i];
        }
      }
    }
    const uint32_t log_sums = layout.log_sums(0) + stage * Layout::kTermBytes + 4 * column;
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const float2 log_sum = load_shared_pair(log_sums + 32 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[2], slope[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float s = S[4 * j + 2 * r + e];
          const int c = 8 * j + e;
          slope[e] = fmaf(-s * s, p.curvature, 1.0f);
          x[e] = fmaf(s, p.unit, e ? -log_sum.y : -log_sum.x);
          if constexpr (Config::kGeneral) x[e] = edge && (c < lowest[r] || c > highest[r]) ? -kInfinity : x[e];
          x[e] = exp2_approx(x[e]);
        }
        P[2 * j + r] = pack<Element>(x[0], x[1]);
        if constexpr (Config::kGeneral) weights[2 * j + r] = pack<Element>(x[0] * slope[0], x[1] * slope[1]);
      }
    }
  }

  // dS^T = P^T (dP^T - delta), in registers and, swizzled, in shared memory.
  LONGATTN_DEVICE void make_score_gradient(int buffer) {
    const uint32_t deltas = layout.delta(0) + output_ring.stage * Layout::kTermBytes + 4 * column;
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const float2 delta = load_shared_pair(deltas + 32 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 weight =
            unpack<Element>(Config::kGeneral ? weights[Config::kGeneral ? 2 * j + r : 0] : P[2 * j + r]);
        dS[2 * j + r] =
            pack<Element>(weight.x * (dP[4 * j + 2 * r] - delta.x), weight.y * (dP[4 * j + 2 * r + 1] - delta.y));
      }
    }
    const uint32_t row =
        layout.scores(0) + buffer * Layout::kScoreBytes + (64 * warpgroup + 16 * warp + lane % 16) * kRowBytes;
    const uint32_t swizzle = ((lane >> 4) ^ (lane & 7)) << 4;
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
      store_matrices(row + i / 4 * kKeys * kRowBytes + (swizzle ^ (i % 4 << 5)), dS[4 * i], dS[4 * i + 1],
                     dS[4 * i + 2], dS[4 * i + 3]);
  }

  // Hands dQ to the writer, once the buffer is free.
  LONGATTN_DEVICE void give_query_gradient(bool used_before) {
    if (used_before) named_barrier_sync(kSumFree + warpgroup, kWithWriter);
    const uint32_t to = layout.sums(warpgroup) + thread_index() % 128 * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) store_shared(to + 2048 * i, dQ[4 * i], dQ[4 * i + 1], dQ[4 * i + 2], dQ[4 * i + 3]);
    fence_proxy_async_shared();
    named_barrier_arrive(kSumFull + warpgroup, kWithWriter);
  }

  LONGATTN_DEVICE void finish() {
    uint16_t *dk[2], *dv[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = key(r) < tile.s.nk;
      dk[r] = exists ? row_of(p.dk, tile.s.row, tile.kv_head, tile.s.k_start + key(r)) : nullptr;
      dv[r] = exists ? row_of(p.dv, tile.s.row, tile.kv_head, tile.s.k_start + key(r)) : nullptr;
    }
    const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
    store_rows<Element, kWidth>(dK, scale, dk, p.head_dim);
    store_rows<Element, kWidth>(dV, one, dv, p.v_head_dim);
  }
};

template <class Config>
LONGATTN_KERNEL(Config::kThreads)
backward_kernel(LONGATTN_PARAMS BackwardParams p) {
  const BackwardLayout<Config> layout{shared_base()};
  const BackwardTile tile = backward_tile<Config>(p);
  if (tile.n * Config::kKeys >= tile.s.nk) return;
  if (thread_index() == 0) layout.init();
  sync_block(Config::kThreads);
  const int warp = from_lane(thread_index() / 32, 0);
  if (warp < 4) {
    release_registers<Config::kProducerRegisters>();
    if (warp == 0) BackwardProducer<Config>{p, layout, tile}.run();
    if (warp == 1 || warp == 2) BackwardWriter<Config>{p, layout, tile, warp - 1}.run();
  } else {
    allocate_registers<Config::kConsumerRegisters>();
    BackwardConsumer<Config>{p, layout, tile, warp / 4 - 1}.run();
  }
}

// A block per tile of queries and head, before: log-sums and deltas of its rows; zeros in its part of dq_sum.
constexpr int kTermThreads = 256;

template <class Config>
LONGATTN_KERNEL(kTermThreads)
row_terms_kernel(LONGATTN_PARAMS BackwardParams p) {
  using Element = typename Config::Element;
  constexpr int kLanes = Config::kWidth / 8, kRows = kTermThreads / kLanes;
  const int3 at = block_index();
  const Sequence s = sequence(p.mask, at.z);
  if (at.x * Config::kQueries >= s.nq) return;
  const int64_t tile = static_cast<int64_t>(at.y) * p.rows.of_head + p.rows.first(s, at.z, Config::kQueries) + at.x;
  float4* sums = reinterpret_cast<float4*>(p.dq_sum + tile * 2 * Config::kBlock);
  for (int i = thread_index(); i < Config::kBlock / 2; i += kTermThreads) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const int lane = thread_index() % kLanes;
#pragma unroll 1
  for (int r = thread_index() / kLanes; r < Config::kQueries; r += kRows) {
    const int i = at.x * Config::kQueries + r;
    uint4 x = make_uint4(0, 0, 0, 0), y = x;
    if (i < s.nq && lane * 8 < p.v_head_dim) {
      x = *reinterpret_cast<const uint4*>(row_of(p.out_rows, s.row, at.y, s.q_start + i) + lane * 8);
      y = *reinterpret_cast<const uint4*>(row_of(p.dout_rows, s.row, at.y, s.q_start + i) + lane * 8);
    }
    const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
    float delta = 0.0f;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float2 u = unpack<Element>(a[word]), v = unpack<Element>(b[word]);
      delta = fmaf(u.x, v.x, fmaf(u.y, v.y, delta));
    }
#pragma unroll
    for (int bit = kLanes / 2; bit; bit /= 2) delta += from_lane_xor(delta, bit);
    if (lane) continue;
    float log_sum = kInfinity;  // weights of 0: rows that are not there, or see nothing
    const int64_t entry = (static_cast<int64_t>(s.row) * p.q_heads + at.y) * p.mask.nq + s.q_start + i;
    if (i < s.nq && p.lse[entry] != -kInfinity) {
      log_sum = p.lse[entry] * kLog2E;
      if (p.dlse) delta -= p.dlse[entry];
    } else {
      delta = 0.0f;
    }
    p.log_sums[tile * Config::kQueries + r] = log_sum;
    p.delta[tile * Config::kQueries + r] = delta;
  }
}

// A block per accumulator of dQ, after: its rows, in 16 bits.
template <class Config>
LONGATTN_KERNEL(128)
query_gradient_kernel(LONGATTN_PARAMS BackwardParams p) {
  constexpr bool kSplitsColumns = BackwardConsumer<Config>::kSplitsColumns;
  const int3 at = block_index();
  const int m = at.x / 2, warpgroup = at.x % 2;
  const Sequence s = sequence(p.mask, at.z);
  if (m * Config::kQueries >= s.nq) return;
  const int64_t tile = static_cast<int64_t>(at.y) * p.rows.of_head + p.rows.first(s, at.z, Config::kQueries) + m;
  const float4* sums = reinterpret_cast<const float4*>(p.dq_sum + (tile * 2 + warpgroup) * Config::kBlock);
  float x[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 four = sums[i * 128 + thread_index()];
    x[4 * i] = four.x;
    x[4 * i + 1] = four.y;
    x[4 * i + 2] = four.z;
    x[4 * i + 3] = four.w;
  }
  const int first_column = kSplitsColumns ? 64 * warpgroup : 0;
  uint16_t* rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = m * Config::kQueries + (kSplitsColumns ? 0 : 64 * warpgroup) + thread_index() / 32 * 16 +
                  thread_index() % 32 / 4 + 8 * r;
    rows[r] = i < s.nq ? row_of(p.dq, s.row, at.y, s.q_start + i) + first_column : nullptr;
  }
  const float scale[2] = {p.scale, p.scale};
  store_rows<typename Config::Element, 64>(x, scale, rows, p.head_dim - first_column);
}

}  // namespace longattn::cuda
