// The forward: out = softmax(scores) V and its log-sums, by FlashAttention-3's plan (Shah et al., 2024).
//
// A block keeps running and takes tile after tile of queries. One warp fetches tiles of keys and values by TMA into
// rings of two; each of two or three warpgroups has 64 rows. Of a step, the product of queries and keys j + 1 is
// started before that of weights and values j, and the softmax of j + 1 runs under the latter; warpgroups take turns,
// so that one's exponentials run under the others' products.
//
// Online softmax, in powers of two: with u = log2(e) * scale and m a row's greatest score so far,
//   l = sum_j 2^(u s_j - u m),  O = sum_j 2^(u s_j - u m) v_j;  a greater m' shrinks both by 2^(u m - u m').
#pragma once

#include "hopper/bulk.h"
#include "hopper/global.h"
#include "hopper/mbarrier.h"
#include "hopper/named_barrier.h"
#include "hopper/proxy.h"
#include "hopper/registers.h"
#include "hopper/wgmma.h"
#include "kernels/schedule.h"
#include "kernels/tile.h"
#include "kernels/visibility.h"

namespace longattn::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

// What a kernel is compiled for.
enum class Kind : int {
  kFull,      // every key
  kWindowed,  // causal, windows, sinks
  kGeneral,   // those, and key_mask, bounds, softcap, scales that are not positive
  kCached     // those but for key_mask and bounds, of few queries on a cache: the heads of a group packed in one tile,
              // keys split
};

struct alignas(128) ForwardParams {
  TensorMap q, k, v;
  LongattnRows out;
  float* lse;
  Visibility mask;
  Schedule schedule;
  const float* sink_logits;
  int32_t* next_tile;
  int q_heads, group, head_dim, v_head_dim;
  int tiles;
  int ragged;  // a sequence may end before the tensor does: what follows may hold anything
  float scale, softcap, unit;
  float softcap_rate;  // 2 log2(e) / softcap

  // On a cache. Row r of a key/value head's tile is query r / packed of the group's head r % packed.
  const int32_t* table;  // [batch, table_width]: pages
  int packed, splits, table_width, pages, page_size;
  int piece;  // rows of a box: what tiles and pages are both made of; 0: too few, rows are copied one by one
  LongattnRows k_rows, v_rows;
  float *partial_out, *partial_lse;  // [splits, batch * kv_heads, rows, (width)]
};

template <class Element_, int Width_, int Warpgroups_, int Keys_, Kind Kind_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kWidth = Width_, kWarpgroups = Warpgroups_, kKeys = Keys_, kQueries = 64 * kWarpgroups;
  static constexpr Kind kKind = Kind_;
  static constexpr bool kCached = kKind == Kind::kCached, kGeneral = kKind == Kind::kGeneral || kCached;
  static constexpr int kStages = 2, kThreads = 128 * (kWarpgroups + 1);
  // One warpgroup has all the registers it can use from the start.
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32,
                       kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  static constexpr bool kTakeTurns = kWarpgroups > 1 && kWidth < 256;  // wider heads have no registers left for it
  static_assert(kWarpgroups == 1 || kProducerRegisters + kWarpgroups * kConsumerRegisters <=
                                        (kWarpgroups + 1) * (65536 / kThreads / 8 * 8));
};

template <class Config>
struct ForwardLayout {
  static constexpr int kStages = Config::kStages;
  static constexpr int kQueryBytes = tile_bytes(Config::kQueries, Config::kWidth);
  static constexpr int kKeyBytes = tile_bytes(Config::kKeys, Config::kWidth);
  static constexpr int kKeyTiles = kQueryBytes, kValueTiles = kKeyTiles + kStages * kKeyBytes;
  static constexpr int kShownBytes = 32;  // a bit for each key of a tile
  static constexpr int kBoundBytes = Config::kKind == Kind::kGeneral ? Config::kQueries * 4 : 0;
  static constexpr int kShown = kValueTiles + kStages * kKeyBytes, kTaken = kShown + kStages * kShownBytes;
  static constexpr int kBounds = kTaken + 16, kBarriers = kBounds + 2 * kBoundBytes;
  static constexpr int kBytes = kBarriers + 8 * (3 + 4 * kStages + 4) + 1024;  // and room to align
  static_assert(kBytes <= 232448);

