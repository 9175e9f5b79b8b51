#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Location at = Location::here()) {
  emulator::bulk_load(to, from, bytes, barrier, at);
}
inline void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes, Location at = Location::here()) {
  emulator::bulk_reduce_add(to, from, bytes, at);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int N>
void bulk_wait_read(Location at = Location::here()) {
  emulator::bulk_wait(N, true, at);
}
template <int N>
void bulk_wait(Location at = Location::here()) {
  emulator::bulk_wait(N, false, at);
}

}  // namespace longattn::hopper
