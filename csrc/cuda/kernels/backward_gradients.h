// The consumers of the backward: which warpgroup computes which gradient.
#pragma once

#include "kernels/backward_scores.h"

namespace longattn::cuda {

// A warpgroup with 64 keys of its own, and both their gradients.
template <class Config>
struct OwnKeysConsumer {
  using Element = typename Config::Element;
  using Layout = BackwardLayout<Config>;
  static constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys, kWidth = Config::kWidth;
  using Scores = Wgmma<Element, kQueries>;
  using KeyGradient = Wgmma<Element, kWidth>;
  using QueryGradient = Wgmma<Element, 64>;
  static constexpr bool kSplitsColumns = kQueries == 64;  // of dQ, between the warpgroups; else its rows
  static_assert(kKeys == 128 && Config::kBlocks == 2);

  const BackwardParams& p;
  const Layout layout;
  const BackwardTile& tile;
  const int warpgroup;
  const BackwardScores<Config> scores{p, layout, tile, tile.n * kKeys + 64 * warpgroup};
  Ring<Config::kQueryStages> query_ring{0, 0};
  Ring<Config::kOutputStages> output_ring{0, 0};
  float dK[kWidth / 2], dV[kWidth / 2], S[kQueries / 2], dP[kQueries / 2], dQ[32];
  uint32_t P[kQueries / 4], dS[kQueries / 4], weights[kQueries / 4];

  LONGATTN_DEVICE void run() {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) dK[i] = dV[i] = 0.0f;
    if (tile.steps) visit();
    scores.store_gradient(dK, p.scale, p.dk, p.head_dim);
    scores.store_gradient(dV, 1.0f, p.dv, p.v_head_dim);
  }

  LONGATTN_DEVICE void visit() {
    Step step{0, tile.queries.first};
    mbarrier_wait(layout.keys_full(), 0);
    mbarrier_wait(layout.queries_full(0), 0);
    start_scores(0);
    wgmma_wait<0>();
    pin(S);
    scores.softmax(S, P, weights, 0, step.m);
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
      if (i > 0) scores.release(layout.queries_empty(before));
      scores.make_score_gradient(dP, weights, dS, output_ring.stage, i & 1, 64 * warpgroup);
      const uint32_t stage = query_ring.stage;
      query_ring.advance();
      if (i + 1 < tile.steps) mbarrier_wait(layout.queries_full(query_ring.stage), query_ring.parity);
      start_scores(query_ring.stage);  // of the next step; after the last, of an old tile, and not used
      fence_proxy_async_shared();
      wgmma_wait<1>();
      scores.release(layout.outputs_empty(output_ring.stage));
      named_barrier_sync(kScoresReady, kBothWarpgroups);
      start_query_gradient(i & 1);
      start_key_gradient(i & 1, stage);
      step.advance(tile.queries);
      wgmma_wait<2>();
      pin(S);
      scores.softmax(S, P, weights, query_ring.stage, step.m);
      output_ring.advance();
      // A wait here also keeps ptxas from moving the exponentials below that for dQ.
      if (i + 1 < tile.steps) mbarrier_wait(layout.outputs_full(output_ring.stage), output_ring.parity);
      wgmma_wait<1>();
      pin(dQ);
      scores.template give_query_gradient<0>(dQ, warpgroup, i > 0);
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
};

// Of heads so wide that a warpgroup has room for one gradient. Both have the same 64 keys: the first S, P and dV, the
// second dP, dS and dK, and each some columns of dQ. P passes from the first to the second where dS will stand. While
// one is between its products, those of the other run.
template <class Config, bool OfValues>
struct SharedKeysConsumer {
  using Element = typename Config::Element;
  using Layout = BackwardLayout<Config>;
  static constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys, kWidth = Config::kWidth;
  static constexpr int kWarpgroup = OfValues ? 0 : 1;
  static constexpr int kBlocks = Config::blocks(kWarpgroup), kFirstBlock = Config::first_block(kWarpgroup);
  using Scores = Wgmma<Element, kQueries>;
  using Gradient = Wgmma<Element, kWidth>;
  using QueryGradient = Wgmma<Element, 64 * kBlocks>;
  static_assert(kKeys == 64 && kQueries == 64 && kBlocks <= 2);

  const BackwardParams& p;
  const Layout layout;
  const BackwardTile& tile;
  const BackwardScores<Config> scores{p, layout, tile, tile.n * kKeys};
  Ring<Config::kQueryStages> query_ring{0, 0};
  Ring<Config::kOutputStages> output_ring{0, 0};
  float sum[kWidth / 2], X[kQueries / 2], dQ[32 * kBlocks];  // dV or dK; S or dP
  uint32_t F[kQueries / 4], weights[kQueries / 4];           // P or dS

  LONGATTN_DEVICE void run() {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sum[i] = 0.0f;
    if (tile.steps) visit();
    if constexpr (OfValues)
      scores.store_gradient(sum, 1.0f, p.dv, p.v_head_dim);
    else
      scores.store_gradient(sum, p.scale, p.dk, p.head_dim);
  }

