// From a call on a cache to its kernels.
#pragma once

#include "hopper/launch.h"
#include "host/attention.h"
#include "host/plan.h"
#include "host/table.h"
#include "kernels/forward.h"

namespace longattn::cuda {

template <class Element, int Width>
const char* launch_decode(const LongattnCall& call) {
  using Config = ForwardConfig<Element, Width, 1, decode_keys(Width), Kind::kCached>;
  const int group = call.q_heads / call.kv_heads, rows = call.nq * group;
  ForwardParams p{};
  const LongattnRows packed{call.packed_q, static_cast<int64_t>(call.kv_heads) * rows * call.head_dim,
                            static_cast<int64_t>(rows) * call.head_dim, call.head_dim};
  p.piece = cache_piece(call, Config::kKeys);
  const auto page_map = [&](TensorMap* to, const LongattnRows& x, int width) -> const char* {
    if (!p.piece) return nullptr;
    return encode<Element>(to, x.data, map_shape(x, call.pages, call.kv_heads, call.page_size, width, p.piece));
  };
  if (const char* fault = encode<Element>(
          &p.q, packed.data, map_shape(packed, call.batch, call.kv_heads, rows, call.head_dim, Config::kQueries)))
    return fault;
  if (const char* fault = page_map(&p.k, call.k, call.head_dim)) return fault;
  if (const char* fault = page_map(&p.v, call.v, call.v_head_dim)) return fault;
  p.k_rows = call.k;
  p.v_rows = call.v;
  p.mask = visibility(call);
  p.next_tile = call.counters;
  p.q_heads = call.kv_heads;
  p.group = 1;
  p.head_dim = call.head_dim;
  p.v_head_dim = call.v_head_dim;
  p.ragged = 1;  // slots that nobody wrote may hold anything
  p.scale = call.scale;
  p.softcap = call.softcap;
  p.softcap_rate = softcap_rate(call);
  p.unit = kLog2E;
  p.table = call.table;
  p.packed = group;
  p.table_width = call.table_width;
  p.pages = call.pages;
  p.page_size = call.page_size;
  p.partial_out = call.partial_out;
  p.partial_lse = call.partial_lse;
  p.splits = split_count(call);
  p.schedule = {ceil_divided(rows, Config::kQueries), call.batch * call.kv_heads, call.batch * call.kv_heads, 0};
  p.tiles = p.schedule.query_tiles * p.schedule.heads * p.splits;
  const dim3 blocks(static_cast<unsigned>(smaller(p.tiles, multiprocessors())));
  return launch(forward_kernel<Config>, "decode", blocks, Config::kThreads, ForwardLayout<Config>::kBytes, call.stream,
                p);
}

template <int Width>
const char* decode_of_width(const LongattnCall& call) {
  return call.is_bfloat16 ? launch_decode<BFloat16, Width>(call) : launch_decode<Half, Width>(call);
}

}  // namespace longattn::cuda
