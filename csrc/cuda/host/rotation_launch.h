// From a call to the kernels that rotate and append.
#pragma once

#include "hopper/launch.h"
#include "host/attention.h"
#include "kernels/rotation.h"

namespace longattn::cuda {

inline const char* append(const LongattnCall& call) {
  const AppendParams p{call.q,
                       call.new_k,
                       call.new_v,
                       call.k,
                       call.v,
                       static_cast<uint16_t*>(call.packed_q),
                       {call.inv_freq, call.rotated, call.interleaved, call.rope_factor, 1.0f},
                       call.inv_freq_batch,
                       call.positions_batch,
                       call.positions,
                       call.key_lens,
                       call.query_lens,
                       call.table,
                       call.nq,
                       call.q_heads,
                       call.kv_heads,
                       call.head_dim,
                       call.v_head_dim,
                       call.table_width,
                       call.pages,
                       call.page_size};
  const int heads = (call.packed_q ? call.q_heads : 0) + (call.new_k.data ? call.kv_heads : 0);
  const dim3 blocks(static_cast<unsigned>(call.nq), static_cast<unsigned>(heads), static_cast<unsigned>(call.batch));
  return call.is_bfloat16 ? launch(append_kernel<BFloat16>, "append", blocks, kRotationThreads, 0, call.stream, p)
                          : launch(append_kernel<Half>, "append", blocks, kRotationThreads, 0, call.stream, p);
}

inline const char* rope(const LongattnRope& call) {
  const RopeParams p{call.x,
                     call.out,
                     {call.inv_freq, call.rotated, call.interleaved, call.factor, call.inverse ? -1.0f : 1.0f},
                     call.positions,
                     call.positions_batch,
                     call.width};
  const dim3 blocks(static_cast<unsigned>(call.tokens), static_cast<unsigned>(call.heads),
                    static_cast<unsigned>(call.batch));
  return call.is_bfloat16 ? launch(rope_kernel<BFloat16>, "rope", blocks, kRotationThreads, 0, call.stream, p)
                          : launch(rope_kernel<Half>, "rope", blocks, kRotationThreads, 0, call.stream, p);
}

}  // namespace longattn::cuda
