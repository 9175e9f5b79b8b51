// Order between a thread's own accesses and those of asynchronous units (wgmma, bulk copies).
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

// This thread's writes to shared memory, before what asynchronous units do after the next barrier. PTX:
// fence.proxy.async (membar / fence); Async proxy.
LONGATTN_DEVICE void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory, either way round.
LONGATTN_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace longattn::hopper
