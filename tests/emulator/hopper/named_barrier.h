#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

inline void named_barrier_sync(int id, int threads, Location at = Location::here()) {
  emulator::named_barrier(id, threads, true, at);
}
inline void named_barrier_arrive(int id, int threads, Location at = Location::here()) {
  emulator::named_barrier(id, threads, false, at);
}

}  // namespace longattn::hopper
