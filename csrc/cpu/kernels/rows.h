// Rows of tokens in and out of tiles: conversion between storage and accumulation type, rotation, transposition.
#pragma once

#include "cpu/kernels/simd.h"
#include "longattn/params.h"

namespace longattn {
namespace {

inline int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBool:
    case DType::kInt8:
      return 1;
    default:
      return 2;
  }
}

inline char* row_address(const Tensor4& x, DType dtype, int64_t batch, int64_t head, int64_t token) {
  return x.data + (batch * x.batch + head * x.head + token * x.token) * element_bytes(dtype);
}

inline float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float from_bfloat16(uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }

// To nearest, ties to even; NaN stays a (quiet) NaN.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

#if defined(__aarch64__)
inline float from_float16(uint16_t x) {
  __fp16 number;
  __builtin_memcpy(&number, &x, sizeof(number));
  return number;
}

inline uint16_t to_float16(float x) {
  const __fp16 number = static_cast<__fp16>(x);
  uint16_t bits;
  __builtin_memcpy(&bits, &number, sizeof(bits));
  return bits;
}
#elif !defined(__F16C__)
inline float from_float16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t rest = x & 0x7fffu;
  if (rest >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // inf, NaN
  if (rest >= 0x0400u) return float_from_bits(sign | ((rest << 13) + 0x38000000u));
  const float magnitude = static_cast<float>(rest) * 0x1p-24f;  // subnormal or zero
  return float_from_bits(sign | bits_from_float(magnitude));
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7e00u | static_cast<uint16_t>((rest >> 13) & 0x1ffu);
  if (rest >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (rest < 0x38800000u) {                        // below 2^-14: count units of 2^-24, rounded by the addition
    const float units = float_from_bits(rest) + 0.5f;
    return sign | static_cast<uint16_t>(bits_from_float(units) - bits_from_float(0.5f));
  }
  return sign | static_cast<uint16_t>((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13);
}
#endif

inline void load_float16(const uint16_t* src, int64_t n, float* dst) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(dst + i,
                     _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i))));
#endif
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  for (; i < n; ++i) dst[i] = _cvtsh_ss(src[i]);
#else
  for (; i < n; ++i) dst[i] = from_float16(src[i]);
#endif
}

inline void store_float16(const float* src, int64_t n, uint16_t* dst) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) dst[i] = _cvtss_sh(src[i], _MM_FROUND_TO_NEAREST_INT);
#else
  for (; i < n; ++i) dst[i] = to_float16(src[i]);
#endif
}

// n numbers of storage type `dtype` to the accumulation type T.
inline void load_row(const char* src, DType dtype, int64_t n, float* __restrict dst) {
  if (dtype == DType::kFloat32) {
    std::memcpy(dst, src, n * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = from_bfloat16(from[i]);
  } else if (dtype == DType::kFloat16) {
    load_float16(reinterpret_cast<const uint16_t*>(src), n, dst);
  } else if (dtype == DType::kInt8) {
    const int8_t* from = reinterpret_cast<const int8_t*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = from[i];
  } else {
    const double* from = reinterpret_cast<const double*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(from[i]);
  }
}

constexpr int64_t kPart = 64;  // numbers converted at a time

inline void load_row(const char* src, DType dtype, int64_t n, double* __restrict dst) {
  if (dtype == DType::kFloat64) {
    std::memcpy(dst, src, n * sizeof(double));
    return;
  }
  float part[kPart];
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t count = n - i < kPart ? n - i : kPart;
    load_row(src + i * element_bytes(dtype), dtype, count, part);
    for (int64_t c = 0; c < count; ++c) dst[i + c] = part[c];
  }
}

