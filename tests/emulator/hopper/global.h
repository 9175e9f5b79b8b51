#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

inline int fetch_add(int* counter, int x) {
  const int before = *counter;
  *counter += x;
  return before;
}
inline void wait_until_equal(const int* counter, int value, Location at = Location::here()) {
  emulator::wait_until([=] { return *counter == value; }, counter, at);
}
inline void add_release(int* counter, int x) { *counter += x; }

}  // namespace longattn::hopper