  uint32_t base;

  LONGATTN_DEVICE uint32_t queries() const { return base; }
  LONGATTN_DEVICE uint32_t keys(int stage) const { return base + kKeyTiles + stage * kKeyBytes; }
  LONGATTN_DEVICE uint32_t values(int stage) const { return base + kValueTiles + stage * kKeyBytes; }
  LONGATTN_DEVICE uint32_t shown(int stage) const { return base + kShown + stage * kShownBytes; }
  LONGATTN_DEVICE uint32_t taken(int slot) const { return base + kTaken + 4 * slot; }

  LONGATTN_DEVICE uint32_t low(int row) const { return base + kBounds + 4 * row; }
  LONGATTN_DEVICE uint32_t high(int row) const { return base + kBounds + kBoundBytes + 4 * row; }

  LONGATTN_DEVICE uint32_t barrier(int i) const { return base + kBarriers + 8 * i; }
  LONGATTN_DEVICE uint32_t queries_full() const { return barrier(0); }
  LONGATTN_DEVICE uint32_t queries_empty() const { return barrier(1); }
  LONGATTN_DEVICE uint32_t values_landed() const { return barrier(2); }  // but not yet fit for use
  LONGATTN_DEVICE uint32_t keys_full(int stage) const { return barrier(3 + stage); }
  LONGATTN_DEVICE uint32_t keys_empty(int stage) const { return barrier(3 + kStages + stage); }
  LONGATTN_DEVICE uint32_t values_full(int stage) const { return barrier(3 + 2 * kStages + stage); }
  LONGATTN_DEVICE uint32_t values_empty(int stage) const { return barrier(3 + 3 * kStages + stage); }
  LONGATTN_DEVICE uint32_t taken_full(int slot) const { return barrier(3 + 4 * kStages + slot); }
  LONGATTN_DEVICE uint32_t taken_empty(int slot) const { return barrier(5 + 4 * kStages + slot); }

  LONGATTN_DEVICE void init() const {
    constexpr int kWarps = 4 * Config::kWarpgroups;  // that say when they no longer need a tile
    mbarrier_init(queries_full(), 1);
    mbarrier_init(queries_empty(), kWarps);
    mbarrier_init(values_landed(), 1);
    mbarrier_name(queries_full(), "queries_full");
    mbarrier_name(queries_empty(), "queries_empty");
    mbarrier_name(values_landed(), "values_landed");
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(keys_full(i), 1);
      mbarrier_init(keys_empty(i), kWarps);
      mbarrier_init(values_full(i), 1);
      mbarrier_init(values_empty(i), kWarps);
      mbarrier_name(keys_full(i), "keys_full", i);
      mbarrier_name(keys_empty(i), "keys_empty", i);
      mbarrier_name(values_full(i), "values_full", i);
      mbarrier_name(values_empty(i), "values_empty", i);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(taken_full(i), 1);
      mbarrier_init(taken_empty(i), kWarps);
      mbarrier_name(taken_full(i), "taken_full", i);
      mbarrier_name(taken_empty(i), "taken_empty", i);
    }
    fence_mbarrier_init();
  }
};

// A tile of queries of one head, and the tiles of keys that it visits: of those that it sees, `visits` from the first.
struct ForwardTile {
  int b, h, kv_head, first_query, rows, split, first_visit, visits;
  Sequence s;
  KeyTiles keys;
  LONGATTN_DEVICE int at(int i) const { return keys.at(first_visit + i); }
};

LONGATTN_DEVICE Bounds united_in_warp(Bounds all) {
#pragma unroll
  for (int bit = 1; bit < 32; bit <<= 1) all = united(all, {from_lane_xor(all.low, bit), from_lane_xor(all.high, bit)});
  return {from_lane(all.low, 0), from_lane(all.high, 0)};
}

// Of queries first..last together.
LONGATTN_DEVICE Bounds bounds_of_all(const Visibility& v, int b, const Sequence& s, int first, int last) {
  Bounds all{s.nk, 0};
#pragma unroll 1
  for (int i = first + thread_index() % 32; i <= last; i += 32) all = united(all, bounds_of(v, b, s, i));
  return united_in_warp(all);
}

