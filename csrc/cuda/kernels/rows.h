// Where the backward keeps what it knows of each query.
#pragma once

#include "kernels/visibility.h"

namespace longattn::cuda {

constexpr int kSumBlock = 64 * 64;  // rows and columns of dQ that are added up together

// Tiles of queries of all sequences, one after the other, whose rows start anew for each: packed sequence b, of which
// floor(start / size) + b tiles lie before, has room for whole tiles.
struct RowTiles {
  int of_head;   // tiles
  int sequence;  // tiles of a sequence, 0 if packed

  LONGATTN_HOST_DEVICE int first(const Sequence& s, int b, int size) const {
    return sequence ? b * sequence : s.q_start / size + b;
  }
};

}  // namespace longattn::cuda
