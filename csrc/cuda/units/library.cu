// What the library exports, in C: longattn/backends/cuda/native.py calls it through ctypes.
#include <iterator>

#include "host/attention.h"
#include "host/combine_launch.h"
#include "host/plan.h"
#include "host/rotation_launch.h"
#include "host/table.h"

#define LONGATTN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace longattn::cuda;

LONGATTN_EXPORT int longattn_cuda_call_bytes() { return sizeof(LongattnCall); }

static_assert(std::end(kForwardTable)[-1].width == std::end(kBackwardTable)[-1].width);
LONGATTN_EXPORT int longattn_cuda_widest() { return std::end(kForwardTable)[-1].width; }

// Entries of the workspaces that a call and its backward need.
LONGATTN_EXPORT void longattn_cuda_workspace(const LongattnCall* call, LongattnWorkspace* sizes) {
  *sizes = {1, 0, 0, 0, 0};
  if (call->table) {
    const int64_t rows = static_cast<int64_t>(call->batch) * call->q_heads * call->nq * split_count(*call);
    sizes->partial_lse = rows;
    sizes->partial_out = rows * padded_width(kDecodeWidths, larger(call->head_dim, call->v_head_dim));
    return;
  }
  const int width = padded_width(kBackwardTable, larger(call->head_dim, call->v_head_dim));
  if (!call->dout.data || !width) return;
  const int queries = backward_row(width).queries;
  const int64_t tiles = static_cast<int64_t>(call->q_heads) * row_tiles(*call, queries).of_head;
  sizes->row_terms = row_term_count(*call, queries);
  sizes->dq_sum = tiles * queries * width;
  if (call->deterministic) sizes->counters = sizes->dq_sum / kSumBlock;
}

// Like all below: nullptr, or what went wrong.
LONGATTN_EXPORT const char* longattn_cuda_forward(const LongattnCall* call) {
  switch (padded_width(kForwardTable, larger(call->head_dim, call->v_head_dim))) {
    case 64:
      return forward_of_width<64>(*call);
    case 96:
      return forward_of_width<96>(*call);
    case 128:
      return forward_of_width<128>(*call);
    case 192:
      return forward_of_width<192>(*call);
    case 256:
      return forward_of_width<256>(*call);
  }
  return "heads are at most 256 wide";
}

LONGATTN_EXPORT const char* longattn_cuda_backward(const LongattnCall* call) {
  switch (padded_width(kBackwardTable, larger(call->head_dim, call->v_head_dim))) {
    case 64:
      return backward_of_width<64>(*call);
    case 128:
      return backward_of_width<128>(*call);
    case 192:
      return backward_of_width<192>(*call);
    case 256:
      return backward_of_width<256>(*call);
  }
  return "heads are at most 256 wide";
}

// Rotates new tokens and writes their keys and values to the slots of a cache; packs queries for decode.
LONGATTN_EXPORT const char* longattn_cuda_append(const LongattnCall* call) { return append(*call); }

LONGATTN_EXPORT const char* longattn_cuda_decode(const LongattnCall* call) {
  const int width = padded_width(kDecodeWidths, larger(call->head_dim, call->v_head_dim));
  const char* fault = "heads are at most 256 wide";
  switch (width) {
    case 64:
      fault = decode_of_width<64>(*call);
      break;
    case 128:
      fault = decode_of_width<128>(*call);
      break;
    case 256:
      fault = decode_of_width<256>(*call);
      break;
  }
  return fault ? fault : combine(*call, width);
}

LONGATTN_EXPORT const char* longattn_cuda_rope(const LongattnRope* call) { return rope(*call); }
