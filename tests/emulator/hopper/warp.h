#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

inline void sync_warp(Location at = Location::here()) { emulator::sync_warp(at); }
inline void sync_block(int threads, Location at = Location::here()) { emulator::named_barrier(0, threads, true, at); }

template <class T>
T from_lane(T value, int source, Location at = Location::here()) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = static_cast<uint32_t>(emulator::from_lane(bits, source, at));
  memcpy(&value, &bits, 4);
  return value;
}
template <class T>
T from_lane_xor(T value, int mask, Location at = Location::here()) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = static_cast<uint32_t>(emulator::from_lane_xor(bits, mask, at));
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t ballot(bool predicate, Location at = Location::here()) { return emulator::ballot(predicate, at); }

}  // namespace longattn::hopper
