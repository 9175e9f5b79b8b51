#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/attention.h"
#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "cpu/tiles.h"

namespace longattn {

namespace {

constexpr int64_t kAppendTokens = 64;  // of a tile

// A few rows are not worth waking other threads.
int64_t threads_for(const AttentionParams& p) { return p.nq == 1 ? 1 : p.threads; }

constexpr int64_t kAngleTokens = 256;

void append(const AttentionParams& p) {
  if (!p.new_k.data || p.nq == 0) return;
  const Kernels& isa = kernels();
  std::vector<KeyTile> tiles;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(p, b);
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t first = 0; first < s.lq; first += kAppendTokens)
        tiles.push_back({s, head, first, std::min(kAppendTokens, s.lq - first)});
  }
  const Scratch scratch(p.threads, isa.append_scratch(p));
  parallel_for(threads_for(p), static_cast<int64_t>(tiles.size()),
               [&](int64_t thread, int64_t index) { isa.append(p, tiles[index], scratch.of(thread)); });
}

// 0 and -inf in the rows past a sequence's queries.
void fill_padding(const AttentionParams& p) {
  if (p.nq == 0) return;
  const bool wide = p.dtype == DType::kFloat64;
  const int64_t bytes = wide ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t head = 0; head < p.q_heads; ++head)
      for (int64_t i = p.query_lens[b]; i < p.nq; ++i) {
        std::memset(p.out.data + (b * p.out.batch + head * p.out.head + i * p.out.token) * bytes, 0,
                    p.v_head_dim * bytes);
        const int64_t row = (b * p.q_heads + head) * p.nq + i;
        if (wide)
          reinterpret_cast<double*>(p.lse)[row] = -INFINITY;
        else
          reinterpret_cast<float*>(p.lse)[row] = -INFINITY;
      }
}

// Calls f with the angles of queries, which are new tokens, in place.
template <class F>
void with_angles(AttentionParams p, F f) {
  const int64_t number = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float), half = p.rotated / 2;
  if (p.frame > 0) {
    p.q_angles = p.k_angles;
    p.q_angles.cos += (p.frame - 1) * half * number;
    p.q_angles.sin += (p.frame - 1) * half * number;
    return f(p);
  }
  if (!p.rotated) return f(p);
  const int64_t table = p.nq * half;
  const Scratch angles(1, 2 * p.batch * table * number);
  char* cos = angles.of(0);
  char* sin = cos + p.batch * table * number;
  const Kernels& isa = kernels();
  const int64_t tiles = (p.nq + kAngleTokens - 1) / kAngleTokens;
  parallel_for(threads_for(p), p.batch * tiles, [&](int64_t, int64_t index) {
    const int64_t b = index / tiles, first = index % tiles * kAngleTokens;
    const Sequence s = sequence(p, b);
    const int64_t at = (b * table + first * half) * number;
    AngleParams a;
    a.tokens = std::min(kAngleTokens, s.lq - first);
    a.half = half;
    a.dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    a.inv_freq = p.inv_freq + b * p.inv_freq_batch;
    a.factor = p.rope_factor;
    a.cos = cos + at;
    a.sin = sin + at;
    float stands[kAngleTokens];
    if (p.positions) {
      a.positions = p.positions + b * p.positions_batch + first;
    } else {
      for (int64_t i = 0; i < a.tokens; ++i) stands[i] = static_cast<float>(s.shift + first + i);
      a.positions = stands;
    }
    isa.angles(a);
  });
  p.q_angles = {cos, sin, table};
  f(p);
}

}  // namespace

void attention_append(const AttentionParams& params) {
  check_decode(params);
  with_angles(params, append);
}

void attention_decode(const AttentionParams& params) {
  check_decode(params);
  with_angles(params, [](const AttentionParams& p) {
    append(p);
    run_forward(p);
    fill_padding(p);
  });
}

}  // namespace longattn
