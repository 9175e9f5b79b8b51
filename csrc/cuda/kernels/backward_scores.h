// Between the products of the backward: what becomes of scores, and where gradients go.
#pragma once

#include "kernels/backward_plan.h"

namespace longattn::cuda {

// A thread's part of the scores of 64 keys and a tile of queries. Rows are keys, columns queries.
template <class Config>
struct BackwardScores {
  using Element = typename Config::Element;
  using Layout = BackwardLayout<Config>;
  static constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys;
  using Accumulator = float[kQueries / 2];
  using Fragments = uint32_t[kQueries / 4];

  const BackwardParams& p;
  const Layout layout;
  const BackwardTile& tile;
  const int first_key;
  const int lane = thread_index() % 32, warp = thread_index() / 32 % 4, column = 2 * (thread_index() % 4);
  const bool shown[2] = {is_shown(p.mask, tile.b, tile.s, key(0)), is_shown(p.mask, tile.b, tile.s, key(1))};

  LONGATTN_DEVICE int key(int r) const { return first_key + 16 * warp + lane / 4 + 8 * r; }

  LONGATTN_DEVICE void release(uint32_t barrier) const {
    sync_warp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // S^T becomes P^T, in fragments; `weights` are P times the derivative of the softcap, if there may be one.
  LONGATTN_DEVICE void softmax(Accumulator& S, Fragments& P, Fragments& weights, uint32_t stage, int m) const {
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
    const uint32_t log_sums = layout.log_sums(0) + stage * (Layout::kQueryTerms * Layout::kTermBytes) + 4 * column;
    if constexpr (Config::kBounded) hide_out_of_bounds(S, log_sums + Layout::kTermBytes);
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
        weights[2 * j + r] = Config::kGeneral ? pack<Element>(x[0] * slope[0], x[1] * slope[1]) : P[2 * j + r];
      }
    }
  }

  LONGATTN_DEVICE void hide_out_of_bounds(Accumulator& S, uint32_t bounds) const {
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const uint2 low = load_shared_words<uint2>(bounds + 32 * j);
      const uint2 high = load_shared_words<uint2>(bounds + Layout::kTermBytes + 32 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int from = static_cast<int>(e ? low.y : low.x), to = static_cast<int>(e ? high.y : high.x);
          float& s = S[4 * j + 2 * r + e];
          s = key(r) < from || key(r) >= to ? -kInfinity : s;
        }
    }
  }

  // dS^T = P^T (dP^T - delta), in fragments and, swizzled, in rows of shared memory from row `first`.
  LONGATTN_DEVICE void make_score_gradient(const Accumulator& dP, const Fragments& weights, Fragments& dS,
                                           uint32_t stage, int buffer, int first) const {
    const uint32_t deltas = layout.delta(0) + stage * Layout::kTermBytes + 4 * column;
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const float2 delta = load_shared_pair(deltas + 32 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 weight = unpack<Element>(weights[2 * j + r]);
        dS[2 * j + r] =
            pack<Element>(weight.x * (dP[4 * j + 2 * r] - delta.x), weight.y * (dP[4 * j + 2 * r + 1] - delta.y));
      }
    }
    const uint32_t row = layout.scores(0) + buffer * Layout::kScoreBytes + (first + 16 * warp + lane % 16) * kRowBytes;
    const uint32_t swizzle = ((lane >> 4) ^ (lane & 7)) << 4;
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
      store_matrices(row + i / 4 * kKeys * kRowBytes + (swizzle ^ (i % 4 << 5)), dS[4 * i], dS[4 * i + 1],
                     dS[4 * i + 2], dS[4 * i + 3]);
  }

  // Hands a block of dQ to the warpgroup's writer, once the buffer is free.
  template <int Block, int Count>
  LONGATTN_DEVICE void give_query_gradient(const float (&dQ)[Count], int warpgroup, bool used_before) const {
    if (used_before) named_barrier_sync(kSumFree + warpgroup, kWithWriter);
    const uint32_t to = layout.sums(warpgroup) + thread_index() % 128 * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int first = 32 * Block + 4 * i;
      store_shared(to + 2048 * i, dQ[first], dQ[first + 1], dQ[first + 2], dQ[first + 3]);
    }
    fence_proxy_async_shared();
    named_barrier_arrive(kSumFull + warpgroup, kWithWriter);
  }

  // The gradient of this thread's keys, or of their values, to global memory.
  LONGATTN_DEVICE void store_gradient(const float (&x)[Config::kWidth / 2], float factor, const LongattnRows& to,
                                      int width) const {
    uint16_t* rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      rows[r] = key(r) < tile.s.nk ? row_of(to, tile.s.row, tile.kv_head, tile.s.k_start + key(r)) : nullptr;
    const float factors[2] = {factor, factor};
    store_rows<Element, Config::kWidth>(x, factors, rows, width);
  }
};

}  // namespace longattn::cuda
