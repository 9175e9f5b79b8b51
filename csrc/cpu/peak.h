// This machine's arithmetic peak, measured: what benchmarks compare with.
#pragma once

#include <string>

#include "longattn/params.h"

namespace longattn {

// 10^9 operations per second of an instruction set's products of this type on so many threads; 0 if it has none of its
// own for it.
double peak_gflops(DType dtype, int64_t threads, const std::string& isa);

}  // namespace longattn
