#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

inline uint32_t shared_base() { return emulator::shared_base(); }
inline uint32_t load_shared(uint32_t address, Location at = Location::here()) {
  uint32_t x;
  emulator::load_shared(address, &x, 4, at);
  return x;
}
inline float2 load_shared_pair(uint32_t address, Location at = Location::here()) {
  float2 x;
  emulator::load_shared(address, &x, 8, at);
  return x;
}
template <class Words>
Words load_shared_words(uint32_t address, Location at = Location::here()) {
  Words x;
  emulator::load_shared(address, &x, sizeof(Words), at);
  return x;
}
inline void store_shared(uint32_t address, uint32_t x, Location at = Location::here()) {
  emulator::store_shared(address, &x, 4, at);
}
inline void store_shared(uint32_t address, uint4 x, Location at = Location::here()) {
  emulator::store_shared(address, &x, 16, at);
}
inline void store_shared(uint32_t address, float a, float b, float c, float d, Location at = Location::here()) {
  const float x[4] = {a, b, c, d};
  for (const float number : x) emulator::check_used(number, at);
  emulator::store_shared(address, x, 16, at);
}
inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                           Location at = Location::here()) {
  const uint32_t words[4] = {a, b, c, d};
  emulator::store_matrices(address, words, at);
}

}  // namespace longattn::hopper
