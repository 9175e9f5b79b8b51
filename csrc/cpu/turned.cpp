#include "cpu/turned.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace longattn {

namespace {

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

Turned::Turned(const AttentionParams& params, const Tensor4& x, const Angles& angles, int64_t heads, int64_t tokens)
    : memory_(1, (params.cu_seqlens_k ? 1 : params.batch) * heads * tokens * params.head_dim * bytes_of(params.dtype)) {
  constexpr int64_t kTokens = 128;  // of a tile
  const Kernels& isa = kernels();
  RopeParams rope;
  rope.batch = params.cu_seqlens_k ? 1 : params.batch;
  rope.heads = heads;
  rope.tokens = tokens;
  rope.width = params.head_dim;
  rope.rotated = params.rotated;
  rope.dtype = params.dtype;
  rope.interleaved = params.interleaved;
  rope.x = x;
  rope.out = view_ = {memory_.of(0), heads * tokens * rope.width, tokens * rope.width, rope.width, nullptr};
  const int64_t number = params.dtype == DType::kFloat64 ? 8 : 4, tiles = (tokens + kTokens - 1) / kTokens;
  const Scratch rows(params.threads, isa.rope_scratch(rope));
  parallel_for(params.threads, rope.batch * heads * tiles, [&](int64_t thread, int64_t index) {
    const int64_t batch = index / heads / tiles, head = index / tiles % heads, first = index % tiles * kTokens;
    const int64_t at = (batch * angles.batch + first * (params.rotated / 2)) * number;
    isa.rope(rope, {angles.cos + at, angles.sin + at, 0}, batch, head, first, std::min(kTokens, tokens - first),
             rows.of(thread));
  });
}

}  // namespace longattn
