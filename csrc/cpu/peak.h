// This machine's arithmetic peak, measured: what benchmarks compare with.
#pragma once

#include "longattn/params.h"

namespace longattn {

// 10^9 operations per second of products of this type on so many threads; 0 if the instruction set in use has none of
// its own for it.
double peak_gflops(DType dtype, int64_t threads);

}  // namespace longattn
