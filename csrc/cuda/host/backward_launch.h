// From a call to the kernels of its backward.
#pragma once

#include "hopper/launch.h"
#include "host/attention.h"
#include "host/plan.h"
#include "host/table.h"
#include "kernels/backward.h"

namespace longattn::cuda {

template <class Config>
const char* launch_backward(const LongattnCall& call) {
  using Element = typename Config::Element;
  BackwardParams p{};
  const int rows = memory_rows(call), group = call.q_heads / call.kv_heads;
  const auto map = [&](TensorMap* to, const LongattnRows& x, int heads, int tokens, int width, int tile) {
    return encode<Element>(to, x.data, map_shape(x, rows, heads, tokens, width, tile));
  };
  if (const char* fault = map(&p.q, call.q, call.q_heads, call.nq, call.head_dim, Config::kQueries)) return fault;
  if (const char* fault = map(&p.k, call.k, call.kv_heads, call.nk, call.head_dim, Config::kKeys)) return fault;
  if (const char* fault = map(&p.v, call.v, call.kv_heads, call.nk, call.v_head_dim, Config::kKeys)) return fault;
  if (const char* fault = map(&p.dout, call.dout, call.q_heads, call.nq, call.v_head_dim, Config::kQueries))
    return fault;
  p.out_rows = call.out;
  p.dout_rows = call.dout;
  p.dq = call.dq;
  p.dk = call.dk;
  p.dv = call.dv;
  p.lse = call.lse;
  p.dlse = call.dlse;
  p.mask = visibility(call);
  p.rows = row_tiles(call, Config::kQueries);
  p.log_sums = call.row_terms;
  const int64_t rows_of_all = static_cast<int64_t>(call.q_heads) * p.rows.of_head * Config::kQueries;
  p.delta = call.row_terms + BackwardLayout<Config>::kQueryTerms * rows_of_all;
  p.tile_bounds = reinterpret_cast<Bounds*>(p.delta + rows_of_all);
  p.dq_sum = call.dq_sum;
  p.turns = call.counters;
  p.q_heads = call.q_heads;
  p.kv_heads = call.kv_heads;
  p.group = group;
  p.head_dim = call.head_dim;
  p.v_head_dim = call.v_head_dim;
  p.deterministic = call.deterministic;
  p.ragged = is_ragged(call);
  p.scale = call.scale;
  p.softcap = call.softcap;
  p.softcap_rate = softcap_rate(call);
  p.curvature = call.softcap > 0.0f ? 1.0f / (call.softcap * call.softcap) : 0.0f;
  p.unit = Config::kGeneral ? kLog2E : call.scale * kLog2E;

  const auto blocks = [&](int x, int heads) {
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(heads), static_cast<unsigned>(call.batch));
  };
  const int tiles = ceil_divided(longest_queries(call), Config::kQueries);
  if (const char* fault =
          launch(row_terms_kernel<Config>, "row_terms", blocks(tiles, call.q_heads), kTermThreads, 0, call.stream, p))
    return fault;
  if (const char* fault = launch(backward_kernel<Config>, "backward",
                                 blocks(ceil_divided(longest_keys(call), Config::kKeys), call.kv_heads),
                                 Config::kThreads, BackwardLayout<Config>::kBytes, call.stream, p))
    return fault;
  return launch(query_gradient_kernel<Config>, "query_gradient", blocks(Config::kBlocks * tiles, call.q_heads), 128, 0,
                call.stream, p);
}

template <class Element, int Width, BackwardKind Kind>
const char* backward_of_kind(const LongattnCall& call) {
  constexpr BackwardRow kRow = backward_row(Width);
  return launch_backward<
      BackwardConfig<Element, Width, kRow.queries, kRow.keys, kRow.query_stages, kRow.output_stages, Kind>>(call);
}

template <class Element, int Width>
const char* backward_of_element(const LongattnCall& call) {
  if (has_other_scores(call))
    return call.lo ? "bounds and other scores have no kernel of their own"
                   : backward_of_kind<Element, Width, BackwardKind::kGeneral>(call);
  return call.lo ? backward_of_kind<Element, Width, BackwardKind::kBounded>(call)
                 : backward_of_kind<Element, Width, BackwardKind::kPlain>(call);
}

template <int Width>
const char* backward_of_width(const LongattnCall& call) {
  return call.is_bfloat16 ? backward_of_element<BFloat16, Width>(call) : backward_of_element<Half, Width>(call);
}

}  // namespace longattn::cuda
