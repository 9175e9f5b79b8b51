// The library with one kernel of each kind, for heads LONGATTN_WIDTH wide, to plant faults in: quick to compile.
#include "host/backward_launch.h"
#include "host/forward_launch.h"

using namespace longattn::cuda;
using longattn::hopper::BFloat16;

constexpr int kWidth = LONGATTN_WIDTH;
constexpr ForwardTileShape kWindowed = forward_row(kWidth).windowed, kGeneral = forward_row(kWidth).general;
constexpr BackwardRow kBackward = backward_row(kWidth);
using Windowed = ForwardConfig<BFloat16, kWidth, kWindowed.warpgroups, kWindowed.keys, Kind::kWindowed>;
using General = ForwardConfig<BFloat16, kWidth, kGeneral.warpgroups, kGeneral.keys, Kind::kGeneral>;
using Backward = BackwardConfig<BFloat16, kWidth, kBackward.queries, kBackward.keys, kBackward.query_stages,
                                kBackward.output_stages, BackwardKind::kPlain>;

extern "C" {

int longattn_cuda_call_bytes() { return sizeof(LongattnCall); }
int longattn_cuda_widest() { return kWidth; }

const char* longattn_cuda_forward(const LongattnCall* call) {
  return call->key_mask ? launch_forward<General>(*call) : launch_forward<Windowed>(*call);
}

const char* longattn_cuda_backward(const LongattnCall* call) { return launch_backward<Backward>(*call); }

void longattn_cuda_workspace(const LongattnCall* call, LongattnWorkspace* sizes) {
  const int64_t tiles = static_cast<int64_t>(call->q_heads) * row_tiles(*call, Backward::kQueries).of_head;
  const int64_t blocks = tiles * Backward::kBlocks;
  *sizes = {blocks, row_term_count(*call, Backward::kQueries), blocks * Backward::kBlock, 0, 0};
}

const char* longattn_cuda_append(const LongattnCall*) { return "not in this library"; }
const char* longattn_cuda_decode(const LongattnCall*) { return "not in this library"; }
const char* longattn_cuda_rope(const LongattnRope*) { return "not in this library"; }
}
