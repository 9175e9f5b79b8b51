// The kernels of one instruction set: included by each file of targets/, which names it in LONGATTN_TARGET.
#pragma once

#include "cpu/kernels/backward.h"
#include "cpu/kernels/forward.h"
#include "cpu/kernels/rope.h"

namespace longattn {
namespace {

// Functions of the accumulation type, called for the storage type of a call.
#define LONGATTN_BY_TYPE(params, function, ...) \
  ((params).dtype == DType::kFloat64 ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__))

int64_t forward_scratch_bytes(const AttentionParams& p, int64_t panels) {
  return p.dtype == DType::kFloat64 ? ForwardScratch<double>(p, panels, nullptr).bytes
                                    : ForwardScratch<float>(p, panels, nullptr).bytes;
}

void forward(const AttentionParams& p, const QueryTile& tile, char* scratch) {
  LONGATTN_BY_TYPE(p, forward_tile, p, tile, scratch);
}

void delta(const AttentionParams& p, const QueryTile& tile) { LONGATTN_BY_TYPE(p, delta_tile, p, tile); }

int64_t backward_scratch_bytes(const AttentionParams& p) {
  return p.dtype == DType::kFloat64 ? BackwardScratch<double>(p, nullptr).bytes : BackwardScratch<float>(p, nullptr).bytes;
}

void backward(const AttentionParams& p, const KeyTile& tile, const Turn& turn, char* scratch) {
  LONGATTN_BY_TYPE(p, backward_tile, p, tile, turn, scratch);
}

void finish(const AttentionParams& p, const QueryTile& tile, char* scratch) {
  LONGATTN_BY_TYPE(p, finish_tile, p, tile, scratch);
}

int64_t rope_scratch_bytes(const RopeParams& p) {
  return p.width * (p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

void rope(const RopeParams& p, int64_t batch, int64_t head, int64_t first, int64_t tokens, char* scratch) {
  LONGATTN_BY_TYPE(p, rope_rows, p, batch, head, first, tokens, scratch);
}

#undef LONGATTN_BY_TYPE

}  // namespace

namespace LONGATTN_TARGET {
extern const Kernels table;
const Kernels table = {forward_scratch_bytes, forward, delta,  backward_scratch_bytes,
                       backward,              finish,  rope_scratch_bytes, rope};
}  // namespace LONGATTN_TARGET

}  // namespace longattn
