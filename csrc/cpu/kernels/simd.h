// Vectors of the widest registers that this translation unit may use, in the compilers' own vector extension: arithmetic, comparison and
// selection need no intrinsics. Everything here and in the other kernel headers is in an unnamed namespace, as each is compiled once
// per instruction set and no definition may be shared between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace longattn {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisterColumns = 4;  // vectors per row of a register tile: 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisterColumns = 2;  // 6 x 2 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisterColumns = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisterColumns = 2;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IntVec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int;
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Int = typename Simd<T>::Int;
template <class T>
using IntVec = typename Simd<T>::IntVec;
template <class T>
constexpr int kWidth = kVectorBytes / sizeof(T);

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

template <class T>
inline IntVec<T> load_ints(const Int<T>* p) {
  IntVec<T> x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

template <class T>
inline void store(T* p, Vec<T> x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of zero
}

// The larger of each pair; b where either is NaN.
template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// The smaller of each pair; b where either is NaN.
template <class T>
inline Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

constexpr float kInfinity = __builtin_inff();

template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float kLow = -127.0f, kHigh = 127.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kBias = 127, kMantissa = 23;
  // Minimax in relative error (1.9e-9) of 2^x on [-1/2, 1/2].
  static constexpr float kCoefficients[] = {1.0f,          0.693147206f,   0.240226469f,  0.0555032878f,
                                            0.00961848896f, 0.00133999312f, 0.000153458122f};
};
template <>
struct Exp2<double> {
  static constexpr double kLow = -1023.0, kHigh = 1023.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t kBias = 1023, kMantissa = 52;
  // The same, to 3.1e-18.
  static constexpr double kCoefficients[] = {1.0,
                                             0.6931471805599453305,
                                             0.240226506959101562,
                                             0.0555041086648199216,
                                             0.009618129107588335244,
                                             0.001333355814678992172,
                                             0.0001540353046251443206,
                                             0.00001525273348998852565,
                                             1.321543308967639918e-6,
                                             1.017819802167193084e-7,
                                             7.074105613508142796e-9,
                                             4.435282706957277151e-10};
};

// 2^x: 0 below the normal range and at -inf, saturated above it, NaN at NaN.
template <class T>
inline Vec<T> exp2(Vec<T> x) {
  using E = Exp2<T>;
  x = minimum<T>(splat<T>(E::kHigh), maximum<T>(splat<T>(E::kLow), x));
  const Vec<T> shifted = x + E::kRound;
  const Vec<T> fraction = x - (shifted - E::kRound);
  IntVec<T> exponent;
  __builtin_memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + static_cast<Int<T>>(E::kBias)) << static_cast<Int<T>>(E::kMantissa);
  constexpr int kTerms = sizeof(E::kCoefficients) / sizeof(T);
  Vec<T> y = splat<T>(E::kCoefficients[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) y = y * fraction + E::kCoefficients[i];
  Vec<T> power;
  __builtin_memcpy(&power, &exponent, sizeof(power));
  return y * power;
}

}  // namespace
}  // namespace longattn
