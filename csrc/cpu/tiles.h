// How a call is cut into tiles. Sizes follow from shapes alone, so that results do not depend on the number of threads.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace longattn {

// Panels in a tile of queries.
int64_t panels_per_tile(const AttentionParams& params);

// Every tile of queries: sequence by sequence, the longest first; head by head; those that see the most keys first.
std::vector<QueryTile> query_tiles(const AttentionParams& params);

// attention_forward, once the params are checked.
void run_forward(const AttentionParams& params);

// The keys a tile sees lie in [start, stop), up to sinks before it and to bounds.
KeyRange keys_of(const AttentionParams& params, const QueryTile& tile);

}  // namespace longattn
