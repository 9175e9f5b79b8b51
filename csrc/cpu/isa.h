// The instruction sets that were built, and the choice of one for this process.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace longattn {

// The fastest that this machine runs, or the one named by the environment's LONGATTN_CPU_ISA when first asked.
const Kernels& kernels();
std::string isa();
// Of one that runs here, or of that in use if no name is given.
const Kernels& kernels(const std::string& name);
// All that were built and run here, fastest first.
std::vector<std::string> usable_isas();

}  // namespace longattn