template <class Config>
LONGATTN_DEVICE ForwardTile forward_tile(const ForwardParams& p, int t) {
  const int packed = Config::kCached ? p.packed : 1, splits = Config::kCached ? p.splits : 1;
  const ScheduledTile scheduled = tile_at(p.schedule, t / splits);
  ForwardTile tile;
  tile.split = t % splits;
  tile.b = scheduled.head / p.q_heads;
  tile.h = scheduled.head - tile.b * p.q_heads;
  tile.kv_head = tile.h / p.group;
  tile.first_query = scheduled.query_tile * Config::kQueries;
  tile.s = sequence(p.mask, tile.b);
  tile.rows = tile.s.nq * packed;
  const int last = smaller(tile.first_query + Config::kQueries, tile.rows) - 1;
  tile.keys =
      key_tiles(p.mask, tile.s, tile.s.shift + tile.first_query / packed, tile.s.shift + last / packed, Config::kKeys);
  if (Config::kKind == Kind::kGeneral && p.mask.lo)
    tile.keys = within(tile.keys, bounds_of_all(p.mask, tile.b, tile.s, tile.first_query, last), Config::kKeys);
  const int share = ceil_divided(tile.keys.count(), splits);
  tile.first_visit = tile.split * share;
  tile.visits = tile.first_query > last ? 0 : clamped(tile.keys.count() - tile.first_visit, 0, share);
  return tile;
}

// One warp: takes tiles, and fetches what they need.
template <class Config>
struct ForwardProducer {
  using Layout = ForwardLayout<Config>;
  static constexpr int kKeys = Config::kKeys;
  const ForwardParams& p;
  const Layout layout;
  const int lane = thread_index() % 32;
  // Fresh barriers count as empty.
  Ring<Config::kStages> key_ring{0, 1}, value_ring{0, 1};
  uint32_t query_parity = 1, landed_parity = 0, taken = 0;

  LONGATTN_DEVICE void run() {
    int t = block_index().x;
#pragma unroll 1
    while (true) {
      announce(t);
      if (t >= p.tiles) break;
      const int next = block_count().x + from_lane(lane == 0 ? fetch_add(p.next_tile, 1) : 0, 0);
      const ForwardTile tile = forward_tile<Config>(p, t);
      if (tile.visits) fetch_all(tile);
      t = next;
    }
  }

  LONGATTN_DEVICE void announce(int t) {
    const int slot = taken & 1;
    wait_as_warp(layout.taken_empty(slot), (taken >> 1 & 1) ^ 1);
    if (lane == 0) {
      store_shared(layout.taken(slot), static_cast<uint32_t>(t));
      mbarrier_arrive(layout.taken_full(slot));
    }
    sync_warp();
    ++taken;
  }

  // In the order in which they are needed: queries, keys 0, then keys i + 1 before values i.
  LONGATTN_DEVICE void fetch_all(const ForwardTile& tile) {
    wait_as_warp(layout.queries_empty(), query_parity);
    query_parity ^= 1;
    if (Config::kKind == Kind::kGeneral && p.mask.lo) {
#pragma unroll 1
      for (int row = lane; row < Config::kQueries; row += 32) {
        const Bounds bounds = bounds_of(p.mask, tile.b, tile.s, tile.first_query + row);
        store_shared(layout.low(row), static_cast<uint32_t>(bounds.low));
        store_shared(layout.high(row), static_cast<uint32_t>(bounds.high));
      }
      sync_warp();
    }
    if (lane == 0) {
      mbarrier_arrive_expect(layout.queries_full(), Layout::kQueryBytes);
      fetch<Config::kQueries, Config::kWidth>(layout.queries(), &p.q, layout.queries_full(),
                                              tile.s.q_start + tile.first_query, tile.h, tile.s.row, kEvictFirst);
    }
    fetch_keys(tile, tile.at(0));
#pragma unroll 1
    for (int i = 0; i < tile.visits; ++i) {
      if (i + 1 < tile.visits) fetch_keys(tile, tile.at(i + 1));
      fetch_values(tile, tile.at(i));
    }
  }

