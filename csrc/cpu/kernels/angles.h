// Cosines and sines of rotation angles, the float32 products of position and frequency.
#pragma once

#include <cmath>

#include "longattn/params.h"

namespace longattn {
namespace {

inline void fill_angles(const float* positions, const float* inv_freq, int64_t tokens, int64_t half, double factor,
                        double* cos, double* sin) {
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t c = 0; c < half; ++c) {
      const double angle = positions[i] * inv_freq[c];
      cos[i * half + c] = ::cos(angle) * factor;
      sin[i * half + c] = ::sin(angle) * factor;
    }
}

// Both functions of x = n pi / 2 + r, |r| <= pi / 4, by minimax polynomials of r (relative error of the sine 3.6e-9,
// absolute error of the cosine 1e-10, before rounding), for |x| < 2^24. No branches: compilers make vectors of it.
inline void sin_cos(const float* __restrict inv_freq, float position, int64_t half, double factor,
                    float* __restrict cos, float* __restrict sin) {
  constexpr double kPerTurn = 0.6366197723675814;  // 2 / pi
  constexpr double kHigh = 0x1.921fb54p+0;         // pi / 2: 29 bits, so that n times it is exact, and the rest
  constexpr double kLow = 0x1.10b4611a62633p-30;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves an integer in the low bits
  for (int64_t c = 0; c < half; ++c) {
    const double x = position * inv_freq[c];
    const double shifted = x * kPerTurn + kRound;
    const double n = shifted - kRound;
    int64_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof(bits));
    const double r = (x - n * kHigh) - n * kLow, u = r * r;
    const double s = r + r * u * (-0.166666549402 + u * (0.00833217791636 + u * -0.000195172668412));
    const double k = 1.0 - 0.5 * u + u * u * (0.0416666468605 + u * (-0.00138873672128 + u * 2.44384155286e-5));
    const double a = bits & 1 ? s : k, b = bits & 1 ? k : s;
    cos[c] = static_cast<float>(((bits + 1) & 2 ? -a : a) * factor);
    sin[c] = static_cast<float>((bits & 2 ? -b : b) * factor);
  }
}

inline void fill_angles(const float* positions, const float* inv_freq, int64_t tokens, int64_t half, double factor,
                        float* cos, float* sin) {
  float quickest = 0;
  for (int64_t c = 0; c < half; ++c) {
    const float size = __builtin_fabsf(inv_freq[c]);
    quickest = size > quickest ? size : quickest;
  }
  for (int64_t i = 0; i < tokens; ++i, cos += half, sin += half) {
    const float position = positions[i];
    if (__builtin_fabsf(position) * quickest < 0x1p24f) {
      sin_cos(inv_freq, position, half, factor, cos, sin);
      continue;
    }
    for (int64_t c = 0; c < half; ++c) {  // infinities and NaN among them
      const double angle = position * inv_freq[c];
      cos[c] = static_cast<float>(::cos(angle) * factor);
      sin[c] = static_cast<float>(::sin(angle) * factor);
    }
  }
}

}  // namespace
}  // namespace longattn
