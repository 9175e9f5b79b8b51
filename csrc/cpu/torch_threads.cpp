#include "cpu/torch_threads.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <cstring>
#endif

namespace longattn {

#if defined(__linux__)
namespace {

// From the moment this library is loaded: torch may have used its threads before a fork, though we did not.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watching =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

int find_torch(dl_phdr_info* library, size_t, void* path) {
  if (!library->dlpi_name || !std::strstr(library->dlpi_name, "/libtorch_cpu.so")) return 0;
  *static_cast<const char**>(path) = library->dlpi_name;
  return 1;
}

ParallelRegion find() {
  const char* path = nullptr;
  dl_iterate_phdr(find_torch, &path);
  void* torch = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  // Looked for in the library and in what it is linked to, which other copies of a runtime in the process are not.
  return torch ? reinterpret_cast<ParallelRegion>(dlsym(torch, "GOMP_parallel")) : nullptr;
}

}  // namespace

ParallelRegion torch_parallel_region() {
  static const ParallelRegion found = find();
  return forked.load(std::memory_order_relaxed) ? nullptr : found;
}
#else
ParallelRegion torch_parallel_region() { return nullptr; }
#endif

}  // namespace longattn
