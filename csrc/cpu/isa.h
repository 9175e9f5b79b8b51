// The instruction sets that were built, and the choice of one for this process.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace longattn {

// The fastest that this machine runs, or the one named by the environment's LONGATTN_CPU_ISA when first asked.
const Kernels& kernels();
std::string isa();
// All that were built and run here, fastest first.
std::vector<std::string> usable_isas();

}  // namespace longattn
