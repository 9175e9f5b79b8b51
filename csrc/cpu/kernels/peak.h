// The arithmetic peak of the instructions that the kernels' products use: independent accumulators in registers,
// nothing else. To the compiler, b is another one in each multiply-add; it would compute one product for all of them.
#pragma once

#include "cpu/kernels/amx.h"
#include "cpu/kernels/gemm.h"
#include "longattn/params.h"

namespace longattn {
namespace {

// The class of registers that hold vectors.
#if defined(__AVX512F__)
#define LONGATTN_VECTOR "+v"
#elif defined(__x86_64__)
#define LONGATTN_VECTOR "+x"
#elif defined(__aarch64__)
#define LONGATTN_VECTOR "+w"
#else
#define LONGATTN_VECTOR "+m"
#endif

constexpr int kAccumulators = 6 * kRegisterColumns;

template <class Dot>
inline double dot_burst(int64_t rounds, int64_t operations) {
  using T = typename Dot::Sum;
  Vec<T> sum[kAccumulators] = {};
  typename Dot::Unit a{};
  typename Dot::UnitVec b{};
  asm volatile("" : "+m"(a), "+m"(b));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int n = 0; n < kAccumulators; ++n) {
      asm("" : LONGATTN_VECTOR(b));
      sum[n] = Dot::add(sum[n], &a, b);
    }
  }
#pragma GCC unroll 32
  for (int n = 0; n < kAccumulators; ++n) asm volatile("" : LONGATTN_VECTOR(sum[n]));
  return static_cast<double>(rounds * kAccumulators * kWidth<T> * operations);
}

#if defined(__AMX_BF16__)
inline double tile_burst(int64_t rounds) {
  const TileRegisters registers;
  _tile_zero(4);
  _tile_zero(6);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 6);
  }
  return static_cast<double>(rounds) * 4 * 16 * 16 * 32 * 2;
}
#endif

// Runs `rounds` of multiplications and returns the number of operations; 0 if products of this type have no instruction
// of their own.
double burst(DType dtype, int64_t rounds) {
  switch (dtype) {
    case DType::kFloat32:
      return dot_burst<FusedMultiplyAdd<float>>(rounds, 2);
    case DType::kFloat64:
      return dot_burst<FusedMultiplyAdd<double>>(rounds, 2);
#if defined(__AMX_BF16__)
    case DType::kBFloat16:
      return tile_burst(rounds);
#elif defined(__AVX512BF16__)
    case DType::kBFloat16:
      return dot_burst<PairDotProduct>(rounds, 4);
#endif
    default:
      return 0.0;
  }
}

}  // namespace
}  // namespace longattn