  LONGATTN_DEVICE void fetch_keys(const ForwardTile& tile, int n) {
    wait_as_warp(layout.keys_empty(key_ring.stage), key_ring.parity);
    if constexpr (Config::kGeneral) {
#pragma unroll 1
      for (int word = 0; word < (kKeys + 31) / 32; ++word) {
        const uint32_t bits = ballot(is_shown(p.mask, tile.b, tile.s, n * kKeys + word * 32 + lane));
        if (lane == 0) store_shared(layout.shown(key_ring.stage) + 4 * word, bits);
      }
    }
    fetch_tile(tile, n, &p.k, p.k_rows, layout.keys(key_ring.stage), layout.keys_full(key_ring.stage));
    sync_warp();
    key_ring.advance();
  }

  LONGATTN_DEVICE void fetch_values(const ForwardTile& tile, int n) {
    const uint32_t to = layout.values(value_ring.stage), full = layout.values_full(value_ring.stage);
    const bool clear = (p.ragged && (n + 1) * kKeys > tile.s.nk) || (Config::kGeneral && p.mask.key_mask);
    const uint32_t landed = clear ? layout.values_landed() : full;
    wait_as_warp(layout.values_empty(value_ring.stage), value_ring.parity);
    fetch_tile(tile, n, &p.v, p.v_rows, to, landed);
    if (clear) {
      mbarrier_wait(landed, landed_parity);
      landed_parity ^= 1;
#pragma unroll 1
      for (int row = lane; row < kKeys; row += 32)
        if (!is_shown(p.mask, tile.b, tile.s, n * kKeys + row)) clear_row<kKeys, Config::kWidth>(to, row);
      fence_proxy_async_shared();
      sync_warp();
      if (lane == 0) mbarrier_arrive(full);
    }
    sync_warp();
    value_ring.advance();
  }

  LONGATTN_DEVICE void fetch_tile(const ForwardTile& tile, int n, const TensorMap* map, const LongattnRows& rows,
                                  uint32_t to, uint32_t full) {
    if constexpr (Config::kCached) {
      if (!p.piece) return copy_rows(tile, n, rows, to, full);
      if (lane == 0) mbarrier_arrive_expect(full, Layout::kKeyBytes);
      sync_warp();
      // Past the end, the last keys again: nobody sees them, and the barrier counts whole tiles.
      const int first = smaller(n * kKeys + lane * p.piece, (tile.s.nk - 1) / p.piece * p.piece);
      if (lane * p.piece >= kKeys) return;
#pragma unroll
      for (int s = 0; s < slabs(Config::kWidth); ++s)
        load_tile(to + (s * kKeys + lane * p.piece) * kRowBytes, map, full, s * kSlab, first % p.page_size,
                  tile.kv_head, page(tile, first), kEvictFirst);
    } else {
      if (lane == 0) {
        mbarrier_arrive_expect(full, Layout::kKeyBytes);
        fetch<kKeys, Config::kWidth>(to, map, full, tile.s.k_start + n * kKeys, tile.kv_head, tile.s.row, kEvictLast);
      }
    }
  }

  LONGATTN_DEVICE int page(const ForwardTile& tile, int j) const {
    return clamped(p.table[static_cast<int64_t>(tile.b) * p.table_width + j / p.page_size], 0, p.pages - 1);
  }

  // As TMA would have it, for pages that no box fits.
  LONGATTN_DEVICE void copy_rows(const ForwardTile& tile, int n, const LongattnRows& rows, uint32_t to, uint32_t full) {
    const int width = rows.token;
#pragma unroll 1
    for (int row = lane; row < kKeys; row += 32) {
      const int j = n * kKeys + row;
      const bool exists = j < tile.s.nk;
      const uint16_t* from = exists ? row_of(rows, page(tile, j), tile.kv_head, j % p.page_size) : nullptr;
#pragma unroll 1
      for (int c = 0; c < slabs(Config::kWidth) * kSlab; c += 8) {
        const uint4 x = exists && c < width ? *reinterpret_cast<const uint4*>(from + c) : make_uint4(0, 0, 0, 0);
        store_shared(to + (c / kSlab * kKeys + row) * kRowBytes + ((c % kSlab / 8 ^ row % 8) << 4), x);
      }
    }
    fence_proxy_async_shared();
    sync_warp();
    if (lane == 0) mbarrier_arrive(full);
    sync_warp();
  }
};

