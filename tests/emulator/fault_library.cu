// The library with one kernel of each kind, to plant faults in: quick to compile.
#include "host/backward_launch.h"
#include "host/forward_launch.h"

using namespace longattn::cuda;
using longattn::hopper::BFloat16;

extern "C" {

int longattn_cuda_call_bytes() { return sizeof(LongattnCall); }
int longattn_cuda_widest() { return 128; }

const char* longattn_cuda_forward(const LongattnCall* call) {
  return call->key_mask ? launch_forward<ForwardConfig<BFloat16, 128, 2, 128, Kind::kGeneral>>(*call)
                        : launch_forward<ForwardConfig<BFloat16, 128, 2, 128, Kind::kWindowed>>(*call);
}

using Backward = BackwardConfig<BFloat16, 128, 64, false>;
const char* longattn_cuda_backward(const LongattnCall* call) { return launch_backward<Backward>(*call); }

void longattn_cuda_workspace(const LongattnCall* call, LongattnWorkspace* sizes) {
  const int64_t tiles = static_cast<int64_t>(call->q_heads) * row_tiles(*call, Backward::kQueries).of_head;
  *sizes = {2 * tiles, 2 * tiles * Backward::kQueries, tiles * 2 * Backward::kBlock, 0, 0};
}

const char* longattn_cuda_append(const LongattnCall*) { return "not in this library"; }
const char* longattn_cuda_decode(const LongattnCall*) { return "not in this library"; }
const char* longattn_cuda_rope(const LongattnRope*) { return "not in this library"; }
}
