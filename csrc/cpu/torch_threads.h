// The threads of PyTorch's OpenMP runtime. They spin for a while after each of its operations: threads of our own would
// have to share their cores with them.
#pragma once

namespace longattn {

// Runs body(data) on `threads` threads, the caller's among them; libgomp's entry point of a parallel region, that
// LLVM's and Intel's runtimes offer too.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// That of the runtime that libtorch_cpu is linked to. nullptr where torch is not loaded, or not built with OpenMP, or
// in a forked child, where the runtime may wait for threads that it had in the parent.
ParallelRegion torch_parallel_region();

}  // namespace longattn
