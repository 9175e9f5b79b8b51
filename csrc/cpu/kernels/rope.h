// The rotation alone, row by row.
#pragma once

#include "cpu/kernels/rows.h"

namespace longattn {
namespace {

template <class T>
void rope_rows(const RopeParams& p, const Angles& angles, int64_t batch, int64_t head, int64_t first, int64_t tokens,
               char* scratch) {
  T* row = reinterpret_cast<T*>(scratch);
  for (int64_t token = first; token < first + tokens; ++token) {
    load_row(row_address(p.x, p.dtype, batch, head, token), p.dtype, p.width, row);
    rotate_row(row, p.rotated, angles, batch, token - first, p.interleaved, p.inverse);
    store_row(row, p.dtype, p.width, row_address(p.out, p.dtype, batch, head, token));
  }
}

}  // namespace
}  // namespace longattn
