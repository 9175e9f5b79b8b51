// New keys and values into the slots of a cache: rotated, unless that is left to the reader, and converted.
#pragma once

#include "cpu/kernels/panel.h"

namespace longattn {
namespace {

template <class T>
inline void append_row(KeyRows* rows, int64_t j, int64_t columns, const T* row) {
  if (rows->dtype() == DType::kInt8)
    rows->scale(j) = store_int8(row, columns, reinterpret_cast<int8_t*>(rows->at(j)));
  else
    store_row(row, rows->dtype(), columns, rows->at(j));
}

template <class T>
void append_tile(const AttentionParams& p, const KeyTile& tile, char* scratch) {
  const Sequence& s = tile.sequence;
  const bool rotated = p.rotated > 0 && !turns_keys(p);
  KeyRows keys(p, s, p.k, tile.kv_head), values(p, s, p.v, tile.kv_head);
  T* row = reinterpret_cast<T*>(scratch);
  for (int64_t i = tile.first_key; i < tile.first_key + tile.keys; ++i) {
    load_row(row_address(p.new_k, p.dtype, s.row, tile.kv_head, i), p.dtype, p.head_dim, row);
    if (rotated) rotate_row(row, p.rotated, p.q_angles, s.index, i, p.interleaved, false);
    append_row(&keys, s.shift + i, p.head_dim, row);
    load_row(row_address(p.new_v, p.dtype, s.row, tile.kv_head, i), p.dtype, p.v_head_dim, row);
    append_row(&values, s.shift + i, p.v_head_dim, row);
  }
}

}  // namespace
}  // namespace longattn
