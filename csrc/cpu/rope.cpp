#include <algorithm>

#include "cpu/attention.h"
#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace longattn {

namespace {

// Of a tile: its tables lie in the second level of cache, while one head after another turns by them.
constexpr int64_t kMostTokens = 128;
constexpr int64_t kTilesPerThread = 4;

int64_t numbers(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

}  // namespace

void angles(const AngleParams& params) {
  check_angles(params);
  const Kernels& isa = kernels();
  parallel_for(params.threads, (params.tokens + kMostTokens - 1) / kMostTokens, [&](int64_t, int64_t index) {
    const int64_t first = index * kMostTokens, at = first * params.half * numbers(params.dtype);
    AngleParams tile = params;
    tile.tokens = std::min(kMostTokens, params.tokens - first);
    tile.positions += first;
    tile.cos += at;
    tile.sin += at;
    isa.angles(tile);
  });
}

void rope(const RopeParams& params) {
  check_rope(params);
  if (!params.batch || !params.heads || !params.tokens) return;  // however many there are of the others
  const Kernels& isa = kernels();
  const int64_t number = numbers(params.dtype), half = params.rotated / 2;
  const int64_t share = params.tokens * params.batch / (params.threads * kTilesPerThread);
  const int64_t tokens = std::clamp<int64_t>(share, 1, kMostTokens), tiles = (params.tokens + tokens - 1) / tokens;
  const int64_t table = (tokens * half * number + 63) / 64 * 64;
  const Scratch scratch(params.threads, 2 * table + isa.rope_scratch(params));
  parallel_for(params.threads, params.batch * tiles, [&](int64_t thread, int64_t index) {
    const int64_t batch = index / tiles, first = index % tiles * tokens;
    char* cos = scratch.of(thread);
    AngleParams tile;
    tile.tokens = std::min(tokens, params.tokens - first);
    tile.half = half;
    tile.dtype = number == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
    tile.positions = params.positions + batch * params.positions_batch + first;
    tile.inv_freq = params.inv_freq;
    tile.factor = params.factor;
    tile.cos = cos;
    tile.sin = cos + table;
    if (half) isa.angles(tile);
    for (int64_t head = 0; head < params.heads; ++head)
      isa.rope(params, {tile.cos, tile.sin, 0}, batch, head, first, tile.tokens, cos + 2 * table);
  });
}

}  // namespace longattn
