// The kernels of one instruction set: included by each file of targets/, which names it in LONGATTN_TARGET.
#pragma once

#include "cpu/kernels/angles.h"
#include "cpu/kernels/append.h"
#include "cpu/kernels/backward.h"
#include "cpu/kernels/decode.h"
#include "cpu/kernels/forward.h"
#include "cpu/kernels/peak.h"
#include "cpu/kernels/rope.h"

namespace longattn {
namespace {

// Calls f with the operands that suit the storage type of a call.
template <class F>
auto with_operands(DType dtype, F f) {
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return f(BFloat16Operands{});
#endif
  return dtype == DType::kFloat64 ? f(FloatOperands<double>{}) : f(FloatOperands<float>{});
}

bool multiplies(DType dtype) {
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return true;
#endif
  return dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

int64_t forward_scratch(const AttentionParams& p, int64_t panels) {
  const int64_t few =
      p.dtype == DType::kFloat64 ? DecodeScratch<double>(p, nullptr).bytes : DecodeScratch<float>(p, nullptr).bytes;
  return larger(few,
                with_operands(p.dtype, [&](auto o) { return ForwardScratch<decltype(o)>(p, panels, nullptr).bytes; }));
}

void forward(const AttentionParams& p, const QueryTile& tile, char* scratch) {
  if (has_few_rows(p, tile))
    return p.dtype == DType::kFloat64 ? decode_tile<double>(p, tile, scratch) : decode_tile<float>(p, tile, scratch);
  with_operands(p.dtype, [&](auto o) { forward_tile<decltype(o)>(p, tile, scratch); });
}

void forward_merge(const AttentionParams& p, const QueryTile& tile, const char* partials, int64_t pieces) {
  p.dtype == DType::kFloat64 ? merge_tile<double>(p, tile, partials, pieces)
                             : merge_tile<float>(p, tile, partials, pieces);
}

bool backward_delta(const AttentionParams& p, const QueryTile& tile) {
  return p.dtype == DType::kFloat64 ? delta_tile<double>(p, tile) : delta_tile<float>(p, tile);
}

void backward_shares(const AttentionParams& p, const QueryTile& tile, char* scratch) {
  with_operands(p.dtype, [&](auto o) { shares_tile<decltype(o)>(p, tile, scratch); });
}

int64_t backward_scratch(const AttentionParams& p) {
  return with_operands(p.dtype, [&](auto o) { return BackwardScratch<decltype(o)>(p, nullptr).bytes; });
}

void backward(const AttentionParams& p, const KeyTile& tile, const Turn& turn, char* scratch) {
  with_operands(p.dtype, [&](auto o) { backward_tile<decltype(o)>(p, tile, turn, scratch); });
}

void backward_finish(const AttentionParams& p, const QueryTile& tile, char* scratch) {
  p.dtype == DType::kFloat64 ? finish_tile<double>(p, tile, scratch) : finish_tile<float>(p, tile, scratch);
}

void backward_bias(const AttentionParams& p, const BiasTile& tile, char* scratch) {
  with_operands(p.dtype, [&](auto o) { bias_tile<decltype(o)>(p, tile, scratch); });
}

int64_t append_scratch(const AttentionParams& p) {
  return larger(p.head_dim, p.v_head_dim) *
         static_cast<int64_t>(p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

void append(const AttentionParams& p, const KeyTile& tile, char* scratch) {
  p.dtype == DType::kFloat64 ? append_tile<double>(p, tile, scratch) : append_tile<float>(p, tile, scratch);
}

int64_t rope_scratch(const RopeParams& p) {
  return p.width * static_cast<int64_t>(p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

void angles(const AngleParams& p) {
  if (p.dtype == DType::kFloat64)
    fill_angles(p.positions, p.inv_freq, p.tokens, p.half, p.factor, reinterpret_cast<double*>(p.cos),
                reinterpret_cast<double*>(p.sin));
  else
    fill_angles(p.positions, p.inv_freq, p.tokens, p.half, p.factor, reinterpret_cast<float*>(p.cos),
                reinterpret_cast<float*>(p.sin));
}

void rope(const RopeParams& p, const Angles& tables, int64_t batch, int64_t head, int64_t first, int64_t tokens,
          char* scratch) {
  p.dtype == DType::kFloat64 ? rope_rows<double>(p, tables, batch, head, first, tokens, scratch)
                             : rope_rows<float>(p, tables, batch, head, first, tokens, scratch);
}

}  // namespace

namespace LONGATTN_TARGET {
extern const Kernels table;
const Kernels table = {multiplies,      forward_scratch,  forward,         forward_merge,
                       backward_delta,  backward_scratch, backward_shares, backward,
                       backward_finish, backward_bias,    burst,           append_scratch,
                       append,          angles,           rope_scratch,    rope};
}  // namespace LONGATTN_TARGET

}  // namespace longattn