// A warpgroup: 64 rows of each tile.
template <class Config>
struct ForwardConsumer {
  using Element = typename Config::Element;
  using Layout = ForwardLayout<Config>;
  using Scores = Wgmma<Element, Config::kKeys>;
  using Outputs = Wgmma<Element, Config::kWidth>;
  static constexpr int kKeys = Config::kKeys, kWidth = Config::kWidth, kThreadsOfTwo = 256;
  static constexpr bool kGeneral = Config::kGeneral;

  const ForwardParams& p;
  const Layout layout;
  const int warpgroup;  // 0 to kWarpgroups - 1
  const int lane = thread_index() % 32, column = 2 * (thread_index() % 4);
  Ring<Config::kStages> key_ring{0, 0}, value_ring{0, 0};
  uint32_t query_parity = 0, taken = 0;
  float S[kKeys / 2], O[kWidth / 2], top[2], sum[2], shrink[2];
  uint32_t P[kKeys / 4];
  int position[2];  // of this thread's rows

  LONGATTN_DEVICE void run() {
    if constexpr (Config::kTakeTurns)
      if (warpgroup == Config::kWarpgroups - 1) named_barrier_arrive(1, kThreadsOfTwo);  // the first may begin
#pragma unroll 1
    while (true) {
      const int t = next_tile();
      if (t >= p.tiles) break;
      const ForwardTile tile = forward_tile<Config>(p, t);
      const int row = tile.first_query + warpgroup * 64 + thread_index() / 32 % 4 * 16 + lane / 4;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        position[r] = tile.s.shift + (Config::kCached ? (row + 8 * r) / p.packed : row + 8 * r);
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) O[i] = 0.0f;
      top[0] = top[1] = -kInfinity;
      sum[0] = sum[1] = 0.0f;
      if (tile.visits) attend(tile);
      finish(tile, row);
    }
  }

  LONGATTN_DEVICE int next_tile() {
    const int slot = taken & 1;
    mbarrier_wait(layout.taken_full(slot), taken >> 1 & 1);
    const int t = static_cast<int>(load_shared(layout.taken(slot)));
    release(layout.taken_empty(slot));
    ++taken;
    return from_lane(t, 0);
  }

  LONGATTN_DEVICE void release(uint32_t barrier) {
    sync_warp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  LONGATTN_DEVICE void attend(const ForwardTile& tile) {
    const KeyTiles& keys = tile.keys;
    mbarrier_wait(layout.queries_full(), query_parity);
    query_parity ^= 1;
    // Scores of the first tile of keys; nothing to overlap them with yet.
    mbarrier_wait(layout.keys_full(key_ring.stage), key_ring.parity);
    wgmma_fence();
    start_scores();
    wgmma_wait<0>();
    pin(S);
    finish_keys<true, true>(tile, tile.at(0));
    softmax<true>();
    round_weights();
    int i = 1;
    if constexpr (Config::kKind == Kind::kFull) {
#pragma unroll 1
      for (; i < tile.visits; ++i) step<false, false>(tile, tile.at(i));
    } else if constexpr (kGeneral) {
#pragma unroll 1
      for (; i < tile.visits; ++i) step<true, true>(tile, tile.at(i));
    } else {
#pragma unroll 1
      for (; i < keys.end - keys.full_end; ++i) step<true, true>(tile, tile.at(i));
#pragma unroll 1
      for (; i < keys.end - keys.full_first; ++i) step<false, false>(tile, tile.at(i));
#pragma unroll 1
      for (; i < tile.visits; ++i) step<false, true>(tile, tile.at(i));
    }
    release(layout.queries_empty());
    // Values of the last.
    mbarrier_wait(layout.values_full(value_ring.stage), value_ring.parity);
    pin(O);
    pin(P);
    wgmma_fence();
    start_outputs();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += from_lane_xor(sum[r], 1);
      sum[r] += from_lane_xor(sum[r], 2);
    }
    wgmma_wait<0>();
    pin(O);
    release(layout.values_empty(value_ring.stage));
    value_ring.advance();
  }

  // Scores of tile n, and with the weights of the tile before, its outputs.
  template <bool Right, bool Left>
  LONGATTN_DEVICE void step(const ForwardTile& tile, int n) {
    mbarrier_wait(layout.keys_full(key_ring.stage), key_ring.parity);
    if constexpr (Config::kTakeTurns) named_barrier_sync(1 + warpgroup, kThreadsOfTwo);
    pin(O);
    pin(P);
    wgmma_fence();
    start_scores();
    mbarrier_wait(layout.values_full(value_ring.stage), value_ring.parity);
    wgmma_fence();
    start_outputs();
    if constexpr (Config::kTakeTurns) named_barrier_arrive(1 + (warpgroup + 1) % Config::kWarpgroups, kThreadsOfTwo);
    wgmma_wait<1>();
    pin(S);
    finish_keys<Right, Left>(tile, n);
    softmax<false>();
    compute_before(sum[0], sum[1]);
    pin(S);
    wgmma_wait<0>();
    pin(O);
    pin(S);
    release(layout.values_empty(value_ring.stage));
    value_ring.advance();
    round_weights();
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) O[i] *= shrink[i / 2 % 2];
  }

  // S = Q K^T
  LONGATTN_DEVICE void start_scores() {
    const uint32_t q = descriptor(layout.queries() + warpgroup * 64 * kRowBytes, 16);
    const uint32_t k = descriptor(layout.keys(0), 16) + key_ring.stage * (Layout::kKeyBytes >> 4);
    Scores::template multiply<kAlongK, kAlongK>(S, q, k);
#pragma unroll
    for (int i = 1; i < kWidth / 16; ++i)
      Scores::template multiply_add<kAlongK, kAlongK>(S, q + along_columns(i, Config::kQueries),
                                                      k + along_columns(i, kKeys));
    wgmma_commit();
  }

  // O += P V
  LONGATTN_DEVICE void start_outputs() {
    const uint32_t v = descriptor(layout.values(0), kKeys * kRowBytes) + value_ring.stage * (Layout::kKeyBytes >> 4);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) Outputs::template multiply_add<kAlongMN>(O, P + 4 * i, v + along_rows(i));
    wgmma_commit();
  }

  // What makes products scores, and hides what is not seen.
  template <bool Right, bool Left>
  LONGATTN_DEVICE void finish_keys(const ForwardTile& tile, int n) {
    uint32_t shown[(kKeys + 31) / 32];
    if constexpr (kGeneral) {
#pragma unroll
      for (int word = 0; word < (kKeys + 31) / 32; ++word)
        shown[word] = load_shared(layout.shown(key_ring.stage) + 4 * word) >> column;
    }
    release(layout.keys_empty(key_ring.stage));
    key_ring.advance();
    if constexpr (kGeneral) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) S[i] *= p.scale;
      if (p.softcap > 0.0f) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i)  // tanh x = 1 - 2 / (1 + e^2x)
          S[i] = p.softcap - 2.0f * p.softcap * reciprocal_approx(1.0f + exp2_approx(S[i] * p.softcap_rate));
      }
    }
    if constexpr (Right || Left || kGeneral) {
      const int first = n * kKeys + column;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int stop = tile.s.nk;
        if constexpr (Config::kKind != Kind::kFull) stop = smaller(stop, position[r] + p.mask.right + 1);
        stop -= first;
        const int start = position[r] - p.mask.left - first, sinks = p.mask.sinks - first;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = 8 * j + e;
            bool hidden = false;
            if constexpr (Right) hidden |= c >= stop;
            if constexpr (Left && Config::kKind != Kind::kFull) hidden |= c < start && c >= sinks;
            if constexpr (kGeneral) hidden |= !(shown[c / 32] >> c % 32 & 1);
            float& x = S[4 * j + 2 * r + e];
            x = hidden ? -kInfinity : x;
          }
      }
    }
    if constexpr (Config::kKind == Kind::kGeneral) {
      if (p.mask.lo) hide_out_of_bounds(n * kKeys + column);
    }
  }

  LONGATTN_DEVICE void hide_out_of_bounds(int first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = (thread_index() - 128) / 32 * 16 + lane / 4 + 8 * r;
      const int low = static_cast<int>(load_shared(layout.low(row))) - first;
      const int high = static_cast<int>(load_shared(layout.high(row))) - first;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = 8 * j + e;
          float& x = S[4 * j + 2 * r + e];
          x = c < low || c >= high ? -kInfinity : x;
        }
    }
  }

  // S becomes weights; top, sum and shrink follow.
  template <bool First>
  LONGATTN_DEVICE void softmax() {
    float high[2][2] = {{S[0], S[1]}, {S[2], S[3]}};  // chains of maxima that do not wait for each other
#pragma unroll
    for (int i = 4; i < kKeys / 2; ++i) high[i / 2 % 2][i % 2] = fmaxf(high[i / 2 % 2][i % 2], S[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = fmaxf(high[r][0], high[r][1]);
      now = fmaxf(now, from_lane_xor(now, 1));
      now = fmaxf(now, from_lane_xor(now, 2));
      if constexpr (!First) {
        now = fmaxf(now, top[r]);
        shrink[r] = exp2_approx((top[r] - (now == -kInfinity ? 0.0f : now)) * p.unit);
      }
      top[r] = now;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float base = top[r] == -kInfinity ? 0.0f : top[r] * p.unit;  // a row that has seen nothing so far
      float part[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = S[4 * j + 2 * r + e];
          x = exp2_approx(fmaf(x, p.unit, -base));
          part[e] += x;
        }
      sum[r] = First ? part[0] + part[1] : fmaf(sum[r], shrink[r], part[0] + part[1]);
    }
  }

  LONGATTN_DEVICE void round_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) P[i] = pack<Element>(S[2 * i], S[2 * i + 1]);
  }

  // A sink logit is one more key without a value.
  LONGATTN_DEVICE void finish(const ForwardTile& tile, int row) {
    if constexpr (Config::kCached) return finish_split(tile, row);
    const float sink = p.sink_logits ? p.sink_logits[tile.h] * kLog2E : -kInfinity;
    float factor[2];
    uint16_t* rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float own = top[r] == -kInfinity ? -kInfinity : top[r] * p.unit, high = fmaxf(own, sink);
      const float base = high == -kInfinity ? 0.0f : high, weight = exp2_approx(own - base);
      const float total = sum[r] * weight + exp2_approx(sink - base);
      factor[r] = total == 0.0f ? 0.0f : weight / total;
      const int i = row + 8 * r;
      const bool exists = i < tile.s.nq;
      rows[r] = exists ? row_of(p.out, tile.s.row, tile.h, tile.s.q_start + i) : nullptr;
      if (exists && lane % 4 == 0)
        p.lse[(static_cast<int64_t>(tile.s.row) * p.q_heads + tile.h) * p.mask.nq + tile.s.q_start + i] =
            total == 0.0f ? -kInfinity : (base + log2_approx(total)) * kLn2;
    }
    store_rows<Element, kWidth>(O, factor, rows, p.v_head_dim);
  }

  LONGATTN_DEVICE void finish_split(const ForwardTile& tile, int row) {
    const int rows = p.mask.nq * p.packed;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = row + 8 * r;
      if (i >= rows) continue;
      const int64_t head =
          (static_cast<int64_t>(tile.split) * p.schedule.heads + tile.b * p.q_heads + tile.h) * rows + i;
      const float factor = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
      if (lane % 4 == 0)
        p.partial_lse[head] = sum[r] == 0.0f ? -kInfinity : top[r] * p.unit * kLn2 + log2_approx(sum[r]) * kLn2;
      float* out = p.partial_out + head * kWidth + column;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
        *reinterpret_cast<float2*>(out + 8 * j) = make_float2(O[4 * j + 2 * r] * factor, O[4 * j + 2 * r + 1] * factor);
    }
  }
};

template <class Config>
LONGATTN_KERNEL(Config::kThreads)
forward_kernel(LONGATTN_PARAMS ForwardParams p) {
  const ForwardLayout<Config> layout{shared_base()};
  if (thread_index() == 0) layout.init();
  sync_block(Config::kThreads);
  const int warpgroup = from_lane(thread_index() / 128, 0);
  if (warpgroup == 0) {
    if constexpr (Config::kWarpgroups > 1) release_registers<Config::kProducerRegisters>();
    if (thread_index() < 32) ForwardProducer<Config>{p, layout}.run();
  } else {
    if constexpr (Config::kWarpgroups > 1) allocate_registers<Config::kConsumerRegisters>();
    ForwardConsumer<Config>{p, layout, warpgroup - 1}.run();
  }
}

}  // namespace longattn::cuda
