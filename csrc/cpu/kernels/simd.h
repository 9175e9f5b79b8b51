// Vectors of the widest registers that this translation unit may use, in the compilers' own vector extension:
// arithmetic, comparison and selection need no intrinsics. Everything here and in the other kernel headers is in an
// unnamed namespace, as each is compiled once per instruction set and no definition may be shared between them.
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

// Whether some lane is not 0.
template <class T>
inline bool any(IntVec<T> x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(x)) != 0;
#else
  Int<T> all = 0;
  for (int lane = 0; lane < kWidth<T>; ++lane) all |= x[lane];
  return all != 0;
#endif
}

constexpr float kInfinity = __builtin_inff();

// Minimax polynomials in relative error of 2^x on [0, 1], by number of terms.
template <class T, int kTerms>
struct Exp2;
template <>
struct Exp2<float, 7> {  // 1.9e-9
  static constexpr float kCoefficients[] = {1.0f,           0.69314698384f, 0.240229836279f, 0.0554833419683f,
                                            0.00967884102f, 0.00124396877f, 0.000217022557f};
};
template <>
struct Exp2<float, 5> {  // 2.6e-6: for weights that will be bfloat16
  static constexpr float kCoefficients[] = {1.00000259337f, 0.693003834484f, 0.241442756796f, 0.0520114607758f,
                                            0.0135341678484f};
};
template <>
struct Exp2<double, 13> {  // 4.1e-20
  static constexpr double kCoefficients[] = {1.0,
                                             0.693147180559945295,
                                             0.2402265069591015531,
                                             0.05550410866480244285,
                                             0.009618129107853618194,
                                             0.001333355813073829725,
                                             0.0001540353109220152484,
                                             0.00001525271303802620851,
                                             1.321590719111723972e-6,
                                             1.017227554479934436e-7,
                                             7.108711190284597248e-9,
                                             4.128404966043969417e-10,
                                             3.623697293678480995e-11};
};
template <class T>
constexpr int kFullTerms = sizeof(T) == 8 ? 13 : 7;

template <class T, int kTerms>
inline Vec<T> exp2_polynomial(Vec<T> x) {
  Vec<T> y = splat<T>(Exp2<T, kTerms>::kCoefficients[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) y = y * x + Exp2<T, kTerms>::kCoefficients[i];
  return y;
}

// 2^x: 0 far below the normal range and at -inf, NaN at NaN.
#if defined(__AVX512DQ__)
template <class T, int kTerms>
inline Vec<T> exp2(Vec<T> x) {
  constexpr int kFloor = 0x09;  // x - floor(x), no exceptions
  if constexpr (sizeof(T) == 4) {
    const __m512 v = reinterpret_cast<__m512>(x);
    const Vec<T> y = exp2_polynomial<T, kTerms>(reinterpret_cast<Vec<T>>(_mm512_maskz_reduce_ps(0xffff, v, kFloor)));
    return reinterpret_cast<Vec<T>>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(y), v));
  } else {
    const __m512d v = reinterpret_cast<__m512d>(x);
    const Vec<T> y = exp2_polynomial<T, kTerms>(reinterpret_cast<Vec<T>>(_mm512_maskz_reduce_pd(0xff, v, kFloor)));
    return reinterpret_cast<Vec<T>>(_mm512_maskz_scalef_pd(0xff, reinterpret_cast<__m512d>(y), v));
  }
}
#else
template <class T>
struct Ieee;
template <>
struct Ieee<float> {
  static constexpr float kLow = -126.5f, kHigh = 127.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int32_t kBias = 127, kMantissa = 23;
};
template <>
struct Ieee<double> {
  static constexpr double kLow = -1022.5, kHigh = 1023.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t kBias = 1023, kMantissa = 52;
};

template <class T, int kTerms>
inline Vec<T> exp2(Vec<T> x) {
  using I = Ieee<T>;
  x = minimum<T>(splat<T>(I::kHigh), maximum<T>(splat<T>(I::kLow), x));
  const Vec<T> shifted = (x - T(0.5)) + I::kRound;
  const Vec<T> y = exp2_polynomial<T, kTerms>(x - (shifted - I::kRound));
  IntVec<T> exponent;
  __builtin_memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + static_cast<Int<T>>(I::kBias)) << static_cast<Int<T>>(I::kMantissa);
  Vec<T> power;  // 0 at kLow, whose floor is the exponent of zero
  __builtin_memcpy(&power, &exponent, sizeof(power));
  return y * power;
}
#endif

}  // namespace
}  // namespace longattn
