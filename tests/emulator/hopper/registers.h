#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

template <int Count>
void allocate_registers(Location at = Location::here()) {
  emulator::set_registers(Count, true, at);
}
template <int Count>
void release_registers(Location at = Location::here()) {
  emulator::set_registers(Count, false, at);
}
template <class T, int N>
void pin(T (&)[N]) {}
inline void compute_before(float, float) {}

}  // namespace longattn::hopper
