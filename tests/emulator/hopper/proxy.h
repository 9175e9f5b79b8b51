#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

inline void fence_proxy_async_shared() { emulator::fence_proxy_async_shared(); }
inline void fence_proxy_async_global() {}  // global memory is not tracked

}  // namespace longattn::hopper
