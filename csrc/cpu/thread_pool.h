// Work for several threads: PyTorch's, or where there are none threads of our own, that sleep between calls.
#pragma once

#include <cstdint>
#include <functional>

namespace longattn {

// Runs task(thread, index) for every index of [0, count), indices handed out in ascending order to at most `threads`
// threads, the caller's among them; `thread` is below `threads`. Returns when all are done. May be called from several
// threads, and in a forked child. Tasks must not throw.
void parallel_for(int64_t threads, int64_t count, const std::function<void(int64_t thread, int64_t index)>& task);

}  // namespace longattn
