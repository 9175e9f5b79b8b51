#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals, Location at = Location::here()) {
  emulator::mbarrier_init(barrier, arrivals, at);
}
inline void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes, Location at = Location::here()) {
  emulator::mbarrier_arrive(barrier, bytes, at);
}
inline void mbarrier_arrive(uint32_t barrier, Location at = Location::here()) {
  emulator::mbarrier_arrive(barrier, 0, at);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, Location at = Location::here()) {
  emulator::mbarrier_wait(barrier, parity, at);
}
inline void mbarrier_name(uint32_t barrier, const char* name, int index = -1) {
  emulator::mbarrier_name(barrier, name, index);
}

}  // namespace longattn::hopper
