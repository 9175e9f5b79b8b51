#include "cpu/attention.h"
#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "cpu/tiles.h"

namespace longattn {

void attention_forward(const AttentionParams& params) {
  check_forward(params);
  const Kernels& isa = kernels();
  const std::vector<QueryTile> tiles = query_tiles(params);
  const Scratch scratch(params.threads, isa.forward_scratch(params, panels_per_tile(params)));
  parallel_for(params.threads, static_cast<int64_t>(tiles.size()),
               [&](int64_t thread, int64_t index) { isa.forward(params, tiles[index], scratch.of(thread)); });
}

}  // namespace longattn