  LONGATTN_DEVICE void visit() {
    Step step{0, tile.queries.first};
    mbarrier_wait(layout.keys_full(), 0);
    if constexpr (!OfValues) mbarrier_wait(layout.values_full(), 0);
#pragma unroll 1
    for (int i = 0; i < tile.steps; ++i) {
      if constexpr (OfValues) {
        mbarrier_wait(layout.queries_full(query_ring.stage), query_ring.parity);
        multiply_tiles(layout.keys(), layout.queries(0) + query_ring.stage * Layout::kQueryBytes);
        scores.softmax(X, F, weights, query_ring.stage, step.m);
        scores.release(layout.queries_empty(query_ring.stage));
        give_weights(i & 1);
        mbarrier_wait(layout.outputs_full(output_ring.stage), output_ring.parity);
        start_gradient(layout.outputs(0) + output_ring.stage * Layout::kQueryBytes);
      } else {
        mbarrier_wait(layout.outputs_full(output_ring.stage), output_ring.parity);
        multiply_tiles(layout.values(), layout.outputs(0) + output_ring.stage * Layout::kQueryBytes);
        take_weights(i & 1);
        scores.make_score_gradient(X, weights, F, output_ring.stage, i & 1, 0);
        scores.release(layout.outputs_empty(output_ring.stage));
        fence_proxy_async_shared();
        mbarrier_wait(layout.queries_full(query_ring.stage), query_ring.parity);
        start_gradient(layout.queries(0) + query_ring.stage * Layout::kQueryBytes);
      }
      named_barrier_sync(kScoresReady, kBothWarpgroups);
      start_query_gradient(i & 1);
      wgmma_wait<1>();
      scores.release(OfValues ? layout.outputs_empty(output_ring.stage) : layout.queries_empty(query_ring.stage));
      wgmma_wait<0>();
      pin(dQ);
      scores.template give_query_gradient<0>(dQ, kWarpgroup, i > 0);
      if constexpr (kBlocks == 2) scores.template give_query_gradient<1>(dQ, kWarpgroup, true);
      query_ring.advance();
      output_ring.advance();
      step.advance(tile.queries);
    }
    pin(sum);
  }

  // S^T = K Q^T, or dP^T = V dO^T
  LONGATTN_DEVICE void multiply_tiles(uint32_t keys, uint32_t queries) {
    const uint32_t a = descriptor(keys, 16), b = descriptor(queries, 16);
    wgmma_fence();
    Scores::template multiply<kAlongK, kAlongK>(X, a, b);
#pragma unroll
    for (int i = 1; i < kWidth / 16; ++i)
      Scores::template multiply_add<kAlongK, kAlongK>(X, a + along_columns(i, kKeys), b + along_columns(i, kQueries));
    wgmma_commit();
    wgmma_wait<0>();
    pin(X);
  }

  // dV += P^T dO, or dK += dS^T Q
  LONGATTN_DEVICE void start_gradient(uint32_t rows) {
    const uint32_t b = descriptor(rows, kQueries * kRowBytes);
    pin(F);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
      Gradient::template multiply_add<kAlongMN>(sum, F + 4 * i, b + along_rows(i));
    wgmma_commit();
  }

  // dQ = dS K: 64 rows by 64 columns a block
  LONGATTN_DEVICE void start_query_gradient(int buffer) {
    const uint32_t s = descriptor(layout.scores(0), 16) + buffer * (Layout::kScoreBytes >> 4);
    const uint32_t k = descriptor(layout.keys() + kFirstBlock * kKeys * kRowBytes, kKeys * kRowBytes);
    wgmma_fence();
    QueryGradient::template multiply<kAlongMN, kAlongMN>(dQ, s, k);
#pragma unroll
    for (int i = 1; i < kKeys / 16; ++i)
      QueryGradient::template multiply_add<kAlongMN, kAlongMN>(dQ, s + along_rows(i), k + along_rows(i));
    wgmma_commit();
  }

  // A thread's weights pass to the same thread of the other warpgroup, in the 16 rows of dS that its warp will write.
  // Of the two buffers, this one was last read for dQ two steps ago: the other warpgroup was done with that before it
  // announced the dS of the last step.
  LONGATTN_DEVICE uint32_t weights_at(int buffer, int i) const {
    return layout.scores(0) + buffer * Layout::kScoreBytes + scores.warp * 16 * kRowBytes + i * 512 + scores.lane * 16;
  }

  LONGATTN_DEVICE void give_weights(int buffer) {
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
      store_shared(weights_at(buffer, i),
                   make_uint4(weights[4 * i], weights[4 * i + 1], weights[4 * i + 2], weights[4 * i + 3]));
    named_barrier_arrive(kWeightsReady, kBothWarpgroups);
  }

  LONGATTN_DEVICE void take_weights(int buffer) {
    named_barrier_sync(kWeightsReady, kBothWarpgroups);
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      const uint4 four = load_shared_words<uint4>(weights_at(buffer, i));
      weights[4 * i] = four.x;
      weights[4 * i + 1] = four.y;
      weights[4 * i + 2] = four.z;
      weights[4 * i + 3] = four.w;
    }
    sync_warp();
  }
};

}  // namespace longattn::cuda
