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

#include "kernels/backward_gradients.h"

namespace longattn::cuda {

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
    fetch_rows(step, &p.q, layout.queries(stage), p.log_sums, Layout::kQueryTerms, layout.log_sums(stage),
               layout.queries_full(stage));
    query_ring.advance();
  }

  LONGATTN_DEVICE void fetch_outputs(const Step& step) {
    const int stage = output_ring.stage;
    wait_as_warp(layout.outputs_empty(stage), output_ring.parity);
    fetch_rows(step, &p.dout, layout.outputs(stage), p.delta, 1, layout.delta(stage), layout.outputs_full(stage));
    output_ring.advance();
  }

  // A tile of rows, and so many numbers that go with each.
  LONGATTN_DEVICE void fetch_rows(const Step& step, const TensorMap* map, uint32_t to, const float* terms, int count,
                                  uint32_t terms_to, uint32_t full) {
    const bool clear = p.mask.cu_seqlens_q && (step.m + 1) * kQueries > tile.s.nq;
    const uint32_t barrier = clear ? layout.landed() : full;
    if (lane == 0) {
      mbarrier_arrive_expect(barrier, Layout::kQueryBytes + count * Layout::kTermBytes);
      fetch<kQueries, kWidth>(to, map, barrier, tile.s.q_start + step.m * kQueries, tile.kv_head * p.group + step.g,
                              tile.s.row, kEvictLast);
      bulk_load(terms_to, terms + row_tile(p, tile, step) * count * kQueries, count * Layout::kTermBytes, barrier);
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
    const int blocks = Config::blocks(warpgroup);
    int block = 0;  // of the step's
#pragma unroll 1
    for (int left = tile.steps * blocks; left > 0; --left) {
      named_barrier_sync(kSumFull + warpgroup, kWithWriter);
      if (thread_index() % 32 == 0) {
        const int64_t at = row_tile(p, tile, step) * Config::kBlocks + Config::first_block(warpgroup) + block;
        if (p.deterministic) {
          wait_until_equal(p.turns + at,
                           later_visitors(p.mask, tile.s, tile.n, step.m, Config::kKeys, Config::kQueries));
          fence_proxy_async_global();
        }
        bulk_reduce_add(p.dq_sum + at * Config::kBlock, layout.sums(warpgroup), BackwardLayout<Config>::kSumBytes);
        bulk_commit();
        if (p.deterministic) {
          bulk_wait<0>();
          fence_proxy_async_global();
          add_release(p.turns + at, 1);
        } else {
          bulk_wait_read<0>();
        }
      }
      sync_warp();
      if (left > 1) named_barrier_arrive(kSumFree + warpgroup, kWithWriter);
      if (++block == blocks) {
        block = 0;
        step.advance(tile.queries);
      }
    }
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
    const int warpgroup = warp / 4 - 1;
    if constexpr (!Config::kSharesKeys) {
      OwnKeysConsumer<Config>{p, layout, tile, warpgroup}.run();
    } else if (warpgroup == 0) {
      SharedKeysConsumer<Config, true>{p, layout, tile}.run();
    } else {
      SharedKeysConsumer<Config, false>{p, layout, tile}.run();
    }
  }
}

// A block per tile of queries and head, before: the terms of its rows, and zeros in its part of dq_sum.
constexpr int kTermThreads = 256;

template <class Config>
LONGATTN_KERNEL(kTermThreads)
row_terms_kernel(LONGATTN_PARAMS BackwardParams p) {
  using Element = typename Config::Element;
  constexpr int kLanes = Config::kWidth <= 64 ? 8 : Config::kWidth <= 128 ? 16 : 32, kRows = kTermThreads / kLanes;
  const int3 at = block_index();
  const Sequence s = sequence(p.mask, at.z);
  if (at.x * Config::kQueries >= s.nq) return;
  const int64_t tile = static_cast<int64_t>(at.y) * p.rows.of_head + p.rows.first(s, at.z, Config::kQueries) + at.x;
  float4* sums = reinterpret_cast<float4*>(p.dq_sum + tile * Config::kBlocks * Config::kBlock);
  for (int i = thread_index(); i < Config::kBlocks * Config::kBlock / 4; i += kTermThreads)
    sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
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
    float* terms = p.log_sums + tile * BackwardLayout<Config>::kQueryTerms * Config::kQueries + r;
    *terms = log_sum;
    p.delta[tile * Config::kQueries + r] = delta;
    if constexpr (Config::kBounded) {
      const Bounds bounds = bounds_of(p.mask, at.z, s, i);
      reinterpret_cast<int*>(terms)[Config::kQueries] = bounds.low;
      reinterpret_cast<int*>(terms)[2 * Config::kQueries] = bounds.high;
    }
  }
  if (Config::kBounded && at.y == 0 && thread_index() < 32) {
    const int last = smaller((at.x + 1) * Config::kQueries, s.nq) - 1;
    const Bounds all = bounds_of_all(p.mask, at.z, s, at.x * Config::kQueries, last);
    if (thread_index() == 0) p.tile_bounds[tile] = all;
  }
}

// A block per block of dQ, after: its rows, in 16 bits.
template <class Config>
LONGATTN_KERNEL(128)
query_gradient_kernel(LONGATTN_PARAMS BackwardParams p) {
  const int3 at = block_index();
  const int m = at.x / Config::kBlocks, block = at.x % Config::kBlocks;
  const Sequence s = sequence(p.mask, at.z);
  if (m * Config::kQueries >= s.nq) return;
  const int64_t tile = static_cast<int64_t>(at.y) * p.rows.of_head + p.rows.first(s, at.z, Config::kQueries) + m;
  const float4* sums = reinterpret_cast<const float4*>(p.dq_sum + (tile * Config::kBlocks + block) * Config::kBlock);
  float x[32];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float4 four = sums[i * 128 + thread_index()];
    x[4 * i] = four.x;
    x[4 * i + 1] = four.y;
    x[4 * i + 2] = four.z;
    x[4 * i + 3] = four.w;
  }
  const int first_row = m * Config::kQueries + (Config::kQueries == 64 ? 0 : 64 * block);
  const int first_column = Config::kQueries == 64 ? 64 * block : 0;
  uint16_t* rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = first_row + thread_index() / 32 * 16 + thread_index() % 32 / 4 + 8 * r;
    rows[r] = i < s.nq ? row_of(p.dq, s.row, at.y, s.q_start + i) + first_column : nullptr;
  }
  const float scale[2] = {p.scale, p.scale};
  store_rows<typename Config::Element, 64>(x, scale, rows, p.head_dim - first_column);
}

}  // namespace longattn::cuda
