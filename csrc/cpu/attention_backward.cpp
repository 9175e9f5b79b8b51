#include <algorithm>
#include <atomic>
#include <optional>
#include <thread>

#include "cpu/attention.h"
#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "cpu/tiles.h"
#include "cpu/turned.h"

namespace longattn {

namespace {

// The key tiles of one sequence and head form a chain: each adds to a row of dq only after its predecessors have, so
// that sums are always in the same order. Tiles are handed out along the chains, so the first unfinished one never
// waits.
class Chain {
 public:
  static constexpr int64_t kDone = INT64_MAX;

  Chain(std::atomic<int64_t>* progress, int64_t tile) : progress_(progress), tile_(tile) {}

  void wait(int64_t panel) {
    while (done_ < tile_ && progress_[done_].load(std::memory_order_acquire) == kDone) ++done_;
    for (int64_t before = tile_ - 1; before >= done_; --before) {
      for (int spins = 0;; ++spins) {
        const int64_t passed = progress_[before].load(std::memory_order_acquire);
        if (passed == kDone) break;  // ask the one before it
        if (passed > panel) return;  // which waited for all before it
        if (spins > 64) std::this_thread::yield();
      }
    }
  }

  void pass(int64_t panel) { progress_[tile_].store(panel + 1, std::memory_order_release); }
  void finish() { progress_[tile_].store(kDone, std::memory_order_release); }

 private:
  std::atomic<int64_t>* progress_;  // of each tile of the chain: the panels before this one are done with
  int64_t tile_;
  int64_t done_ = 0;  // tiles before this one are known to be done
};

struct Link {
  KeyTile tile;
  int64_t chain, place;  // place in the chain
};

// Tiles in the order of their places in the chains, so that a thread rarely meets its predecessor; long sequences
// first.
std::vector<Link> key_tiles(const AttentionParams& p, std::vector<int64_t>* chain_starts) {
  if (p.nk == 0) return {};
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.batch; ++b) sequences.push_back(sequence(p, b));
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const Sequence& a, const Sequence& b) { return a.lq * a.lk > b.lq * b.lk; });
  int64_t most = 0, total = 0;
  for (const Sequence& s : sequences) {
    const int64_t tiles = (s.lk + kKeyBlock - 1) / kKeyBlock;
    most = std::max(most, tiles);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      chain_starts->push_back(total);
      total += tiles;
    }
  }
  std::vector<Link> links;
  links.reserve(static_cast<size_t>(total));
  for (int64_t place = 0; place < most; ++place)
    for (size_t n = 0; n < sequences.size(); ++n) {
      const Sequence& s = sequences[n];
      const int64_t first = place * kKeyBlock;
      if (first >= s.lk) continue;
      for (int64_t head = 0; head < p.kv_heads; ++head)
        links.push_back(
            {{s, head, first, std::min(kKeyBlock, s.lk - first)}, static_cast<int64_t>(n) * p.kv_heads + head, place});
    }
  return links;
}

// Tiles of the gradient of bias that no other tile writes.
std::vector<BiasTile> bias_tiles(const AttentionParams& p) {
  const auto step = [](int64_t stride, int64_t size, int64_t tile) {
    return stride ? tile : std::max<int64_t>(1, size);
  };
  const Bias& bias = p.dbias;
  const int64_t batches = step(bias.batch, p.batch, 1), heads = step(bias.head, p.q_heads, 1);
  const int64_t queries = step(bias.query, p.nq, kPanelRows), keys = step(bias.key, p.nk, kKeyBlock);
  std::vector<BiasTile> tiles;
  if (p.nq == 0 || p.nk == 0) return tiles;
  for (int64_t b = 0; b < p.batch; b += batches)
    for (int64_t h = 0; h < p.q_heads; h += heads)
      for (int64_t i = 0; i < p.nq; i += queries)
        for (int64_t j = 0; j < p.nk; j += keys)
          tiles.push_back({b, std::min(b + batches, p.batch), h, std::min(h + heads, p.q_heads), i,
                           std::min(i + queries, p.nq), j, std::min(j + keys, p.nk)});
  return tiles;
}

}  // namespace

void attention_backward(const AttentionParams& given) {
  check_backward(given);
  const Kernels& isa = kernels();
  AttentionParams params = given;
  std::optional<Turned> turned;
  if (params.rotated && isa.multiplies(params.dtype) && params.nk > kKeyBlock) {  // each tile of keys reads all queries
    turned.emplace(params, params.q, params.q_angles, params.q_heads, params.nq);
    params.q = turned->view();
    params.q_turned = true;
  }
  const std::vector<QueryTile> queries = query_tiles(params);
  const Scratch scratch(params.threads, isa.backward_scratch(params));
  std::atomic<bool> large{false};
  parallel_for(params.threads, static_cast<int64_t>(queries.size()), [&](int64_t, int64_t index) {
    if (isa.backward_delta(params, queries[index])) large.store(true, std::memory_order_relaxed);
  });
  std::optional<Scratch> shares;
  if (large.load()) {
    const int64_t number = params.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
    shares.emplace(1, (params.cu_seqlens_q ? 1 : params.batch) * params.q_heads * params.nq * number);
    params.shares = shares->of(0);
    parallel_for(params.threads, static_cast<int64_t>(queries.size()), [&](int64_t thread, int64_t index) {
      isa.backward_shares(params, queries[index], scratch.of(thread));
    });
  }

  std::vector<int64_t> chain_starts;
  const std::vector<Link> links = key_tiles(params, &chain_starts);
  std::vector<std::atomic<int64_t>> progress(links.size());
  parallel_for(params.threads, static_cast<int64_t>(links.size()), [&](int64_t thread, int64_t index) {
    const Link& link = links[index];
    Chain chain(progress.data() + chain_starts[link.chain], link.place);
    const Turn turn{[](void* state, int64_t panel) { static_cast<Chain*>(state)->wait(panel); },
                    [](void* state, int64_t panel) { static_cast<Chain*>(state)->pass(panel); }, &chain};
    isa.backward(params, link.tile, turn, scratch.of(thread));
    chain.finish();
  });

  if (params.dq.data && (params.dq.data != params.dq_sum.data || params.rotated))
    parallel_for(params.threads, static_cast<int64_t>(queries.size()), [&](int64_t thread, int64_t index) {
      isa.backward_finish(params, queries[index], scratch.of(thread));
    });

  if (params.dbias.data) {
    const std::vector<BiasTile> tiles = bias_tiles(params);
    parallel_for(params.threads, static_cast<int64_t>(tiles.size()),
                 [&](int64_t thread, int64_t index) { isa.backward_bias(params, tiles[index], scratch.of(thread)); });
  }
}

}  // namespace longattn
