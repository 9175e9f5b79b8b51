// Copies of plain memory by the asynchronous unit; addresses and sizes are multiples of 16 bytes.
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

// Global to shared; the bytes count down on the barrier. PTX: cp.async.bulk.
LONGATTN_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Adds float32 numbers in shared memory to global memory, each atomically. PTX: cp.reduce.async.bulk.
LONGATTN_DEVICE void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies out of shared memory. PTX: cp.async.bulk.commit_group.
LONGATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the N newest groups have read shared memory. PTX: cp.async.bulk.wait_group, .read.
template <int N>
LONGATTN_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Waits until all but the N newest groups have also written. PTX: cp.async.bulk.wait_group.
template <int N>
LONGATTN_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace longattn::hopper
