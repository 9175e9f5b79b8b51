// Tensors in memory as a caller may have them, of every dtype; and random numbers to fill them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "longattn/params.h"

namespace longattn::test {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

inline const char* dtype_name(DType dtype) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16", "bool", "int8"};
  return names[static_cast<int>(dtype)];
}

inline int64_t bytes_of(DType dtype) {
  const int64_t bytes[] = {4, 8, 2, 2, 1, 1};
  return bytes[static_cast<int>(dtype)];
}

inline int fraction_bits(DType dtype) { return dtype == DType::kBFloat16 ? 7 : 10; }

inline DType accumulation_type(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// The IEEE 754 number of 16 bits, so many of them for the fraction.
inline double from_16_bits(uint16_t bits, int fraction) {
  const int ones = (1 << (15 - fraction)) - 1, bias = ones / 2, exponent = bits >> fraction & ones;
  const int significand = bits & ((1 << fraction) - 1);
  double magnitude = std::ldexp(significand + (exponent ? 1 << fraction : 0), std::max(exponent, 1) - bias - fraction);
  if (exponent == ones) magnitude = significand ? kNan : kInfinity;
  return bits >> 15 ? -magnitude : magnitude;
}

// To nearest, ties to even.
inline uint16_t to_16_bits(double x, int fraction) {
  const int ones = (1 << (15 - fraction)) - 1, bias = ones / 2, infinity = ones << fraction;
  if (std::isnan(x)) return 0x7fff;
  int exponent = bias + 1;
  if (!std::isinf(x)) std::frexp(x, &exponent);
  exponent = std::min(std::max(exponent - 1, 1 - bias), bias + 1);
  const double units = std::nearbyint(std::ldexp(std::fabs(x), fraction - exponent));
  const double bits = units + std::ldexp(exponent + bias - 1, fraction);  // a carry moves on to the exponent
  return static_cast<uint16_t>(std::min<double>(bits, infinity) + (std::signbit(x) ? 0x8000 : 0));
}

template <class T>
T read_as(const char* from) {
  T x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <class T>
void write_as(char* to, T x) {
  std::memcpy(to, &x, sizeof(x));
}

inline double read(const char* from, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return read_as<float>(from);
    case DType::kFloat64:
      return read_as<double>(from);
    case DType::kBool:
      return *from;
    default:
      return from_16_bits(read_as<uint16_t>(from), fraction_bits(dtype));
  }
}

inline void write(char* to, DType dtype, double x) {
  switch (dtype) {
    case DType::kFloat32:
      return write_as(to, static_cast<float>(x));
    case DType::kFloat64:
      return write_as(to, x);
    case DType::kBool:
      return write_as(to, x != 0);
    default:
      return write_as(to, to_16_bits(x, fraction_bits(dtype)));
  }
}

struct Shape {
  int64_t batch = 0, head = 0, token = 0, width = 0;
  int64_t size() const { return batch * head * token * width; }
  int64_t at(int64_t b, int64_t h, int64_t i, int64_t c) const { return ((b * head + h) * token + i) * width + c; }
};

// [batch, head, token, width]. Every byte starts as 0xff, which is NaN in all types but bool.
class Tensor {
 public:
  enum Layout { kDense, kGaps, kTokensFirst };  // the latter two with memory between rows that belongs to nobody

  Tensor() = default;
  Tensor(DType type, const Shape& extent, Layout layout = kDense)
      : dtype(type), shape(extent), gap_(layout == kDense ? 0 : 3) {
    const int64_t row = shape.width + gap_;
    token_ = layout == kTokensFirst ? row * shape.head : row;
    head_ = layout == kTokensFirst ? row : row * shape.token;
    batch_ = row * shape.head * shape.token;
    memory_.assign((batch_ * shape.batch + gap_ + 1) * bytes_of(dtype), kUntouched);
  }

  double get(int64_t b, int64_t h, int64_t i, int64_t c) const { return read(memory_.data() + at(b, h, i, c), dtype); }
  void set(int64_t b, int64_t h, int64_t i, int64_t c, double x) { write(memory_.data() + at(b, h, i, c), dtype, x); }

  // Calls f(b, h, i, c) for every entry.
  template <class F>
  void each(F f) const {
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int64_t h = 0; h < shape.head; ++h)
        for (int64_t i = 0; i < shape.token; ++i)
          for (int64_t c = 0; c < shape.width; ++c) f(b, h, i, c);
  }
  template <class F>
  void fill(F next) {
    each([&](int64_t b, int64_t h, int64_t i, int64_t c) { set(b, h, i, c, next()); });
  }
  void zero() {
    fill([] { return 0; });
  }

  bool only_entries_are_touched() const {
    Tensor clean = *this;
    clean.memory_.assign(memory_.size(), kUntouched);
    each([&](int64_t b, int64_t h, int64_t i, int64_t c) {
      std::memcpy(clean.memory_.data() + at(b, h, i, c), memory_.data() + at(b, h, i, c), bytes_of(dtype));
    });
    return clean == *this;
  }
  bool operator==(const Tensor& other) const { return memory_ == other.memory_; }

  char* data() { return memory_.data() + at(0, 0, 0, 0); }
  Tensor4 view() { return {data(), batch_, head_, token_}; }
  // Broadcast along what is one entry wide.
  Bias bias() {
    const auto stride = [](int64_t extent, int64_t step) { return extent > 1 ? step : 0; };
    return {data(),
            stride(shape.batch, batch_),
            stride(shape.head, head_),
            stride(shape.token, token_),
            stride(shape.width, 1),
            dtype};
  }

  DType dtype = DType::kFloat32;
  Shape shape;

 private:
  static constexpr char kUntouched = -1;

  int64_t at(int64_t b, int64_t h, int64_t i, int64_t c) const {
    return ((gap_ ? 1 : 0) + b * batch_ + h * head_ + i * token_ + c) * bytes_of(dtype);
  }

  int64_t gap_ = 0, batch_ = 0, head_ = 0, token_ = 0;
  std::vector<char> memory_ = {kUntouched};
};

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  double between(double low, double high) { return low + (high - low) * static_cast<double>(bits_() >> 11) * 0x1p-53; }
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits_() % static_cast<uint64_t>(high - low + 1));
  }

 private:
  std::mt19937_64 bits_;
};

}  // namespace longattn::test
