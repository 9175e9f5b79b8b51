// Barriers in shared memory that count arrivals and the bytes of asynchronous copies. Addresses are of the shared
// window.
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

// PTX: mbarrier.init.
LONGATTN_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes this thread's inits visible to asynchronous copies. PTX: fence.mbarrier_init (membar / fence).
LONGATTN_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, after which the phase also waits for so many bytes. PTX: mbarrier.arrive, .expect_tx.
LONGATTN_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// PTX: mbarrier.arrive.
LONGATTN_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity is complete; of a fresh barrier, parity 1 is. PTX: mbarrier.try_wait.
LONGATTN_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// What the emulator's reports call a barrier.
LONGATTN_DEVICE void mbarrier_name(uint32_t, const char*, int = -1) {}

}  // namespace longattn::hopper
