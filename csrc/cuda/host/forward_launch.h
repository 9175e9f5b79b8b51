// From a call to a forward kernel.
#pragma once

#include "hopper/launch.h"
#include "host/attention.h"
#include "host/plan.h"
#include "host/table.h"
#include "kernels/forward.h"

namespace longattn::cuda {

template <class Config>
const char* launch_forward(const LongattnCall& call) {
  using Element = typename Config::Element;
  ForwardParams p{};
  const int rows = memory_rows(call);
  const auto map = [&](TensorMap* to, const LongattnRows& x, int heads, int tokens, int width, int tile) {
    return encode<Element>(to, x.data, map_shape(x, rows, heads, tokens, width, tile));
  };
  if (const char* fault = map(&p.q, call.q, call.q_heads, call.nq, call.head_dim, Config::kQueries)) return fault;
  if (const char* fault = map(&p.k, call.k, call.kv_heads, call.nk, call.head_dim, Config::kKeys)) return fault;
  if (const char* fault = map(&p.v, call.v, call.kv_heads, call.nk, call.v_head_dim, Config::kKeys)) return fault;
  p.out = call.out;
  p.lse = call.lse;
  p.mask = visibility(call);
  p.sink_logits = call.sink_logits;
  p.next_tile = call.counters;
  p.q_heads = call.q_heads;
  p.group = call.q_heads / call.kv_heads;
  p.head_dim = call.head_dim;
  p.v_head_dim = call.v_head_dim;
  p.ragged = is_ragged(call);
  const bool plain = Config::kKind != Kind::kGeneral;
  p.scale = call.scale;
  p.softcap = call.softcap;
  p.softcap_rate = softcap_rate(call);
  p.unit = plain ? call.scale * kLog2E : kLog2E;

  const int heads = call.batch * call.q_heads;
  int64_t keys = longest_keys(call);
  if (p.mask.left < kUnbounded && p.mask.right < kUnbounded)  // the tiles of a head that run at once see no more
    keys = std::min<int64_t>(keys, 4 * (static_cast<int64_t>(p.mask.left) + p.mask.right + 1));
  const int64_t bytes = keys * (call.head_dim + call.v_head_dim) * 2;
  p.schedule = {ceil_divided(longest_queries(call), Config::kQueries), heads, heads_together(heads, p.group, bytes),
                Config::kKind != Kind::kFull};
  p.tiles = p.schedule.query_tiles * heads;
  if (!p.tiles) return nullptr;
  const dim3 blocks(static_cast<unsigned>(smaller(p.tiles, multiprocessors())));
  return launch(forward_kernel<Config>, "forward", blocks, Config::kThreads, ForwardLayout<Config>::kBytes, call.stream,
                p);
}

template <class Element, int Width>
const char* forward_of_element(const LongattnCall& call) {
  constexpr ForwardRow kRow = forward_row(Width);
  if (has_other_scores(call) || call.key_mask || call.lo)
    return launch_forward<ForwardConfig<Element, Width, kRow.general.warpgroups, kRow.general.keys, Kind::kGeneral>>(
        call);
  if (is_windowed(visibility(call)))
    return launch_forward<ForwardConfig<Element, Width, kRow.windowed.warpgroups, kRow.windowed.keys, Kind::kWindowed>>(
        call);
  return launch_forward<ForwardConfig<Element, Width, kRow.full.warpgroups, kRow.full.keys, Kind::kFull>>(call);
}

template <int Width>
const char* forward_of_width(const LongattnCall& call) {
  return call.is_bfloat16 ? forward_of_element<BFloat16, Width>(call) : forward_of_element<Half, Width>(call);
}

}  // namespace longattn::cuda
