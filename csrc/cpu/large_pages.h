// Memory of results that are written whole.
#pragma once

#include <cstdint>

namespace longattn {

// Asks the system for large pages where data[0..bytes) has none yet: each of them is one fault in place of 512.
void prefer_large_pages(char* data, int64_t bytes);

}  // namespace longattn
