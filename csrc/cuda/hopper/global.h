// Counters in global memory that blocks order themselves by.
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

// PTX: atom.
LONGATTN_DEVICE int fetch_add(int* counter, int x) { return atomicAdd(counter, x); }

// Spins until the counter has this value. PTX: ld.acquire; Memory Consistency Model.
LONGATTN_DEVICE void wait_until_equal(const int* counter, int value) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (now != value);
}

// PTX: red.release; Memory Consistency Model.
LONGATTN_DEVICE void add_release(int* counter, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(x) : "memory");
}

}  // namespace longattn::hopper
