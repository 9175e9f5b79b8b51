// From a call on a cache to the merge of its splits.
#pragma once

#include "hopper/launch.h"
#include "host/plan.h"
#include "kernels/combine.h"

namespace longattn::cuda {

// The parts are `width` wide.
inline const char* combine(const LongattnCall& call, int width) {
  const CombineParams p{call.partial_out, call.partial_lse, call.out,          call.lse,
                        call.sink_logits, call.query_lens,  split_count(call), call.batch,
                        call.q_heads,     call.kv_heads,    call.nq,           width,
                        call.v_head_dim};
  const dim3 blocks(static_cast<unsigned>(call.nq), static_cast<unsigned>(call.q_heads),
                    static_cast<unsigned>(call.batch));
  return call.is_bfloat16 ? launch(combine_kernel<BFloat16>, "combine", blocks, kCombineThreads, 0, call.stream, p)
                          : launch(combine_kernel<Half>, "combine", blocks, kCombineThreads, 0, call.stream, p);
}

}  // namespace longattn::cuda
