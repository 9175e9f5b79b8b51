#include <algorithm>

#include "cpu/attention.h"
#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace longattn {

void rope(const RopeParams& params) {
  check_rope(params);
  constexpr int64_t kTokens = 256;  // of a tile
  const Kernels& isa = kernels();
  const Scratch scratch(params.threads, isa.rope_scratch(params));
  const int64_t tiles = (params.tokens + kTokens - 1) / kTokens;
  parallel_for(params.threads, params.batch * params.heads * tiles, [&](int64_t thread, int64_t index) {
    const int64_t first = index / params.heads % tiles * kTokens;
    isa.rope(params, index / params.heads / tiles, index % params.heads, first,
             std::min(kTokens, params.tokens - first), scratch.of(thread));
  });
}

}  // namespace longattn