inline void store_row(const float* __restrict src, DType dtype, int64_t n, char* dst) {
  if (dtype == DType::kFloat32) {
    std::memcpy(dst, src, n * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(dst);
    for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(src[i]);
  } else if (dtype == DType::kFloat16) {
    store_float16(src, n, reinterpret_cast<uint16_t*>(dst));
  } else {
    double* to = reinterpret_cast<double*>(dst);
    for (int64_t i = 0; i < n; ++i) to[i] = src[i];
  }
}

inline void store_row(const double* __restrict src, DType dtype, int64_t n, char* dst) {
  if (dtype == DType::kFloat64) {
    std::memcpy(dst, src, n * sizeof(double));
    return;
  }
  float part[kPart];
  for (int64_t i = 0; i < n; i += kPart) {
    const int64_t count = n - i < kPart ? n - i : kPart;
    for (int64_t c = 0; c < count; ++c) part[c] = static_cast<float>(src[i + c]);
    store_row(part, dtype, count, dst + i * element_bytes(dtype));
  }
}

// x[0..n) as int8 numbers, times the scale that is returned, max |x| / 127: each is off by half a scale at most. Where
// a number is not finite the scale is NaN.
template <class T>
inline float store_int8(const T* __restrict x, int64_t n, int8_t* __restrict dst) {
  T largest = T(0);
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const T size = x[i] < T(0) ? -x[i] : x[i];
    finite &= size <= T(3.4028234663852886e38);
    largest = size > largest ? size : largest;
  }
  const float scale = finite ? static_cast<float>(largest / T(127)) : __builtin_nanf("");
  if (!(scale > 0)) {
    std::memset(dst, 0, n);
    return scale;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float steps = __builtin_rintf(static_cast<float>(x[i] / static_cast<T>(scale)));
    dst[i] = static_cast<int8_t>(steps > 127.0f ? 127.0f : steps < -127.0f ? -127.0f : steps);
  }
  return scale;
}

// Turns x[0..rotated) in place. `inverse` turns the other way: the transpose, up to the factor inside cos and sin.
template <class T>
inline void rotate_row(T* __restrict x, int64_t rotated, const T* __restrict cos, const T* __restrict sin,
                       bool interleaved, bool inverse) {
  const int64_t half = rotated / 2;
  const T sign = inverse ? T(-1) : T(1);
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const T a = x[2 * i], b = x[2 * i + 1], s = sign * sin[i];
      x[2 * i] = a * cos[i] - b * s;
      x[2 * i + 1] = b * cos[i] + a * s;
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const T a = x[i], b = x[half + i], s = sign * sin[i];
      x[i] = a * cos[i] - b * s;
      x[half + i] = b * cos[i] + a * s;
    }
  }
}

template <class T>
inline void rotate_row(T* x, int64_t rotated, const Angles& angles, int64_t batch, int64_t token, bool interleaved,
                       bool inverse) {
  const int64_t at = batch * angles.batch + token * (rotated / 2);
  rotate_row(x, rotated, reinterpret_cast<const T*>(angles.cos) + at, reinterpret_cast<const T*>(angles.sin) + at,
             interleaved, inverse);
}

// Lane numbers 0..N - 1 as a parameter pack: Lanes<N> ends in Lanes<0, 0, 1, ..., N - 1>.
template <int N, int64_t... I>
struct Lanes : Lanes<N - 1, N - 1, I...> {};
template <int64_t... I>
struct Lanes<0, I...> {
  template <class T>
  static inline Vec<T> zip_low(Vec<T> a, Vec<T> b) {
    return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * kWidth<T>)...);
  }
  template <class T>
  static inline Vec<T> zip_high(Vec<T> a, Vec<T> b) {
    return __builtin_shufflevector(a, b, (I / 2 + kWidth<T> / 2 + (I % 2) * kWidth<T>)...);
  }
};

// dst[c][r] = src[r][c] for r < rows, c < columns, both multiples of the vector width.
template <class T>
void transpose(const T* __restrict src, int64_t src_stride, int64_t rows, int64_t columns, T* __restrict dst,
               int64_t dst_stride) {
  constexpr int W = kWidth<T>;
  using Zip = Lanes<W>;
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      Vec<T> x[W], y[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = load<T>(src + (r + i) * src_stride + c);
#pragma GCC unroll 4
      for (int step = 1; step < W; step *= 2) {  // each perfect shuffle of rows and lanes turns one bit of the index
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; ++i) {
          y[2 * i] = Zip::template zip_low<T>(x[i], x[i + W / 2]);
          y[2 * i + 1] = Zip::template zip_high<T>(x[i], x[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = y[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<T>(dst + (c + i) * dst_stride + r, x[i]);
    }
}

}  // namespace
}  // namespace longattn
