#include "cpu/large_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace longattn {

void prefer_large_pages([[maybe_unused]] char* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data), first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: it may be declined
#endif
}

}  // namespace longattn
